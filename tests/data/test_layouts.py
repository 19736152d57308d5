"""A further layout is registered, and nothing else: every reader and every check takes it from its declaration."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture
from waiting import HANG_SECONDS

import vlskv_ray
from vlskv_ray.config import SourceConfig
from vlskv_ray.data.layouts import LAYOUTS, TEXT, Layout, register
from vlskv_ray.data.sample import ImageFile, Rejected, Sample, SourceError, left_out
from vlskv_ray.data.sources import Source, open_source

Row = dict[str, Any]
SUFFIXES = ("jsonl", "json", "parquet")
PNG = picture(40, 30)


def make_turns(row: Mapping[str, Any]) -> list[Row]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]


PROMPT_ANSWER = Layout("prompt-answer", {"prompt": TEXT, "answer": TEXT}, make_turns, image_columns=("image",))


@contextmanager
def registered(*layouts: Layout) -> Iterator[None]:
    for layout in layouts:
        register(layout)
    try:
        yield
    finally:
        for layout in layouts:
            del LAYOUTS[layout.name]


@pytest.fixture
def prompt_answer() -> Iterator[None]:
    with registered(PROMPT_ANSWER):
        yield


def write(file: Path, rows: Sequence[Row]) -> Path:
    if file.suffix == ".parquet":
        columns = dict.fromkeys(column for row in rows for column in row)
        pq.write_table(pa.Table.from_pylist([columns | row for row in rows]), file)
    else:
        text = json.dumps(rows) if file.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        file.write_text(text)
    return file


def opened(path: Path, **options: Any) -> Source:
    return open_source(SourceConfig(path=str(path), **options), cache_dir=str(path.parent / "cache"))


def read(source: Source) -> list[Sample | Row]:
    """Each row's sample, or what is told of it."""
    found: list[Sample | Row] = []
    for row in range(source.num_rows):
        try:
            found.append(source.read(row))
        except Rejected as reason:
            found.append(left_out(source.uid(row), reason))
    return found


def row(prompt: Any, answer: Any, **columns: Any) -> Row:
    return {"prompt": prompt, "answer": answer, **columns}


def chat(question: str, answer: str, **columns: Any) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **columns}


def of_files(folder: Path, rows: Sequence[Row]) -> dict[str, list[Sample | Row]]:
    """What becomes of the same rows as JSON lines, as a JSON list and as Parquet."""
    return {suffix: read(opened(write(folder / f"a.{suffix}", rows))) for suffix in SUFFIXES}


def test_the_same_rows_give_the_same_samples_from_any_file(prompt_answer: None, tmp_path: Path) -> None:
    """Those of `messages` that say the same, with an image, without, with its marker, and with what is taken out."""
    rows = [
        row("What?", "A cat.", image="a.png", id=1),
        row("One and one?", "Two.", image=None, id=2),
        row("This <image> one?", "A\0 cät.", image="b.png", id=3),
    ]
    as_messages = [chat(of["prompt"], of["answer"], image=of["image"]) for of in rows]
    wanted = [open_source(SourceConfig(path=str(write(tmp_path / "m.jsonl", as_messages)))).read(i) for i in range(3)]
    assert wanted[0].images == [ImageFile("a.png", tmp_path)] and wanted[2].notices
    for suffix, found in of_files(tmp_path, rows).items():
        for number, (sample, of) in enumerate(zip(found, wanted, strict=True), 1):
            assert isinstance(sample, Sample) and sample.uid == f"a.{suffix}:{number}"
            assert (sample.messages, sample.images, sample.notices) == (of.messages, of.images, of.notices)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_a_plan_needs_is_estimated(prompt_answer: None, suffix: str, tmp_path: Path) -> None:
    """From the declared columns alone, whatever stands beside them."""
    rows = [row("What?", "A cat.", image="a.png", note="x" * 99), row("1 + 1?", "2", image=None, note="")]
    source = opened(write(tmp_path / f"a.{suffix}", rows))
    assert source.num_images.tolist() == [1, 0]
    assert source.text_bytes.tolist() == [len("What?A cat."), len("1 + 1?2")]


def test_pictures_within_parquet_are_read(prompt_answer: None, tmp_path: Path) -> None:
    rows = [row("What?", "A cat.", image={"bytes": PNG, "path": None}), row("1 + 1?", "2", image=None)]
    source = opened(write(tmp_path / "a.parquet", rows))
    assert [source.read(number).images for number in (0, 1)] == [[PNG], []]


@pytest.mark.parametrize(
    ("bad", "reason", "words"),
    [
        (row("x", None), "content_type", "the column 'answer' is null; wanted text"),
        (row(None, "y"), "content_type", "the column 'prompt' is null; wanted text"),
        (row(" ", "y"), "question_empty", "turn 1"),
        (row("x", ""), "answer_empty", "turn 2"),
        (row("<image>x", "y", image=None), "image_null", "a picture is null"),
        (row("<image><image>x", "y", image="a.png"), "marker_mismatch", "2 image markers for 1 images"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    prompt_answer: None, bad: Row, reason: str, words: str, tmp_path: Path
) -> None:
    """File, row and column; its neighbours are unharmed."""
    good = row("x", "y", image=None)
    for suffix, (first, told, last) in of_files(tmp_path, [good, {"image": None} | bad, good]).items():
        assert isinstance(first, Sample) and isinstance(last, Sample)
        assert isinstance(told, dict) and (told["id"], told["reason"]) == (f"a.{suffix}:2", reason), told
        assert words in told["detail"] and "\n" not in told["detail"]


def test_a_column_of_another_type_is_named(prompt_answer: None, tmp_path: Path) -> None:
    """Parquet has one type for all rows of a column."""
    for suffix, found in of_files(tmp_path, [row("x", 5), row("x", 6)]).items():
        detail = "the column 'answer' is int; wanted text"
        assert found[1] == {"id": f"a.{suffix}:2", "reason": "content_type", "detail": detail}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_columns_of_no_layout_are_an_error_that_lists_them_all(
    prompt_answer: None, suffix: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError) as caught:
        opened(write(tmp_path / f"a.{suffix}", [{"prompt": "x", "note": "y"}]))
    place = "" if suffix == "parquet" else ":1"
    wanted = (
        "messages (list of {role, content}), with images or image for images; or prompt (text) and answer (text), with "
        "image for images"
    )
    assert str(caught.value) == f"{tmp_path}/a.{suffix}{place}: found the columns 'prompt', 'note'; wanted {wanted}"


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_row_without_a_column_is_named(prompt_answer: None, suffix: str, tmp_path: Path) -> None:
    """Also if it has the columns of another layout: a source is read in one."""
    rows = [row("x", "y"), {"prompt": "x"}, chat("x", "y"), row("x", "y")]
    first, lacks, other, last = read(opened(write(tmp_path / f"a.{suffix}", rows)))
    wanted = "wanted prompt (text) and answer (text), with image for images"
    for number, told, found in ((2, lacks, "'prompt'"), (3, other, "'messages'")):
        detail = f"found the columns {found}; {wanted}"
        assert told == {"id": f"a.{suffix}:{number}", "reason": "schema", "detail": detail}
    assert isinstance(first, Sample) and isinstance(last, Sample)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pictures_in_columns_that_are_not_declared_are_named(prompt_answer: None, suffix: str, tmp_path: Path) -> None:
    """Be they those of another layout."""
    for column in ("image_path", "images"):
        path = write(tmp_path / f"{column}.{suffix}", [row("x", "y"), row("x", "y", **{column: "g.png"})])
        with pytest.raises(SourceError, match=f"'{column}'.* not read; give pictures in the column image, or list it"):
            opened(path)
        assert len(read(opened(path, ignore_columns=(column,)))) == 2


# --- Lists of objects ---

TURNS = Layout(
    "turns",
    {"texts": ("user", "assistant")},
    lambda of: [
        {"role": role, "content": entry[role]} for entry in of["texts"] for role in ("user", "assistant")
    ],
)  # fmt: skip


def stop(row: Mapping[str, Any]) -> list[Row]:
    raise StopIteration


@pytest.mark.parametrize(
    "make_turns",
    [
        lambda row: None,
        lambda row: "hello",
        lambda row: [None],
        lambda row: {"role": "user"},
        lambda row: (turn for turn in make_turns(row)),
        lambda row: 1 / 0,
        stop,
    ],
)
def test_a_layout_that_makes_no_turns_leaves_its_rows_out(make_turns: Any, tmp_path: Path) -> None:
    with registered(Layout("odd", {"prompt": TEXT}, make_turns)):
        source = open_source(SourceConfig(path=str(write(tmp_path / "a.jsonl", [{"prompt": "x"}]))))
        with pytest.raises(Rejected, match="schema: the layout odd .*wanted "):
            source.read(0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_column_of_pictures_may_be_needed(suffix: str, tmp_path: Path) -> None:
    """One that is declared twice is read once."""
    layout = Layout("shown", {"prompt": TEXT, "answer": TEXT, "image": "a path"}, make_turns, optional=("image",))
    (tmp_path / "a.png").write_bytes(PNG)
    row = {"prompt": "x", "answer": "y", "image": "a.png"}
    with registered(layout):
        source = open_source(SourceConfig(path=str(write(tmp_path / f"rows.{suffix}", [row]))))
        assert len(source.read(0).images) == 1


def test_what_a_list_of_objects_holds_is_declared(tmp_path: Path) -> None:
    """Keys that are not read are looked at, and an object that lacks one costs its row."""
    entry = {"user": "x", "assistant": "y"}
    with registered(TURNS):
        rows = [{"texts": [entry, entry]}, {"texts": [{"user": "x"}]}, {"texts": []}, {"texts": "x"}]
        good, *bad = read(opened(write(tmp_path / "a.jsonl", rows)))
        assert isinstance(good, Sample) and len(good.messages) == 4
        assert [(told["reason"], told["detail"]) for told in bad if isinstance(told, dict)] == [
            (
                "schema",
                "the layout turns cannot make turns of it, KeyError: 'assistant'; wanted texts (list of {user, "
                "assistant}), with images or image for images",
            ),
            ("conv_empty", "the conversation has no turns"),
            ("schema", "the conversation is str; wanted a list of {user, assistant}"),
        ]
        for suffix in SUFFIXES:
            path = write(tmp_path / f"b.{suffix}", [{"texts": [entry | {"image": "g.png"}]}])
            with pytest.raises(SourceError, match=r"'texts\.image'.* looks like a picture and is not read"):
                opened(path)
            assert opened(path, ignore_columns=("texts.image",)).num_rows == 1


# --- Which layout ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_columns_of_two_layouts_are_refused_until_one_is_named(
    prompt_answer: None, suffix: str, tmp_path: Path
) -> None:
    path = write(tmp_path / f"a.{suffix}", [row("p", "q") | chat("x", "y")])
    with pytest.raises(SourceError) as caught:
        opened(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert (
        "has the columns of 2 layouts: messages (messages) and prompt-answer (prompt, answer); to read it in one of "
        "them, list a column of each of the others in ignore_columns of the source"
    ) in str(caught.value)
    for ignored, wanted in (("answer", "x"), ("messages", "p")):
        assert opened(path, ignore_columns=(ignored,)).read(0).messages[0]["content"][0]["text"] == wanted


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_layout_that_needs_more_is_preferred(prompt_answer: None, suffix: str, tmp_path: Path) -> None:
    def with_hint(of: Mapping[str, Any]) -> list[Row]:
        return make_turns({**of, "prompt": f"{of['prompt']} {of['hint']}"})

    path = write(tmp_path / f"a.{suffix}", [row("x", "y", hint="z")])
    assert opened(path).read(0).messages[0]["content"][0]["text"] == "x"
    with registered(Layout("hinted", {"prompt": TEXT, "answer": TEXT, "hint": TEXT}, with_hint)):
        assert opened(path).read(0).messages[0]["content"][0]["text"] == "x z"
        assert opened(path, ignore_columns=("hint",)).read(0).messages[0]["content"][0]["text"] == "x"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_two_layouts_are_two_sources(prompt_answer: None, suffix: str, tmp_path: Path) -> None:
    write(tmp_path / f"a.{suffix}", [row("x", "y")])
    write(tmp_path / f"b.{suffix}", [chat("x", "y")])
    with pytest.raises(SourceError, match=f"b.{suffix}.*: has the layout messages, and files before it prompt-answer;"):
        opened(tmp_path / f"*.{suffix}")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout("messages", {"chat": TEXT}, make_turns), "'messages' has the name of the layout 'messages'"),
        (Layout("other", {"messages": TEXT}, make_turns), "'other' has the columns of the layout 'messages'"),
        (Layout("empty", {}, make_turns), "'empty' needs no column"),
        (Layout("both", {"q": TEXT}, make_turns, image_columns=("q",)), "'both' has 'q' for text and for pictures"),
    ],
)
def test_a_layout_that_nothing_tells_from_another_is_no_layout(layout: Layout, message: str) -> None:
    before = dict(LAYOUTS)
    with pytest.raises(ValueError, match=message):
        register(layout)
    assert before == LAYOUTS


# --- On the way to workers ---

SCRIPT = """
import sys
from pathlib import Path

import ray.cloudpickle
from vlskv_ray.config import SourceConfig
from vlskv_ray.data.layouts import TEXT, Layout, register
from vlskv_ray.data.sources import open_sources

ROLES = "user", "assistant"


def make_turns(row):
    return [{"role": role, "content": row[column]} for role, column in zip(ROLES, ("prompt", "answer"))]


register(Layout("prompt-answer", {"prompt": TEXT, "answer": TEXT}, make_turns))
sources = open_sources([SourceConfig(path=path) for path in sys.argv[2:]], cache_dir=sys.argv[1] + ".cache")
Path(sys.argv[1]).write_bytes(ray.cloudpickle.dumps(sources))
"""
READER = """
import pickle
import sys
from pathlib import Path

from vlskv_ray.data.layouts import LAYOUTS

for source in pickle.loads(Path(sys.argv[1]).read_bytes()):
    print([part["text"] for turn in source.read(0).messages for part in turn["content"]], [*LAYOUTS])
"""


def test_a_layout_travels_with_its_source(tmp_path: Path) -> None:
    """From the script that registers it to a process that has never heard of it."""

    def run(name: str, content: str, *arguments: str) -> str:
        (tmp_path / name).write_text(content)
        command = [sys.executable, str(tmp_path / name), str(tmp_path / "sources"), *arguments]
        root = Path(vlskv_ray.__file__).parent.parent
        env = {"PYTHONPATH": str(root), "PATH": "", "HOME": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    paths = [str(write(tmp_path / f"a.{suffix}", [row("What?", "A cat.")])) for suffix in SUFFIXES]
    run("script.py", SCRIPT, *paths)
    assert run("reader.py", READER).splitlines() == ["['What?', 'A cat.'] ['messages']"] * 3
