"""Sources of rows: every row at random, every broken one by itself, every broken file named with its place."""

import base64
import glob
import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlskv_ray.data import json_files
from vlskv_ray.data.images import load_image
from vlskv_ray.data.sample import ImageFile, Refused, Rejected, Sample
from vlskv_ray.data.sources import Source, SourceError, open_source, open_sources


@dataclass(frozen=True)
class Spec:
    """The attributes of a source's config."""

    path: str | None = None
    name: str | None = None
    image_root: str | None = None
    format: str = "auto"
    weight: float = 1.0
    split: str = "train"
    revision: str | None = None
    num_samples: int | None = None
    ignore_columns: tuple[str, ...] = ()


def picture(colour: str, format: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format)
    return buffer.getvalue()


def chat(*turns: Any, **columns: Any) -> dict[str, Any]:
    """A row of turns, user and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)], **columns}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


IMAGE = {"type": "image"}
ROWS = [
    chat("What colour?", "Red.", image="red.png"),
    chat("One and one?", "Two."),
    chat("<image>\nand <image>: same?", "No — nein, ない.", images=["red.png", "sub/blue.jpg"]),
    chat([text("Colour?"), IMAGE], [text("Blue.")], "Sure?", "Yes.", images=["sub/blue.jpg"]),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "red.png").write_bytes(picture("red"))
    (tmp_path / "sub" / "blue.jpg").write_bytes(picture("blue", "JPEG", (64, 64)))
    (tmp_path / "green.webp").write_bytes(picture("green", "WEBP", (32, 90)))
    return tmp_path


def write(file: Path, content: str | bytes) -> Spec:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Spec(path=str(file))


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> Spec:
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    return Spec(path=str(file))


def outcomes(source: Source) -> list[Sample | str]:
    """Each row's sample, or the code for which it was rejected."""
    found: list[Sample | str] = []
    for row in range(source.num_rows):
        try:
            found.append(source.read(row))
        except Rejected as error:
            found.append(error.code)
    return found


def conversation(sample: Sample) -> list[tuple[str, Any]]:
    return [(m["role"], [part.get("text", "<image>") for part in m["content"]]) for m in sample.messages]


# --- Rows ---


def one(row: dict[str, Any], folder: Path) -> Sample:
    """The row between two good ones, which must stay unharmed."""
    source = open_source(write(folder / "rows.jsonl", lines([ROWS[1], row, ROWS[1]])))
    assert [source.read(i).uid for i in (0, 2)] == ["rows.jsonl:1", "rows.jsonl:3"]
    return source.read(1)


@pytest.mark.parametrize(
    ("row", "content"),
    [
        (chat("Colour?", "Red.", image="a.png"), ["<image>", "Colour?"]),
        (chat("<image>Colour?", "Red.", image="a.png"), ["<image>", "Colour?"]),
        (chat("Colour <image>\nhere?", "Red.", image=["a.png"]), ["Colour ", "<image>", "\nhere?"]),
        (chat("A<image><image>B", "Red.", images=["a.png", "b.png"]), ["A", "<image>", "<image>", "B"]),
        (chat("What is <image> in HTML?", "A tag."), ["What is <image> in HTML?"]),
        (chat("Hello?", "Hi.", image=""), ["Hello?"]),
        (chat("Hello?", "Hi.", image=None, images=[]), ["Hello?"]),
        (chat("Hello?", "Hi.", image={"bytes": None, "path": None}), ["Hello?"]),
        (chat([{"index": 0, "type": "image", "text": None}, text("x")], "Hi.", images=["a.png"]), ["<image>", "x"]),
        (chat("x", [{"index": None, "type": "text", "text": "Hi."}], score=float("nan")), ["x"]),
    ],
)
def test_images_find_their_place(row: dict[str, Any], content: list[str], folder: Path) -> None:
    """Markers count only in rows with images; images without markers come before the first question."""
    sample = one(row, folder)
    assert conversation(sample)[0] == ("user", content)
    assert len(sample.images) == sum(part["type"] == "image" for part in sample.messages[0]["content"])


def test_system_turn_stays_first_and_images_go_to_the_user(folder: Path) -> None:
    row = chat("Colour?", "Red.", image="a.png")
    row["messages"].insert(0, {"role": "system", "content": "Be brief. <image>"})
    assert conversation(one(row, folder))[:2] == [("system", ["Be brief. <image>"]), ("user", ["<image>", "Colour?"])]


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "words"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"messages": []}, "conv_empty"),
        ({"messages": None}, "conv_empty"),
        ({"other": 1}, "schema"),
        ({"messages": "text"}, "schema"),
        ({"messages": ["text"]}, "schema"),
        (chat("x", 5), "content_type"),
        (chat(float("nan"), "y"), "content_type"),
        (chat("x", {"text": "y"}), "content_type"),
        (chat([{"type": "text", "text": None}], "y"), "schema"),
        (chat(["x"], "y"), "schema"),
        (chat("x", [IMAGE, text("y")], image="a.png"), "schema"),
        (chat("x", "y", image=5), "schema"),
        (chat("x", "y", images=[["a.png"]]), "schema"),
        (turns("user"), "no_answer"),
        (turns("system", "user", "user"), "no_answer"),
        (chat("x", ""), "answer_empty"),
        (chat("x", None), "content_type"),
        (chat(None, "y"), "content_type"),
        (chat(None, "y", image="a.png"), "content_type"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "y"}]}, "content_type"),
        (chat("", "y"), "question_empty"),
        (chat(" \n", "y"), "question_empty"),
        (chat("\0", "y"), "question_empty"),
        (chat([], "y"), "question_empty"),
        (chat("x", "y", "", "z", image="a.png"), "question_empty"),
        (chat("x", "\0\x7f"), "answer_empty"),
        (chat("x", " \n"), "answer_empty"),
        (chat("x", []), "answer_empty"),
        (turns("assistant", "user"), "role_order"),
        (turns("user", "user", "assistant"), "role_order"),
        (turns("user", "assistant", "user"), "role_order"),
        (turns("user", "system", "assistant"), "role_order"),
        (turns("system", "assistant"), "role_order"),
        (turns("user", "narrator"), "role_unknown"),
        ({"messages": [{"content": "x"}]}, "role_unknown"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "role_unknown"),
        (chat("<image><image>x", "y", image="a.png"), "marker_mismatch"),
        (chat("<image>x", "y", images=["a.png", "b.png"]), "marker_mismatch"),
        (chat([IMAGE, text("x")], "y"), "marker_mismatch"),
    ],
)
def test_unusable_rows_are_rejected_and_their_neighbours_are_not(row: Any, code: str, folder: Path) -> None:
    with pytest.raises(Rejected) as caught:
        one(row, folder)
    assert caught.value.code == code, caught.value
    assert "\n" not in caught.value.detail


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"messages": [', "json_line"),
        (b"not json", "json_line"),
        (b"[1, 2]", "json_line"),
        (b"{} {}", "json_line"),
        (b'{"messages": ' + b"9" * 5000 + b"}", "json_line"),
        (b"[" * 100_000, "json_depth"),
        (json.dumps(ROWS[1]).encode()[:-1] + b', "a": 1, "a": 1}', "json_duplicate_key"),
        (json.dumps(ROWS[1]).replace('"content"', '"content": "Hello", "content"').encode(), "json_duplicate_key"),
        (b'{"\\ud800": 1, "\\ud800": 2}', "json_duplicate_key"),
        (
            b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}',
            "text_encoding",
        ),
    ],
)
def test_broken_line_is_one_rejected_row(line: bytes, code: str, folder: Path) -> None:
    """The line keeps its number, blank lines count as lines but not as rows, and line ends may be those of Windows."""
    good = json.dumps(ROWS[1]).encode()
    source = open_source(write(folder / "rows.jsonl", b"\n".join([good + b"\r", b"", line, good])))
    first, broken, last = outcomes(source)
    assert broken == code
    assert [source.uid(i) for i in range(3)] == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:4"]
    assert isinstance(first, Sample) and isinstance(last, Sample) and first.messages == last.messages
    if code.startswith("json"):
        with pytest.raises(Rejected, match=r"rows\.jsonl:3"):
            source.read(1)


# --- Files ---


def as_json(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, ensure_ascii=False)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.json", lines(ROWS)),
        ("a.json", as_json(ROWS)),
        ("a.jsonl", as_json(ROWS)),
        ("a.json", "\ufeff \n" + json.dumps(ROWS, indent=2) + " \n"),
        ("a.jsonl", "\ufeff" + lines(ROWS)),
        ("a.txt", as_json(ROWS)),
    ],
)
@pytest.mark.parametrize("window", [1, 50, 2**24])
def test_json_rows_at_random_equal_those_in_sequence(
    name: str, content: str, window: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines and lists, whatever the file is called, with or without a byte order mark, however it is read in pieces."""
    monkeypatch.setattr(json_files, "_WINDOW", window)
    source = open_source(write(folder / name, content))
    in_sequence = [source.read(row) for row in range(source.num_rows)]
    assert [source.read(row) for row in (2, 0, 3, 1)] == [in_sequence[row] for row in (2, 0, 3, 1)]
    assert [conversation(s)[-1][1][0] for s in in_sequence] == ["Red.", "Two.", "No — nein, ない.", "Yes."]
    assert source.num_images.tolist() == [1, 0, 2, 1] and source.num_images.dtype == np.int32
    assert source.text_bytes.tolist() == [16, 16, len("\nand : same?No — nein, ない.".encode()), 21]
    assert in_sequence[2].images == [ImageFile("red.png", folder), ImageFile("sub/blue.jpg", folder)]
    assert [load_image(image).size for image in in_sequence[2].images] == [(40, 30), (64, 64)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b"\n \n", "empty"),
        ("a.json", b"", "empty"),
        ("a.json", b"[]", "the list is empty"),
        ("a.json", b" [ \n]\n", "the list is empty"),
        ("a.json", as_json(ROWS).encode()[:-30], r"a\.json:1:\d+: "),
        ("a.json", json.dumps(ROWS, indent=1).encode()[:-2], r"a\.json:\d\d+:3: ',' or '\]' is missing"),
        ("a.json", as_json(ROWS)[:-1].encode() + b"\n,]", r"a\.json:2:2: no element between"),
        ("a.json", as_json(ROWS).encode() + b"\nmore", r"a\.json:2:1: something follows"),
        ("a.json", b"[" * 100_000, r"a\.json:1:2: brackets are nested too deep"),
        ("a.json", b'[{"a": ' + b"9" * 5000 + b"}]", r"a\.json:1:2: .*digits"),
        ("a.jsonl", lines(ROWS).encode("utf-16"), "not UTF-8 at byte offset 0"),
        ("a.json", as_json(ROWS).encode("utf-16-le"), "not UTF-8 at byte offset 0: looks like utf-16-le"),
        ("a.jsonl", b'{"messages": "\xe9t\xe9"}', "not UTF-8 at byte offset 14"),
        ("a.jsonl", lines(ROWS).encode() + "é".encode()[:1], "not UTF-8 at byte offset"),
        ("a.jsonl", b"nonsense\n{{{\n", r"no row of the file can be read; the first: .*a\.jsonl:1:1"),
        ("a.json", b'{\n"messages": []\n}', r"no row of the file can be read.*a\.json:1"),
        ("a.json", b"[1, 2]", "no row of the file can be read"),
        (
            "a.jsonl",
            lines([{"conversations": [], "id": 1}]).encode(),
            r":1: found the columns 'conversations', 'id'; want",
        ),
        ("a.txt", b"Dear all,", "wanted JSON lines, a JSON list or Parquet"),
        (
            "a.json",
            b'{\n "info": {},\n "data": [{"a": 1}, {}],\n "b": []\n}',
            r"'info', 'data' \(list of 2\), 'b' .*'data' as",
        ),
        (
            "a.json",
            b'\xef\xbb\xbf{\r\n "rows": [{}]}',
            r"keys 'rows' \(list of 1\); wanted a list of rows: save the list un",
        ),
        (
            "a.json",
            b'{"rows": [{"a": 1}], "more": 1}',
            r":1: holds one object with the keys 'rows' \(list of 1\), 'more'; w",
        ),
        (
            "a.jsonl",
            b'{"conversations": [{"from": "human"}]}\n{"conversations": [{"from": "human"}]}\n',
            r":1: found the columns 'conversations'; wanted messages",
        ),
        (
            "a.json",
            b'{\n "a": {"question": "x"},\n "b": {}\n}',
            "keys 'a', 'b'; wanted a list of rows: save its rows as a",
        ),
        (
            "a.jsonl",
            json.dumps(ROWS[1], indent=1).encode() * 2,
            r"a\.jsonl:1 begins an object over several lines; .*jq -c",
        ),
        ("a.jsonl", b"\x1f\x8b\x08" + bytes(20), r"is gzip; .*gunzip -k .*a\.jsonl"),
        ("a.tar.gz", b"\x1f\x8b\x08" + bytes(20), "is a packed tar archive; .*tar -xf"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(20), "is zstd; .*zstd -d"),
        ("a.bz2", b"BZh9" + bytes(20), "is bzip2; .*bunzip2"),
        ("a.xz", b"\xfd7zXZ\0" + bytes(20), "is xz; .*unxz"),
        ("a.parquet", b"PK\3\4" + bytes(20), "is a zip archive; .*unzip"),
        ("a.json", b"x" * 257 + b"ustar" + bytes(250), "is a tar archive; .*tar -xf .*WebDataset"),
        ("a.csv", b"question,answer\n1,2\n", "is CSV; .*write its rows as JSON lines or Parquet"),
        ("a.TSV", b"question\tanswer\n", "is TSV; .*write its rows"),
        ("a.arrow", b"ARROW1\0\0", "is an Arrow file; .*as Parquet"),
        ("a.db", b"SQLite format 3\0", "is an SQLite database"),
        ("a.json", pickle.dumps(ROWS), "is a pickle; .*it can run code and is never opened"),
        ("a.png", b"\x89PNG\r\n", "is PNG; .*wanted the file of rows that names it"),
        ("a.json", b"<!DOCTYPE html><html>", "is a web page; .*error page"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS; .*git lfs pull"),
        ("a.parquet", b"", "the file is empty"),
        ("a.parquet", b"PAR1 and not much more", "cannot be read as Parquet"),
    ],
)
def test_unusable_files_are_errors_with_file_and_place(name: str, content: bytes, message: str, folder: Path) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        open_source(write(folder / name, content))
    assert str(folder / name) in str(caught.value)


def test_list_is_read_to_the_end_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the list is found even if the list fills a window exactly."""
    content = as_json(ROWS)
    monkeypatch.setattr(json_files, "_WINDOW", len(content))
    assert open_source(write(folder / "a.json", content)).num_rows == 4
    with pytest.raises(SourceError, match=r"a\.json:1:\d+: something follows"):
        open_source(write(folder / "a.json", content + "more"))


def test_encoding_error_is_placed_across_chunks(folder: Path) -> None:
    """A character that is cut by the reading of chunks is none; the offset counts from the start of the file."""
    good = b" " * (2**20 - 1) + "é".encode() + b" " * 2**20
    with pytest.raises(SourceError, match=f"byte offset {len(good)}"):
        open_source(write(folder / "a.jsonl", good + b"\xff"))
    with pytest.raises(SourceError, match=f"byte offset {2**20 - 1}"):
        open_source(write(folder / "a.jsonl", b" " * (2**20 - 1) + "é".encode()[:1] + b"a"))


def test_given_format_wins_over_content(folder: Path) -> None:
    spec = write(folder / "a.json", as_json(ROWS))
    with pytest.raises(SourceError, match="no row of the file"):
        open_source(Spec(path=spec.path, format="jsonl"))
    with pytest.raises(SourceError, match=r"a\.jsonl:1:1: no list begins here"):
        open_source(Spec(path=write(folder / "a.jsonl", lines(ROWS)).path, format="json"))


@pytest.mark.parametrize("path", ["missing.jsonl", "missing*.jsonl", ""])
def test_no_match_and_folders_are_errors(path: str, folder: Path) -> None:
    with pytest.raises(SourceError, match="no such file|no file matches|is a folder; name its files"):
        open_source(Spec(path=str(folder / path)))


def test_glob_is_one_source_with_files_in_its_uids(folder: Path) -> None:
    """Lines and lists may mix; image paths are relative to each file's own folder."""
    write(folder / "sub" / "b.json", as_json(ROWS[2:]))
    write(folder / "a.jsonl", lines(ROWS[:2]))
    source = open_source(Spec(path=str(folder / "**" / "*.json*"), weight=2.5))
    assert [source.uid(row) for row in range(4)] == [
        f"*.json*:{at}" for at in ("a.jsonl:1", "a.jsonl:2", "sub/b.json:1", "sub/b.json:2")
    ]
    assert (source.weight, source.num_rows) == (2.5, 4)
    assert source.read(3).images == [ImageFile("sub/blue.jpg", folder / "sub")]
    with pytest.raises(SourceError, match="Parquet and JSON"):
        write_parquet(folder / "c.parquet", ROWS[1:2])
        open_source(Spec(path=str(folder / "*.*[lt]")))


def test_image_root_is_where_paths_begin(folder: Path) -> None:
    spec = write(folder / "a.jsonl", lines([chat("x", "y", image="blue.jpg")]))
    source = open_source(Spec(path=spec.path, image_root=str(folder / "sub")))
    assert load_image(source.read(0).images[0]).size == (64, 64)


def test_sources_of_one_file_name_are_told_apart(folder: Path) -> None:
    paths = [folder / place / "train.jsonl" for place in ("x/a", "y/a", "z")] + [folder / "other.jsonl"]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, lines(ROWS))
    names = [source.name for source in open_sources([Spec(path=str(path)) for path in paths])]
    assert names == ["x/a/train.jsonl", "y/a/train.jsonl", "z/train.jsonl", "other.jsonl"]
    with pytest.raises(SourceError, match="listed 2 times"):
        open_sources([Spec(path=str(paths[0]))] * 2)


def test_num_samples_takes_the_first_rows(folder: Path) -> None:
    specs = [
        write(folder / "a.jsonl", lines(ROWS)),
        write(folder / "a.json", as_json(ROWS)),
        write_parquet(folder / "a.parquet", [chat("x", str(i)) for i in range(4)]),
    ]
    for spec in specs:
        for count, expected in ((2, 2), (9, 4)):
            source = open_source(Spec(path=spec.path, num_samples=count), cache_dir=str(folder / "cache"))
            assert source.num_rows == len(source.num_images) == len(source.text_bytes) == expected


# --- Parquet and the hub ---


def test_parquet_rows_equal_what_was_written(folder: Path) -> None:
    """Images as {bytes, path}, as a path, or absent; the estimates come without reading them."""
    rows = [
        chat([text("Colour?"), IMAGE, IMAGE], [text("Red.")], images=[{"bytes": picture("red"), "path": "x"}] * 2),
        chat([text("Hello?")], [text("Hällo.")], images=[]),
        chat([text("Hello?")], [text("Hallo.")], images=None),
        chat([text("Colour?")], [text("Blue.")], images=[{"bytes": None, "path": "sub/blue.jpg"}]),
    ]
    source = open_source(write_parquet(folder / "a[1].parquet", rows), cache_dir=str(folder / "cache"))
    samples = [source.read(row) for row in range(4)]
    assert [source.read(row) for row in (3, 1)] == [samples[3], samples[1]]
    assert [sample.uid for sample in samples] == [f"a[1].parquet:{row}" for row in (1, 2, 3, 4)]
    assert samples[0].images == [picture("red")] * 2
    assert samples[3].images == [ImageFile("sub/blue.jpg", folder)]
    assert load_image(samples[3].images[0]).size == (64, 64)
    assert source.num_images.tolist() == [2, 0, 0, 1] and source.num_images.dtype == np.int32
    assert source.text_bytes[1] == source.text_bytes[2] + 1 == len("userassistanttexttextHello?Hällo.".encode())


@pytest.mark.parametrize("column", ["image", "images"])
def test_no_path_or_url_of_a_parquet_row_is_opened_by_the_library(column: str, folder: Path) -> None:
    """`datasets` by itself opens whatever an Image column names; here it only becomes a confined reference."""
    names = ["/etc/hostname", "http://127.0.0.1:9/a.png", "red.png"]
    cells: list[Any] = [{"bytes": None, "path": name} for name in names] + [{"bytes": picture("red"), "path": None}]
    feature: Any = datasets.Image()
    rows = [chat("x", "y") | {column: cell if column == "image" else [cell]} for cell in cells]
    schema = {"messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}]}
    features = datasets.Features({**schema, column: feature if column == "image" else datasets.List(feature)})
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), folder / "a.parquet")

    source = open_source(Spec(path=str(folder / "a.parquet")), cache_dir=str(folder / "cache"))
    assert source.num_images.tolist() == [1, 1, 1, 1]
    images = [source.read(row).images[0] for row in range(4)]
    for image, code in zip(images[:2], ("path_outside_root", "remote_image"), strict=True):
        with pytest.raises(Refused, match=code):
            load_image(image)
    assert [load_image(image).getpixel((0, 0)) for image in images[2:]] == [(255, 0, 0)] * 2


def test_parquet_with_mixed_content_is_decoded(folder: Path) -> None:
    """`datasets` stores content that is text here and a list there as JSON."""
    rows = [chat("x", "y", images=[picture("red")]), chat([text("x")], [text("y")], images=[])]
    written = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    written.to_parquet(folder / "a.parquet")
    source = open_source(Spec(path=str(folder / "a.parquet")), cache_dir=str(folder / "cache"))
    assert [conversation(source.read(row))[1] for row in (0, 1)] == [("assistant", ["y"])] * 2


def test_damaged_and_dangerous_parquet_files_are_named(folder: Path) -> None:
    good = write_parquet(folder / "a.parquet", [chat("x", f"{i**9}") for i in range(99)])
    content = (folder / "a.parquet").read_bytes()
    pattern, cache_dir = Spec(path=str(folder / "*.parquet")), str(folder / "cache")
    write(folder / "b.parquet", content[:-20])
    with pytest.raises(SourceError, match=r"b\.parquet: cannot be read as Parquet"):
        open_source(pattern, cache_dir=cache_dir)
    write_parquet(folder / "b.parquet", [{"question": "x"}])
    with pytest.raises(SourceError, match=r"b\.parquet: found the columns 'question'; wanted messages"):
        open_source(pattern, cache_dir=cache_dir)
    write(folder / "b.parquet", content[:100] + bytes(900) + content[1000:])
    with pytest.raises(SourceError, match=r"b\.parquet: cannot be read as Parquet: .*damaged"):
        open_source(pattern, cache_dir=cache_dir)
    tensor = pa.field("t", pa.binary(), metadata={"ARROW:extension:name": "ray.data.arrow_tensor_v2"})
    pq.write_table(pa.Table.from_pylist([chat("x", "y")]).append_column(tensor, pa.array([b"x"])), folder / "b.parquet")
    with pytest.raises(SourceError, match=r"b\.parquet: holds Ray tensor columns"):
        open_source(pattern, cache_dir=cache_dir)
    assert open_source(good, cache_dir=cache_dir).num_rows == 99


@pytest.mark.parametrize("padding", range(6))
def test_ray_tensor_columns_are_refused_before_arrow_builds_their_type(
    folder: Path, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the process has imported ray.data, whose types Arrow builds as soon as it opens a file."""
    import ray.data.extensions

    built = []
    monkeypatch.setattr(
        ray.data.extensions.ArrowTensorTypeV2, "__arrow_ext_deserialize__", lambda *args: built.append(args)
    )
    name = {b"ARROW:extension:name": b"ray.data.arrow_tensor_v2", b"padding": b"x" * padding}
    table = pa.Table.from_pylist([chat("x", "y")])
    pq.write_table(
        table.append_column(pa.field("t", pa.binary(), metadata=name), pa.array([b"x"])), folder / "a.parquet"
    )
    with pytest.raises(SourceError, match=r"a\.parquet: holds Ray tensor columns"):
        open_source(Spec(path=str(folder / "a.parquet")), cache_dir=str(folder / "cache"))
    assert not built


def test_parquet_that_only_speaks_of_ray_is_opened(folder: Path) -> None:
    """In base64 among the answers, in the schema's own metadata."""
    table = pa.Table.from_pylist([chat("x", base64.b64encode(b"made by ray.data.arrow_tensor").decode())])
    table = table.replace_schema_metadata({"note": "made with ray.data.write_parquet, ray.data.arrow"})
    pq.write_table(table, folder / "a.parquet")
    assert open_source(Spec(path=str(folder / "a.parquet")), cache_dir=str(folder / "cache")).num_rows == 1


def test_hub_data_set_out_of_reach_is_an_error_that_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="some/where, split 'test': .*set path to them"):
        open_source(Spec(name="some/where", split="test"), cache_dir=str(folder / "cache"))


# --- Parquet files that differ, and rows that are damaged ---


def test_files_of_other_columns_are_one_source(folder: Path) -> None:
    """Lists that are empty in one file, a column that is not there, content that is text here and parts there."""
    tables = {
        "a": [chat("x", "1", images=[]), chat("x", "2", images=[])],
        "b": [chat("<image>x", "3", images=[{"bytes": picture("red"), "path": None}])],
        "c": [chat("x", "4")],
        "d": [chat([text("x")], [text("5")]), chat([text("x")], [text("6")])],
        "e": [chat("x", "7", images=[]), chat("x", "8", images=[])],
    }
    for name, rows in tables.items():
        write_parquet(folder / f"{name}.parquet", rows)
    for count in (None, 7, 6, 3):
        source = open_source(Spec(path=str(folder / "*.parquet"), num_samples=count), cache_dir=str(folder / "cache"))
        answers = [conversation(source.read(row))[1][1] for row in range(source.num_rows)]
        assert answers == [[str(n)] for n in range(1, (count or 8) + 1)]
        assert source.num_images.tolist() == [0, 0, 1, 0, 0, 0, 0, 0][:count]
        of_file = [
            "a.parquet:1",
            "a.parquet:2",
            "b.parquet:1",
            "c.parquet:1",
            "d.parquet:1",
            "d.parquet:2",
            "e.parquet:1",
        ]
        assert [source.uid(row) for row in range(min(source.num_rows, 7))] == [f"*.parquet:{at}" for at in of_file][
            :count
        ]
    copy: Source = pickle.loads(pickle.dumps(source))
    assert outcomes(copy) == outcomes(source)
    write_parquet(folder / "f.parquet", [chat("x", "9", picture="a.png")])
    with pytest.raises(SourceError, match=r"f\.parquet: 'picture' \(row 1\) looks like a picture and is not read"):
        open_source(Spec(path=str(folder / "*.parquet")), cache_dir=str(folder / "cache"))


def test_a_string_that_is_not_utf_8_costs_its_row(folder: Path) -> None:
    """Arrow takes any bytes for a string until one is read."""
    rows = [chat("x", "before"), chat("x", "QQQQ"), chat("x", "after")]
    write_parquet(folder / "a.parquet", rows)
    plain = pa.Table.from_pylist(rows)
    pq.write_table(plain, folder / "b.parquet", compression="none", use_dictionary=False, write_statistics=False)
    content = (folder / "b.parquet").read_bytes()
    assert content.count(b"QQQQ") == 1
    write(folder / "b.parquet", content.replace(b"QQQQ", b"Q\xff\xfeQ"))
    source = open_source(Spec(path=str(folder / "*.parquet")), cache_dir=str(folder / "cache"))
    found = outcomes(source)
    assert [found[row] for row in range(6) if not isinstance(found[row], Sample)] == ["text_encoding"]
    assert source.uid(4) == "*.parquet:b.parquet:2"
    with pytest.raises(Rejected, match="a text is not UTF-8: invalid start byte at its byte 1"):
        source.read(4)


def test_a_row_that_arrow_cannot_make_sense_of_costs_itself(folder: Path) -> None:
    """JSON in a column that says it is JSON, and a time beyond all calendars."""
    rows = [chat("x", "y", images=[picture("red")]), chat([text("x")], "QQQQ", images=[])]
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(folder / "a.parquet")
    plain: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pq.read_table(folder / "a.parquet"), folder / "a.parquet", **plain)
    content = (folder / "a.parquet").read_bytes()
    assert content.count(b'"QQQQ"') == 1
    write(folder / "a.parquet", content.replace(b'"QQQQ"', b"{QQQQ{"))
    source = open_source(Spec(path=str(folder / "a.parquet")), cache_dir=str(folder / "cache"))
    good, bad = outcomes(source)
    assert isinstance(good, Sample) and bad == "row_unreadable"
    times = pa.table({"messages": pa.array([[2**62], [0]], type=pa.list_(pa.timestamp("us")))})
    pq.write_table(times, folder / "b.parquet")
    assert outcomes(open_source(Spec(path=str(folder / "b.parquet")), cache_dir=str(folder / "cache"))) == [
        "row_unreadable",
        "schema",
    ]


@pytest.mark.parametrize(
    "metadata",
    [b"{", b"null", b"\xff\xfe", b"[" * 10**5, b'{"info": 5}', b'{"info": {"features": [1]}}']
    + [json.dumps({"info": {"features": {"messages": {"_type": kind, "languages": 5}}}}).encode()
       for kind in ("Nothing", "Translation")],
)  # fmt: skip
def test_metadata_that_make_no_sense_are_one_line(metadata: bytes, folder: Path) -> None:
    table = pa.Table.from_pylist([chat("x", "y")]).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, folder / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet") as caught:
        open_source(Spec(path=str(folder / "a.parquet")), cache_dir=str(folder / "cache"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_any_byte_of_a_parquet_file_may_be_wrong(folder: Path) -> None:
    """Its rows are read or have a reason, or the file is named in one line."""
    rows = [chat(f"{i}", "y", images=[{"bytes": b"x", "path": None}]) for i in range(20)]
    write_parquet(folder / "a.parquet", rows)
    content = (folder / "a.parquet").read_bytes()
    rng = np.random.default_rng(0)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for number in range(24):
        damaged = bytearray(content)
        for at in rng.integers(*((4, footer) if number % 3 == 0 else (footer, len(content))), 3):
            damaged[at] = rng.integers(256)
        spec = write(folder / f"b{number}.parquet", bytes(damaged))
        try:
            outcomes(open_source(spec, cache_dir=str(folder / "cache")))
        except SourceError as error:
            assert f"b{number}.parquet" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("feature", [datasets.Audio(), datasets.Video(), datasets.Pdf(), datasets.Nifti()])
def test_no_feature_opens_what_a_row_names(feature: Any, folder: Path) -> None:
    """Whatever a file says that its column of images is, a path in it is a confined reference."""
    schema = {"messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}], "image": feature}
    rows = [chat("x", "y", image={"bytes": None, "path": name}) for name in ("/etc/hostname", "red.png")]
    arrow = datasets.Features(schema).arrow_schema
    pq.write_table(pa.Table.from_pylist(rows, schema=arrow), folder / "a.parquet")
    source = open_source(Spec(path=str(folder / "a.parquet")), cache_dir=str(folder / "cache"))
    assert [source.read(row).images for row in (0, 1)] == [
        [ImageFile("/etc/hostname", folder)],
        [ImageFile("red.png", folder)],
    ]


# --- Pickling ---


def test_pickled_sources_read_the_same(folder: Path) -> None:
    """Sources travel to workers; what travels is file names and indices, never content."""
    rows = [chat("Colour?", "Red.", images=[picture("red", size=(640, 480))]) for _ in range(20)]
    write(folder / "a.jsonl", lines(ROWS * 50))
    write_parquet(folder / "b.parquet", rows)
    specs = [Spec(path=str(folder / name), num_samples=15) for name in ("a.jsonl", "b.parquet")]
    for source in open_sources(specs, cache_dir=str(folder / "cache")):
        pickled = pickle.dumps(source)
        copy: Source = pickle.loads(pickled)
        assert len(pickled) < 8000
        assert (copy.name, copy.weight, copy.num_rows) == (source.name, source.weight, 15)
        assert outcomes(copy) == outcomes(source)


def test_glob_characters_in_file_names_are_literal(folder: Path) -> None:
    (folder / "a*").mkdir()
    spec = write(folder / "a*" / "[b].jsonl", lines(ROWS))
    assert glob.has_magic(str(spec.path)) and open_source(spec).num_rows == 4


# --------------------------------------------------------------------------------------------- columns beside the rows
def beside(folder: Path, name: str, array: Any) -> Path:
    """A Parquet file of one row that has another column beside its messages."""
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}]
    pq.write_table(pa.table({"messages": pa.array([messages]), name: array}), folder / "x.parquet")
    return folder / "x.parquet"


def opened_with(path: Path, *ignored: str) -> Source:
    return open_source(Spec(path=str(path), ignore_columns=ignored), cache_dir=str(path.parent / "cache"))


@pytest.mark.parametrize("kind", [pa.string(), pa.string_view(), pa.binary_view()])
def test_pictures_of_any_text_type_are_seen(tmp_path: Path, kind: Any) -> None:
    path = beside(tmp_path, "imgs", pa.array(["a.png"], pa.string()).cast(kind))
    with pytest.raises(SourceError, match="'imgs' .* looks like a picture"):
        opened_with(path)
    path = beside(tmp_path, "image", pa.array(["a.png"], pa.string()).cast(kind))
    assert opened_with(path).num_images.tolist() == [1]


def test_a_column_of_an_unknown_type_is_named_and_can_be_ignored(tmp_path: Path) -> None:
    path = beside(tmp_path, "metadata", pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())))
    with pytest.raises(SourceError, match=r"'metadata' is of a type that is not read, map<.*ignore_columns"):
        opened_with(path)
    assert opened_with(path, "metadata").read(0).messages[1]["content"] == [{"type": "text", "text": "a cat"}]


def test_questions_and_digests_are_no_pictures(tmp_path: Path) -> None:
    opened_with(beside(tmp_path, "sha256", pa.array([b"\x01" * 32])))
    opened_with(beside(tmp_path, "question", pa.array(["What is in img.png? Say it."])))
    with pytest.raises(SourceError, match="'url' .* looks like a picture"):
        opened_with(beside(tmp_path, "url", pa.array(["https://a.b/c.png?size=3"])))


def test_a_byte_order_mark_within_json_lines_is_no_text(tmp_path: Path) -> None:
    """As files have it that were put behind one another."""
    line = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ufeffb"}]})
    (tmp_path / "x.jsonl").write_text(f"{line}\n\ufeff{line}\n", encoding="utf-8")
    source = open_source(Spec(path=str(tmp_path / "x.jsonl")))
    assert source.read(1).messages == source.read(0).messages
