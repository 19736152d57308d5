"""An answer that was cut is learnt word by word, and nobody learns to stop where it was cut."""

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import conversation, picture, tiny_config
from templates import HUB_MISTRAL
from test_chat import END, TEMPLATES, processor_with, supervised
from test_sources import Spec

from vlskv_ray.data.chat import Limits, encode
from vlskv_ray.data.rows import sample_of
from vlskv_ray.data.sample import Sample
from vlskv_ray.data.sources import open_source
from vlskv_ray.data.teacher_cache import content_key
from vlskv_ray.data.templates import render


def row(*cut: bool, images: int = 0) -> dict[str, Any]:
    """Two turns, of which some are cut."""
    messages = conversation("what is it?", "a blüe cat", "sure?", "yes and", images=images)
    for message, is_cut in zip(messages[1::2], cut, strict=True):
        message["finish_reason"] = "length" if is_cut else "stop"
    return {"messages": messages, "images": [f"data:image/png;base64,{PICTURE}"] * images}


PICTURE = base64.b64encode(picture(40, 50)).decode()


def learnt(row: dict[str, Any], processor: Any) -> list[str]:
    """The words and ends that are learnt of a row."""
    return supervised(encode(sample_of("x", row, None), processor, tiny_config(), Limits()), processor)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("images", [0, 1])
def test_the_end_of_a_cut_answer_is_not_learnt(template: str, images: int) -> None:
    """Of the last turn and of one before it, with every manner of chat; of the others it is."""
    processor = processor_with(template)
    end = END[template].strip()
    last = "</s>" if template == "vicuna" else end  # what is added to the last answer, where a template has no end
    first, second = learnt(row(False, False, images=images), processor)
    assert first.strip() == f"a blüe cat{end}" and second.rstrip().endswith(last)
    for cut_first in (False, True):
        for cut_second in (False, True):
            runs = learnt(row(cut_first, cut_second, images=images), processor)
            assert [run.strip() for run in runs] == [
                "a blüe cat" if cut_first else first.strip(),
                "yes and" if cut_second else second.strip(),
            ]


def test_where_a_template_changes_texts_too() -> None:
    """Then places are searched for; what the template itself writes before an answer may hold its words."""
    processor = processor_with("chatml")
    processor.chat_template = processor.chat_template.replace(
        "{{ part['text'] }}",
        "{{ part['text'] }}{{ '!' if 'b?' in part['text'] }}",
    )
    messages = conversation("a b?", "a")
    messages[1]["finish_reason"] = "length"
    assert not render(processor, messages).is_exact
    assert learnt({"messages": messages}, processor) == ["a"]
    processor.chat_template = HUB_MISTRAL
    assert [run.strip() for run in learnt(row(False, True), processor)] == ["a blüe cat</s>", "yes and"]


def test_it_is_another_sample_than_the_whole_answer() -> None:
    """For the teacher cache, which keeps what is made of each supervised token."""
    whole, cut = (sample_of("x", row(False, is_cut), None) for is_cut in (False, True))
    assert content_key(whole) != content_key(cut)
    assert content_key(whole) == content_key(
        Sample("x", conversation("what is it?", "a blüe cat", "sure?", "yes and"), [])
    )


def test_only_an_answer_can_be_cut() -> None:
    """Other reasons, and other turns, say nothing."""
    messages = conversation("a?", "b")
    messages[0]["finish_reason"], messages[1]["finish_reason"] = "length", None
    assert not any("cut" in message for message in sample_of("x", {"messages": messages}, None).messages)


def test_json_and_parquet_say_it_alike(tmp_path: Path) -> None:
    rows = [row(False, True), row(False, False)]
    for one in rows:
        del one["images"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        source = open_source(Spec(str(tmp_path / name)), cache_dir=str(tmp_path / "cache"))
        assert [source.read(i).messages[-1].get("cut") for i in range(2)] == [True, None], name
