"""What a row means: where its pictures are, that none is missing unseen, and that its texts are texts."""

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture

from vlskv_ray.config import SourceConfig
from vlskv_ray.data.images import load_image
from vlskv_ray.data.rows import sample_of
from vlskv_ray.data.sample import ImageFile, Notice, Refused, Rejected, Sample, SourceError
from vlskv_ray.data.sources import open_source

PNG = picture(40, 30)
BASE64 = base64.b64encode(PNG).decode()
IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def chat(question: Any, answer: Any = "A cat.", **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **columns}


def rejection(row: dict[str, Any]) -> Rejected:
    with pytest.raises(Rejected) as caught:
        sample_of("x", row, None)
    assert "\n" not in caught.value.detail
    return caught.value


def question(sample: Sample) -> list[str]:
    return [part.get("text", "<image>") for part in sample.messages[0]["content"]]


# --- Pictures that are missing ---


@pytest.mark.parametrize(
    "row",
    [
        chat([IMAGE, text("What?")], images=[None]),
        chat("What is shown?", images=[None]),
        chat("<image>What?", images=["a.png", None]),
        chat("<image><image>What?", images=["a.png", None]),
        chat("<image>What?", images=["", "a.png"]),
        chat("What?", images=[{"bytes": None, "path": None}]),
        chat("What?", images=[{"bytes": None, "path": ""}]),
        chat("<image>What?", image=None),
        chat("<image>What?", image=""),
        chat("<image>What?", image=b""),
        chat("What?<image>", images=None),
        chat([IMAGE, text("What?")], image=None),
        chat([IMAGE, text("What?")], image={"bytes": None, "path": None}),
        chat([{"type": "image", "image": None}, text("What?")]),
        chat([{"type": "image_url", "image_url": {"url": None}}, text("What?")]),
    ],
)
def test_a_picture_that_is_null_is_none(row: dict[str, Any]) -> None:
    """Whether there is a marker or not, in a column or in a part: the row is about what it does not have."""
    assert rejection(row).code == "image_null"


@pytest.mark.parametrize("columns", [{}, {"images": []}, {"image": None}, {"image": ""}, {"images": None}])
def test_text_rows_may_say_in_any_way_that_they_have_no_picture(columns: dict[str, Any]) -> None:
    sample = sample_of("x", chat("What is <image> in HTML?", **columns), None)
    assert question(sample) == ["What is <image> in HTML?"] and not sample.images


@pytest.mark.parametrize("words", ["<image>\nWhat?", "What?\n<image> ", "<image>", "<image> and <image> again"])
def test_a_marker_at_an_end_of_a_question_misses_its_picture(words: str) -> None:
    """There data sets put it; where the characters are meant, a typed part says so."""
    reason = rejection(chat(words))
    assert reason.code == "marker_mismatch" and "{type: text, text: ...}" in reason.detail
    assert question(sample_of("x", chat([text(words)]), None)) == [words]
    assert sample_of("x", chat("Hello?", words), None).messages[1]["content"] == [text(words)]


# --- Pictures in parts ---


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png", "text": None},
        {"type": "image", "url": "a.png"},
        {"type": "image", "image": {"bytes": None, "path": "a.png"}},
        {"type": "image", "image": PNG},
        {"type": "image", "bytes": PNG, "path": "a.png"},
        {"type": "image", "base64": BASE64},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}", "detail": "low"}},
        {"type": "image_url", "image_url": f"data:image/png;base64,{BASE64}"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
    ],
)
def test_pictures_are_read_from_parts(part: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    sample = sample_of("x", chat([text("Left:"), part, text("right?")]), tmp_path)
    assert question(sample) == ["Left:", "<image>", "right?"]
    assert [load_image(image).tobytes() for image in sample.images] == [load_image(PNG).tobytes()]


def test_pictures_of_parts_come_in_their_order(tmp_path: Path) -> None:
    """Over several turns; and a string's marker counts, since the row has pictures."""
    row = chat([{"type": "image", "image": "a.png"}, text("This?")])
    row["messages"] += chat([{"type": "image", "image": "b.png"}])["messages"]
    assert sample_of("x", row, tmp_path).images == [ImageFile("a.png", tmp_path), ImageFile("b.png", tmp_path)]
    row["messages"] += chat("<image>And this?")["messages"]
    assert rejection(row).code == "marker_mismatch"


def test_pictures_are_given_in_one_place() -> None:
    part = {"type": "image", "image": "a.png"}
    assert "in one of the two" in rejection(chat([part], images=["b.png"])).detail
    assert rejection(chat([part], images=["b.png"])).code == "marker_mismatch"
    assert len(sample_of("x", chat([part], images=["a.png"]), None).images) == 1
    assert rejection(chat([part, IMAGE])).code == "marker_mismatch"
    assert rejection(chat([{"type": "image", "image": "a.png", "source": {"data": BASE64}}])).code == "schema"
    assert rejection(chat("What?", images=["a.png"], image="b.png")).code == "schema"
    assert len(sample_of("x", chat("What?", images=["a.png"], image="a.png"), None).images) == 1


def test_a_url_in_a_part_is_refused_as_everywhere() -> None:
    row = chat([{"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}])
    with pytest.raises(Refused, match="remote_image"):
        load_image(sample_of("x", row, None).images[0])


BASE64_URI = f"data:image/png;base64,{BASE64}"


# --- Columns and keys that nothing reads ---


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        columns = dict.fromkeys(column for row in rows for column in row)
        pq.write_table(pa.Table.from_pylist([columns | row for row in rows]), file)


def opened(file: Path, **options: Any) -> Any:
    return open_source(SourceConfig(path=str(file), **options), cache_dir=str(file.parent / "cache"))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("imgs", ["g.png"]),
        ("image_path", "g"),
        ("image_file", "g.png"),
        ("imageUrl", "http://x/y"),
        ("picture", BASE64),
        ("photo", {"bytes": None, "path": "g.png"}),
        ("file_name", "train/G.JPG"),
        ("source", "https://example.org/a.jpeg?size=2"),
        ("anything", f"data:image/png;base64,{BASE64}"),
        ("anything", [["g.png"]]),
        ("anything", [{"url": "g.webp"}]),
    ],
)
def test_columns_that_look_like_pictures_are_named(suffix: str, name: str, value: Any, tmp_path: Path) -> None:
    """In the middle of a source, among text rows; none is trained as text, unless the user says what it is."""
    file = tmp_path / f"rows.{suffix}"
    write(file, [chat("Hello?"), chat("What is shown?", **{name: value}), chat("Hello?")])
    with pytest.raises(SourceError) as caught:
        opened(file)
    message = str(caught.value)
    assert "rows." in message and repr(name) in message and "2" in message and "ignore_columns" in message
    assert "\n" not in message
    assert question(opened(file, ignore_columns=(name,)).read(1)) == ["What is shown?"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_all_such_columns_are_named_at_once(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / f"a.{suffix}", [chat("A?", imgs=["g.png"], photo=None), chat("B?", imgs=[], photo="h.png")])
    with pytest.raises(SourceError, match=r"'imgs'.*'photo'.*look like pictures and are not read"):
        opened(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_keys_of_turns_that_look_like_pictures_are_named(suffix: str, tmp_path: Path) -> None:
    row = chat("What is shown?")
    for turn in row["messages"]:
        turn["image"] = "g.png" if turn["role"] == "user" else None
    write(tmp_path / f"a.{suffix}", [chat("Hello?"), row])
    with pytest.raises(SourceError, match=r"'messages\.image'.*is not read"):
        opened(tmp_path / f"a.{suffix}")
    assert opened(tmp_path / f"a.{suffix}", ignore_columns=("messages.image",)).num_rows == 2


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_columns_about_pictures_are_none(suffix: str, tmp_path: Path) -> None:
    about = {
        "image_id": 7,
        "image_size": [3, 4],
        "num_images": 0,
        "image_caption": "a cat",
        "image_url": None,
        "images_note": "",
        "id": "coco/0007.jpg",
        "score": 0.5,
        "tags": ["a", "b"],
    }
    write(tmp_path / f"a.{suffix}", [chat("Hello?", **about)] * 2)
    assert opened(tmp_path / f"a.{suffix}").read(1).uid == f"a.{suffix}:2"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_where_a_rows_pictures_come_from_is_no_picture(suffix: str, tmp_path: Path) -> None:
    """A text that only ends as a file's name, in a row that has its pictures; under a picture's name it is one."""
    came_from = {"file_name": "COCO_0007.jpg", "url": "http://x/a.jpg", "metadata": {"url": "http://x/b.png"}}
    row = chat("<image>What?", images=["g.png"])
    write(tmp_path / f"a.{suffix}", [row | came_from] * 2)
    assert len(opened(tmp_path / f"a.{suffix}").read(1).images) == 1
    for name, value in {"image2": "h.png", "imgs": ["h.png"], "other": BASE64_URI}.items():
        write(tmp_path / f"{name}.{suffix}", [row | {name: value}])
        with pytest.raises(SourceError, match=f"'{name}'.* looks like a picture and is not read"):
            opened(tmp_path / f"{name}.{suffix}")


def test_a_marker_in_a_text_part_beside_images_without_parts_is_told() -> None:
    """As rows have it that were brought from plain text into parts: neither read as an image nor learnt as text."""
    for text in ("<image>\nWhat?", "What? <image>"):
        reason = rejection(chat([{"type": "text", "text": text}], images=["a.png"]))
        assert reason.code == "marker_mismatch" and "write {type: image} parts" in reason.detail
    part = {"type": "text", "text": "What does <image> mean in it?"}
    assert len(sample_of("x", chat([part], images=["a.png"]), None).images) == 1
    assert len(sample_of("x", chat([IMAGE, {"type": "text", "text": "<image>"}], images=["a.png"]), None).images) == 1


def test_pictures_beyond_the_first_rows_of_a_file_are_seen(tmp_path: Path) -> None:
    """Parquet is looked at by its columns: where the first rows are empty, the first filled ones count."""
    rows = [chat("Hello?", photo=None) for _ in range(30)] + [chat("What?", photo=PNG)]
    write(tmp_path / "a.parquet", rows)
    with pytest.raises(SourceError, match=r"'photo' \(row 31\)"):
        opened(tmp_path / "a.parquet")
    assert opened(tmp_path / "a.parquet", num_samples=30).num_rows == 30


def test_a_picture_in_a_text_part_is_not_overlooked() -> None:
    assert rejection(chat([{"type": "text", "text": "What?", "image": "g.png"}])).code == "image_unread"
    assert rejection(chat([{"type": "image", "file": "g.png"}], images=["a.png"])).code == "image_unread"


# --- Texts ---


def test_control_characters_are_taken_out_and_told() -> None:
    """C0 but for tab and line ends, DEL, C1 and what is no character; those that end lines become one."""
    row = chat("a\0b\x1b[0m\x7f\x9c\ufffe\uffff\ufdd0\tc\r\nd\x0ce\x85f", [text("A\x08 cät 🐈 \u200d\xa0.")])
    sample = sample_of("x", row, None)
    assert question(sample) == ["ab[0m\tc\r\nd\ne\nf"]
    assert sample.messages[1]["content"] == [text("A cät 🐈 \u200d\xa0.")]
    [notice] = sample.notices
    assert notice == Notice(
        "control_characters", "10 control characters taken out of its text (U+0000, U+0008, U+000C, U+001B, U+007F)"
    )
    assert sample_of("x", chat("a\n\tb é"), None).notices == ()


def test_base64_in_a_text_is_named() -> None:
    """A picture among the words, not an example of a few letters in an answer about HTML."""
    assert rejection(chat(f"What is this? data:image/png;base64,{BASE64}")).code == "text_base64"
    assert rejection(chat(BASE64)).code == "text_base64"
    assert sample_of("x", chat("Write it as <img src='data:image/gif;base64,R0lGODlhAQABAIAAAAAA'>"), None).images == []


def test_what_a_row_says_twice_is_quickly_told() -> None:
    """Of an object of very many keys too; the error names the key."""
    from vlskv_ray.data.json_files import _parse_row

    pairs = ", ".join(f'"k{i}": 0' for i in range(50_000))
    with pytest.raises(Rejected, match=r"json_duplicate_key: a\.jsonl:3: the key 'k49999' is given twice"):
        _parse_row(f'{{{pairs}, "k49999": 1}}'.encode(), Path("a.jsonl"), 3)
