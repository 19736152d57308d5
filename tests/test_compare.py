"""Runs side by side: figures come from their files, and a page is changed only where it says so."""

from pathlib import Path

import pytest
from test_report_page import SUMMARY, evaluation, run_folder

from vlskv_ray import compare

LOSSES = {"first": {"loss": 0.2}, "last": {"loss": 0.01}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    means = {end: dict.fromkeys(compare_keys()) | values for end, values in LOSSES.items()}
    return run_folder(tmp_path / "run", evaluation=evaluation(), summary=SUMMARY | means, plots=False)


def compare_keys() -> list[str]:
    from vlskv_ray.report import AVERAGED

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
        "accuracy before": "31.0%",
        "accuracy after": "92.0%",
        "kept": "97.9%",
        "KL": "0.01234",
        "top-1": "98.1%",
        "prefill operations": "0.53",
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


def test_the_closing_table_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(run), "--result"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("```text\n") and text.endswith("\n```\n")
    for figure in ("0.2        0.01", "94.0%", "31.0%", "0.01234", "0.75", "400 steps in 4:06"):
        assert figure in text, figure


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nothing"], "nothing: holds no finished run"),
        (["{run}", "--into", "missing.md"], "--into: missing.md cannot be read: No such file"),
        (["{run}", "--into", "{page}"], "has no place for it; wanted the lines <!-- figures: begin --> and"),
        (["{run}", "--into", "{page}", "--block", "x"], "has no place for it; wanted the lines <!-- x: begin --> and"),
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
    page = tmp_path / "page.md"
    page.write_text("<!-- x: end -->\n<!-- x: begin -->\n")
    assert compare.main([a.format(run=run, page=page) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert line in error and len(error.splitlines()) == 1
    assert page.read_text() == "<!-- x: end -->\n<!-- x: begin -->\n"
