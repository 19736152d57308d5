"""Rows that end with a question are prompts, and are written as rows again that a run reads as they were."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import picture
from test_sources import Spec

from vlskv_ray.data.images import load_image
from vlskv_ray.data.prompts import Prompts, common_root
from vlskv_ray.data.sample import Rejected, Sample
from vlskv_ray.data.sources import Source, open_source, open_sources

ANSWER = {"role": "assistant", "content": "It is red.", "finish_reason": "length", "num_tokens": 5}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def save_rows(file: Path, *rows: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def prompts_of(*sources: Source, **options: Any) -> Prompts:
    return Prompts(sources, tuple(source.num_rows for source in sources), **options)


def shown(sample: Sample) -> list[bytes]:
    return [load_image(image).tobytes() for image in sample.images]


@pytest.mark.parametrize(
    ("turns", "is_asked"),
    [
        ([user("a?")], True),
        ([user("a?"), assistant("b"), user("c?")], True),
        ([{"role": "system", "content": "Be kind."}, user("a?")], True),
        *(
            ([user("a?"), assistant(nothing)], True)
            for nothing in ("", " \n", None, [], [{"type": "text", "text": ""}])
        ),
        ([user("a?"), assistant("b")], False),
    ],
)
def test_what_follows_the_last_question_is_asked(tmp_path: Path, turns: list[Any], is_asked: bool) -> None:
    """Where there is nothing yet; a place for an answer that holds none is nothing."""
    source = open_source(Spec(str(save_rows(tmp_path / "rows.jsonl", {"messages": turns}))))
    sample, asked = prompts_of(source).read(0)
    roles = [turn["role"] for turn in turns if turn["content"] and str(turn["content"]).strip()]
    roles = roles[:-1] if is_asked and roles[-1] == "assistant" else roles
    assert (asked, [message["role"] for message in sample.messages]) == (is_asked, roles)
    if is_asked:
        with pytest.raises(Rejected):
            source.read(0)


@pytest.mark.parametrize(
    ("turns", "code"),
    [
        ([assistant("b")], "role_order"),
        ([{"role": "system", "content": "Be kind."}], "role_order"),
        ([user("a?"), user("b?")], "role_order"),
        ([user("a?"), assistant(""), user("c?")], "answer_empty"),
        ([user(" ")], "question_empty"),
        ([user("<image>")], "marker_mismatch"),
        ([assistant("")], "role_order"),
    ],
)
def test_what_is_no_prompt_is_left_out(tmp_path: Path, turns: list[Any], code: str) -> None:
    source = open_source(Spec(str(save_rows(tmp_path / "rows.jsonl", {"messages": turns}))))
    with pytest.raises(Rejected) as reason:
        prompts_of(source).read(0)
    assert reason.value.code == code


def test_a_row_is_written_as_its_file_has_it(tmp_path: Path) -> None:
    """All of it, with the answer as the last turn, whatever stood in its place."""
    turns = [user([{"type": "image"}, {"type": "text", "text": "What?"}]), assistant("A cat."), user("Sure, ü?")]
    row = {"topic": {"is": [1, None]}, "messages": turns, "images": ["a.png"], "id": 7}
    (tmp_path / "a.png").write_bytes(picture(40, 30))
    rows = [row, row | {"messages": [*turns, assistant("")]}, row | {"messages": [*turns, assistant("Yes.")]}]
    source = open_source(Spec(str(save_rows(tmp_path / "rows.jsonl", *rows))))
    answered = row | {"messages": [*turns, ANSWER]}
    assert [prompts_of(source).written(number, ANSWER, tmp_path) for number in (0, 1)] == [answered, answered]
    assert prompts_of(source).written(2, None, tmp_path) == rows[2]
    assert prompts_of(source, replace=True).written(2, ANSWER, tmp_path) == answered
    assert list(answered)[0] != "id" and list(prompts_of(source).written(0, ANSWER, tmp_path))[0] == "id"
    nameless = open_source(Spec(str(save_rows(tmp_path / "nameless.jsonl", {"messages": [user("a?")]}))))
    assert prompts_of(nameless).written(0, ANSWER, tmp_path)["id"] == "nameless.jsonl:1"


def test_a_system_turn_comes_before_prompts_that_have_none(tmp_path: Path) -> None:
    """Rows that are not asked stay as they are."""
    own = {"role": "system", "content": "Be kind."}
    added = {"role": "system", "content": "Be brief."}
    rows = [[user("a?")], [own, user("a?")], [user("a?"), assistant("b")]]
    source = open_source(Spec(str(save_rows(tmp_path / "rows.jsonl", *({"messages": turns} for turns in rows)))))
    prompts = prompts_of(source, system="Be brief.")
    systems = [[m["content"] for m in prompts.read(i)[0].messages if m["role"] == "system"] for i in range(3)]
    assert systems == [[[{"type": "text", "text": "Be brief."}]], [[{"type": "text", "text": "Be kind."}]], []]
    written = [prompts.written(i, ANSWER if i < 2 else None, None)["messages"] for i in range(3)]
    assert written == [[added, *rows[0], ANSWER], [*rows[1], ANSWER], rows[2]]


def test_pictures_in_parquet_are_written_into_the_row(tmp_path: Path) -> None:
    """So are texts, numbers and truths beside the conversation; what JSON cannot say is not."""
    rows = [
        {
            "messages": [user("<image> What?"), assistant("")],
            "images": [{"bytes": picture(40, 30, i), "path": None}],
            "id": f"row {i}",
            "score": 0.5,
            "checksum": b"\0" * 16,
        }
        for i in range(2)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = open_source(Spec(str(tmp_path / "rows.parquet")), cache_dir=str(tmp_path / "cache"))
    written = [prompts_of(source).written(i, ANSWER, tmp_path) for i in range(2)]
    assert [{name: row[name] for name in ("id", "score")} for row in written] == [
        {"id": f"row {i}", "score": 0.5} for i in range(2)
    ]
    assert written[0].keys() == {"id", "score", "messages", "images"}
    again = open_source(Spec(str(save_rows(tmp_path / "out" / "rows.jsonl", *written))))
    for i in range(2):
        before, after = source.read(i, prompt=True), again.read(i)
        assert after.messages[:-1] == before.messages and shown(after) == shown(before)
        assert after.messages[-1]["cut"]


def test_parquet_of_texts_alone_is_written_as_it_is(tmp_path: Path) -> None:
    rows = [{"messages": [user("What?")], "topic": "cats"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = open_source(Spec(str(tmp_path / "rows.parquet")), cache_dir=str(tmp_path / "cache"))
    assert prompts_of(source).written(0, ANSWER, None) == {
        "id": "rows.parquet:1",
        "topic": "cats",
        "messages": [user("What?"), ANSWER],
    }


def test_paths_of_several_folders_lead_from_the_one_that_holds_them(tmp_path: Path) -> None:
    """Pictures in parts and in columns, relative and absolute."""
    specs = []
    for i, name in enumerate(("a", "b/c")):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        (folder / "x.png").write_bytes(picture(40, 30, i))
        path = "x.png" if i else str(folder / "x.png")
        rows = [
            {"messages": [user([{"type": "image"}, {"type": "text", "text": "What?"}])], "images": [path]},
            {"messages": [user([{"type": "image", "image": path}, {"type": "text", "text": "What?"}])], "note": i},
        ]
        specs.append(Spec(str(save_rows(folder / "rows.jsonl", *rows))))
    sources = open_sources(specs)
    root = common_root(sources)
    assert root == tmp_path / "data"
    prompts = prompts_of(*sources)
    written = [prompts.written(i, ANSWER, root) for i in range(4)]
    assert [row.get("note") for row in written] == [None, 0, None, 1]
    again = open_source(Spec(str(save_rows(tmp_path / "answers.jsonl", *written)), image_root=str(root)))
    for i in range(4):
        before, after = prompts.read(i)[0], again.read(i)
        assert after.messages[:-1] == before.messages and shown(after) == shown(before)


def test_no_folder_but_that_of_the_machine_holds_nothing(tmp_path: Path) -> None:
    """Data should not be allowed to read any file: pictures are written into the rows then."""

    (tmp_path / "x.png").write_bytes(picture(40, 30))
    row = {"messages": [user("<image> What?")], "images": ["x.png"]}
    source = open_source(Spec(str(save_rows(tmp_path / "rows.jsonl", row))))
    root = common_root([source, open_source(Spec(source.files[0].as_posix(), image_root="/usr"))])
    assert root is None
    [image] = prompts_of(source).written(0, ANSWER, root)["images"]
    assert image.startswith("data:image;base64,")


def test_rows_are_counted_through_all_sources(tmp_path: Path) -> None:
    sources = open_sources(
        [
            Spec(str(save_rows(tmp_path / f"{name}.jsonl", *({"messages": [user(f"{name}{i}?")]} for i in range(3)))))
            for name in "ab"
        ]
    )
    prompts = Prompts(tuple(sources), (2, 3))
    assert prompts.num_rows == 5
    assert [prompts.uid(i) for i in range(5)] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2", "b.jsonl:3"]
