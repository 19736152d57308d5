"""Runs side by side: figures come from their files, and a page is changed only where it says so."""

import json
import re
import shutil
from pathlib import Path

import pytest
from pages import SUMMARY, evaluation, free_text, of_earlier_version, run_folder

from vlskv_ray import compare

PAGE = "<!-- x: end -->\n<!-- x: begin -->\n<!-- y: begin -->\nkept\n<!-- y: begin -->\n<!-- y: end -->\n"
LOSSES = {"first": {"loss": 0.2}, "last": {"loss": 0.01}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    means = {end: dict.fromkeys(compare_keys()) | values for end, values in LOSSES.items()}
    return run_folder(tmp_path / "run", evaluation=evaluation(), summary=SUMMARY | means, plots=False)


def compare_keys() -> list[str]:
    from vlskv_ray.report.summary import AVERAGED

    return list(AVERAGED)


def test_a_line_holds_the_figures_of_its_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(run), str(run)]) == 0
    head, _, *lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2
    cells = dict(
        zip(*([cell.strip() for cell in line.strip("|").split("|")] for line in (head, lines[0])), strict=True)
    )
    assert cells == {
        "run": "shapes",
        "layers with their own cache": "2 of 4",
        "group": "1",
        "KL copied": "1.913",
        "KL fitted": "–",
        "KL": "0.01234",
        "top-1": "98.1%",
        "perplexity": "1.12",
        "the teacher's perplexity": "1.106",
        "agreed prefix": "98.1%",
        "accuracy copied": "31.0%",
        "accuracy fitted": "–",
        "accuracy": "92.0%",
        "kept": "97.9%",
        "kept with images": "97.9%",
        "kept text only": "97.8%",
        "prefill operations": "0.53",
        "prefill CPU time": "0.54",
        "prefill time": "0.55",
        "cache bytes": "0.75",
        "trained weights": "16,448",
        "training": "246 s",
    }


def test_a_page_is_changed_between_its_marks_alone(run: Path, tmp_path: Path) -> None:
    """Again and again the same; what stands around is kept to the letter."""
    page = tmp_path / "page.md"
    page.write_text("one\n<!-- figures: begin -->\nold\n<!-- figures: end -->\ntwo <!-- other: begin -->\n")
    for _ in range(2):
        assert compare.main([str(run), "--into", str(page)]) == 0
        before, rest = page.read_text().split("<!-- figures: begin -->\n")
        table, after = rest.split("<!-- figures: end -->")
        assert (before, after) == ("one\n", "\ntwo <!-- other: begin -->\n")
        assert "92.0%" in table and "old" not in table


def test_a_page_stays_the_kind_of_file_it_is(run: Path, tmp_path: Path) -> None:
    """A link stays one, line ends and permissions are kept."""
    page, link = tmp_path / "page.md", tmp_path / "link.md"
    page.write_bytes(b"one\r\n<!-- figures: begin -->\r\nold\r\n<!-- figures: end -->\r\n")
    page.chmod(0o640)
    link.symlink_to(page)
    assert compare.main([str(run), "--into", str(link)]) == 0
    assert link.is_symlink() and page.stat().st_mode & 0o777 == 0o640
    text = page.read_bytes()
    assert b"92.0%" in text and text.count(b"\n") == text.count(b"\r\n")


@pytest.mark.parametrize(
    ("file", "content"),
    [("evaluation.json", '{"teacher": {}, "savings": 3, "student": {"by_kind": 3}}'), ("summary.json", '{"a": 1}')],
)
@pytest.mark.parametrize("flags", [[], ["--result"], ["--summary"]])
def test_files_that_no_run_wrote(
    run: Path, file: str, content: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each gives a table with dashes, or one line."""
    (run / file).write_text(content)
    status = compare.main([str(run), *flags])
    error = capsys.readouterr().err
    assert (status, error.count("\n")) in ((0, 0), (2, 1))
    assert status == 0 or "holds something else than a run writes" in error


@pytest.mark.parametrize("flags", [[], ["--result"], ["--summary"]])
def test_a_run_of_an_earlier_version(run: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What it did not measure shows as a dash, or not at all; all else as ever."""
    (run / "evaluation.json").write_text(json.dumps(of_earlier_version(evaluation())))
    assert compare.main([str(run), *flags]) == 0
    text = capsys.readouterr().out
    assert "None" not in text and all(figure in text for figure in ("0.01234", "98.1%", "92.0%", "0.53", "0.55"))
    if not flags:
        head, _, line = (row.strip("|").split(" | ") for row in text.strip().splitlines())
        cells = dict(zip(map(str.strip, head), map(str.strip, line), strict=True))
        assert cells["perplexity"] == cells["agreed prefix"] == cells["prefill CPU time"] == "–"


@pytest.mark.parametrize("flags", [[], ["--result"], ["--summary"]])
def test_free_text_has_no_accuracy(run: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Where the teacher gives no reference word for word, an accuracy of nothing is not shown as one of all three."""
    (run / "evaluation.json").write_text(json.dumps(free_text(evaluation())))
    assert compare.main([str(run), *flags]) == 0
    text = capsys.readouterr().out
    assert not re.search(r"\b0\.0%", text) and "0.01234" in text
    assert not flags or "None of the teacher's matches its reference word for word, so no accuracy is shown." in text


def test_the_closing_table_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(run), "--result"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("```text\n") and text.endswith("\n```\n")
    for figure in ("0.2        0.01", "94.0%", "31.0%", "0.01234", "0.75", "400 steps in 4:06"):
        assert figure in text, figure
    places = [
        *("KL per token, mean", "top-1 agreement", "perplexity", "cross-entropy", "agreed greedy prefix, tokens"),
        *("accuracy ", "question, 1 image   What colour is the disc?", "student copied      blue"),
        "prefill operations",
    ]
    assert sorted(places, key=text.index) == places, "what says most about any answers comes first"


def test_answers_in_a_terminal_are_short_and_steer_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, whatever they hold."""
    found = evaluation()
    found["examples"][0] |= {"student": "\x1b[31mred\n```\n" + "long " * 200, "teacher": None}
    (run / "evaluation.json").write_text(json.dumps(found))
    assert compare.main([str(run), "--result"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and text.count("\n```") == 1 and "teacher             –\n" in text
    (line,) = [line for line in text.splitlines() if "long long" in line]
    assert line.startswith("student distilled   \\x1b[31mred ``` long") and line.endswith("… (of 1,013 characters)")
    assert len(line) < 270


def test_the_summary_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The student beside its teacher, and what they were measured on."""
    assert compare.main([str(run), "--summary"]) == 0
    head, _, *rows, space, note = capsys.readouterr().out.strip().splitlines()
    cells = {label: rest for label, *rest in ([cell.strip() for cell in row.split("|")[1:-1]] for row in [head, *rows])}
    assert cells == {
        "": ["teacher", "student copied", "student distilled"],
        "perplexity": ["1.106", "9.088", "1.12"],
        "agreed greedy prefix, share": ["100.0%", "62.2%", "98.1%"],
        "accuracy": ["94.0%", "31.0%", "92.0%"],
        "accuracy kept": ["", "", "97.9%"],
        "KL per token, mean": ["0", "1.913", "0.01234"],
        "top-1 agreement": ["100.0%", "62.2%", "98.1%"],
        "prefill CPU time": ["450 ms", "", "243 ms (0.54 of the teacher's)"],
        "prefill operations": ["19 GFLOP", "", "10.1 GFLOP (0.53 of the teacher's)"],
    }
    assert not space and note.startswith("100 questions (70 with images, 30 text only) of 100 held-out samples from")
    assert note.endswith(
        "left out: 2 too\\_long. Greedy answers of at most 64 tokens. "
        "Prefill of a prompt of 2,048 tokens, 1 image among them, with threads: 2."
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nothing"], "nothing: holds no finished run"),
        (["{run}", "--into", "missing.md"], "missing.md cannot be read: [Errno 2] No such file"),
        (["{run}", "--into", "{page}"], "has no place for it; wanted the lines <!-- figures: begin --> and"),
        (["{run}", "--into", "{page}", "--block", "x"], "has no place for it; wanted the lines <!-- x: begin --> and"),
        (["{run}", "--into", "{page}", "--block", "y"], "has no place for it; wanted the lines <!-- y: begin --> and"),
        (["{sft}"], "distils nothing, so it has no student to compare"),
        (["{sft}", "--summary"], "distils nothing, so it has no student to compare"),
    ],
)
def test_wrong_input(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    page, sft = tmp_path / "page.md", shutil.copytree(run, tmp_path / "sft")
    page.write_text(PAGE)
    (sft / "config.yaml").write_text("objective: sft\n")
    assert compare.main([a.format(run=run, page=page, sft=sft) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert line in error and len(error.splitlines()) == 1
    assert page.read_text() == PAGE
