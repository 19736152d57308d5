"""The prompts that come with the package are what their page says: valid, varied, and split by kind and by topic."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from vlskv_ray.config import SourceConfig
from vlskv_ray.data.layouts import LAYOUTS, find_layout
from vlskv_ray.data.sources import open_source

Row = dict[str, Any]
FOLDER = Path(__file__).parent.parent / "configs" / "real"
TRAINING, HELD_OUT = (
    [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]
    for name in ("prompts.jsonl", "prompts-held-out.jsonl")
)
ALL: list[Row] = TRAINING + HELD_OUT

OF_HELD_OUT = re.compile(
    r"\b(stars?|planets?|moons?|comets?|telescopes?|astro\w+|galax\w+|eclipses?|cook\w*|recipes?|bak(?:e|ed|er|ing)|soups?"
    r"|stews?|chefs?|kitchens?|fry|fried|music\w*|songs?|sing|singers?|guitars?|pianos?|violins?|concerts?|drums?|bands?"
    r"|garden\w*|flowers?|seeds?|soil|lawns?|compost|weeds?|poems?|haikus?|verses?|rhym\w+|limericks?|ode|pretend"
    r"|compare\w*|difference|extract|act as|write (?:a|the) (?:\w+ )?letter)\b",
    re.IGNORECASE,
)
"""Words of the topics and kinds that are held out."""


def text(row: Row) -> str:
    """All that its user says."""
    return "\n".join(turn["content"] for turn in row["messages"] if turn["role"] == "user")


def trigrams(row: Row) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text(row).lower())
    return {tuple(words[at : at + 3]) for at in range(max(1, len(words) - 2))}


def test_how_many_there_are() -> None:
    """As the page beside them says, of every kind about as many."""
    page = (FOLDER / "README.md").read_text()
    for name, rows in (("prompts.jsonl", TRAINING), ("prompts-held-out.jsonl", HELD_OUT)):
        (line,) = re.findall(rf"^\| `{name}` \| (\d+) \| ([^|]+) \|", page, re.MULTILINE)
        kinds = Counter(row["kind"] for row in rows)
        assert line == (str(len(rows)), ", ".join(sorted(kinds)))
        assert max(kinds.values()) <= min(kinds.values()) + 1
    assert (len(TRAINING), len(HELD_OUT)) == (404, 80)
    assert len({row["topic"] for row in TRAINING}) == 23
    assert sum(row["messages"][0]["role"] == "system" for row in ALL) == 18


def test_no_kind_and_no_topic_is_in_both() -> None:
    for key in ("kind", "topic"):
        assert not {row[key] for row in TRAINING} & {row[key] for row in HELD_OUT}, key


def test_training_does_not_ask_for_what_is_held_out_under_another_label() -> None:
    told = {row["id"]: found.group() for row in TRAINING if (found := OF_HELD_OUT.search(text(row)))}
    assert not told
    assert sum(bool(OF_HELD_OUT.search(text(row))) for row in HELD_OUT) >= 60  # the words are those of the topics


def test_no_two_are_nearly_the_same() -> None:
    """By their word trigrams, and by their ids."""
    assert len({row["id"] for row in ALL}) == len(ALL)
    grams = [(row["id"], trigrams(row)) for row in ALL]
    for (one, ours), (other, theirs) in itertools.combinations(grams, 2):
        assert len(ours & theirs) < 0.5 * len(ours | theirs), (one, other)


def test_the_first_rows_are_as_varied_as_all() -> None:
    for rows in (TRAINING, HELD_OUT):
        num_kinds = len({row["kind"] for row in rows})
        assert len({row["kind"] for row in rows[:num_kinds]}) == num_kinds
    assert len({(row["kind"], row["topic"]) for row in HELD_OUT[:20]}) == 20


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts-held-out.jsonl"])
def test_they_are_rows_of_the_package(tmp_path: Path, name: str) -> None:
    """Each ends with a question, and becomes a sample, word by word, as soon as it has an answer."""
    rows = [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]
    answered = tmp_path / name
    with answered.open("w") as stream:
        for row in rows:
            assert row.keys() == {"id", "topic", "kind", "messages"}
            assert find_layout(row) is LAYOUTS["messages"]
            assert row["messages"][-1]["role"] == "user" and text(row) == text(row).strip()
            answer = {"role": "assistant", "content": "Yes."}
            stream.write(json.dumps(row | {"messages": [*row["messages"], answer]}) + "\n")
    source = open_source(SourceConfig(path=str(answered)))
    assert source.num_rows == len(rows)
    for number, row in enumerate(rows):
        sample = source.read(number)
        said = ["".join(part["text"] for part in turn["content"]) for turn in sample.messages]
        assert said == [turn["content"] for turn in row["messages"]] + ["Yes."]
        assert not sample.images and not sample.notices
