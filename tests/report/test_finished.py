"""What a finished run must have is one list, and whatever of it is missing or damaged is made again by the command."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import main, write_config, write_files

from vlskv_ray.report.finished import CARD, PAGES, is_finished, is_untouched, seals, unfinished, unmade
from vlskv_ray.report.run_files import read_run

STEPS = 2
TIMED = {"command_seconds", "savings"}
"""What a clock makes, in summary.json and evaluation.json."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Callable[..., Path]) -> Path:
    """A finished run of two steps, with answers measured."""
    folder = tmp_path_factory.mktemp("finished")
    write_files(folder)
    evaluation = {"sources": [{"path": str(folder / "more.parquet")}], "num_samples": 2, "max_new_tokens": 2}
    write_config(folder, teacher_folder(), max_steps=STEPS, evaluation=evaluation)
    assert main(folder / "run.yaml", "output.tensorboard=false") == 0
    return (folder / "runs" / "run").rename(folder / "runs" / "original")


@pytest.fixture
def run(original: Path) -> Iterator[Path]:
    copy = original.with_name("run")
    shutil.copytree(original, copy)
    yield copy
    shutil.rmtree(copy)


def again(run: Path, *more: str) -> int:
    return main(run.parent.parent / "run.yaml", "output.tensorboard=false", *more)


def all_of_it() -> list[str]:
    """Every file of a finished run of the tiny model that can be made again."""
    final = ["config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json"]
    final += ["tokenizer_config.json", "chat_template.jinja", "README.md"]
    return [f"final/{name}" for name in final] + ["evaluation.json", "summary.json", "report.html", "config.yaml"]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.touch()
    elif how == "a pipe":
        os.mkfifo(path)
    elif how == "deep":
        path.write_text("[" * 100_000)


def untimed(path: Path) -> Any:
    return {key: value for key, value in json.loads(path.read_bytes()).items() if key not in TIMED}


def assert_made_again(run: Path, original: Path) -> None:
    """Byte by byte, but for what a clock tells; pages are of the figures that are there now."""
    for name in set(all_of_it()) - {*PAGES, "evaluation.json", "summary.json"}:
        assert (run / name).read_bytes() == (original / name).read_bytes(), name
    for name in ("evaluation.json", "summary.json"):
        assert untimed(run / name) == untimed(original / name), name
    assert unfinished(run, STEPS) is None and not unmade(run) and is_finished(run) and is_untouched(run)


def test_the_list_is_all_that_the_end_of_a_run_writes(original: Path) -> None:
    left = {str(path.relative_to(original)) for path in original.rglob("*") if path.is_file()}
    not_of_the_end = {name for name in left if name.startswith("checkpoints/") or name.endswith((".jsonl", ".lock"))}
    not_of_the_end.add("start.safetensors")
    assert left - not_of_the_end == set(all_of_it())
    assert not (original / ".writing-final").exists()
    assert {CARD, *seals(original)} == {name for name in all_of_it() if name.startswith("final/")}


@pytest.mark.parametrize("how", ["removed", "cut", "emptied", "a pipe", "deep"])
def test_what_is_missing_or_damaged_is_seen(original: Path, run: Path, how: str) -> None:
    """Of every file of the list; nothing is waited for."""
    assert is_finished(run) and unfinished(run, STEPS) is None and is_untouched(run)
    for name in set(all_of_it()) - {"config.yaml"}:
        damage(run / name, how)
        if name not in PAGES:
            why = unfinished(run)
            assert why is not None and "\n" not in why and name in why
        elif how != "deep" or name == "report.html":  # a card with other words may have been edited
            assert unmade(run) == [name] and unfinished(run) is None
        (run / name).unlink(missing_ok=True)
        shutil.copyfile(original / name, run / name)
    assert is_finished(run) and is_untouched(run)
    assert unfinished(run, STEPS + 1) == f"summary.json is of {STEPS} steps"


@pytest.mark.parametrize("how", ["removed", "cut"])
def test_pages_and_config_are_made_from_the_rest(original: Path, run: Path, how: str, capsys: Any) -> None:
    """Without going through the run's end: the same bytes as they had, and model and measurement untouched."""
    kept = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    for name in ("report.html", CARD, "config.yaml"):
        before = (run / name).read_bytes()
        damage(run / name, how)
        capsys.readouterr()
        assert again(run) == 0
        printed = capsys.readouterr().out
        assert "already finished" in printed and (f"made again    {name}" in printed or name == "config.yaml")
        assert (run / name).read_bytes() == before, name
        kept.pop(run / name)
    assert {path: path.stat().st_mtime_ns for path in kept if path.name != ".lock"} == {
        path: written for path, written in kept.items() if path.name != ".lock"
    }


MODEL = [name for name in all_of_it() if name.startswith("final/")]


@pytest.mark.parametrize(
    ("names", "how"),
    [(["evaluation.json"], "removed"), (["summary.json"], "cut"), (MODEL, "removed"), (MODEL, "cut")],
    ids=["evaluation", "summary", "model-removed", "model-cut"],
)
def test_the_end_is_gone_through_again(original: Path, run: Path, names: list[str], how: str, capsys: Any) -> None:
    """From the last checkpoint, without a step."""
    checkpoint = (run / "checkpoints" / f"step-{STEPS:08d}" / "COMMIT").stat().st_mtime_ns
    for name in names:
        damage(run / name, how)
    assert again(run) == 0
    printed = capsys.readouterr().out
    assert "already finished" not in printed
    assert_made_again(run, original)
    assert (run / "checkpoints" / f"step-{STEPS:08d}" / "COMMIT").stat().st_mtime_ns == checkpoint
    assert again(run) == 0 and "already finished" in capsys.readouterr().out
    for older in run.glob("final-until-*"):
        shutil.rmtree(older)
    assert {path.name for path in run.iterdir()} == {path.name for path in original.iterdir()}


def test_what_somebody_changed_is_not_lost(original: Path, run: Path, capsys: Any) -> None:
    """An edited card stays; where the model itself was changed it is made again, and the changed one kept beside it."""
    card = (run / CARD).read_text()
    (run / CARD).write_text(f"{card}\nEdited.\n")
    assert again(run) == 0 and "already finished" in capsys.readouterr().out
    assert (run / CARD).read_text().endswith("Edited.\n")
    (run / "final" / "generation_config.json").write_text("{}")
    (run / "final" / "notes.txt").write_text("mine")
    assert again(run) == 0
    printed = capsys.readouterr().out
    assert "final/generation_config.json: missing, or not what the run wrote" in printed
    (older,) = run.glob("final-until-*")
    assert f"moved the model that was there to {older}" in printed
    assert (older / "notes.txt").read_text() == "mine" and (older / "README.md").read_text().endswith("Edited.\n")
    shutil.rmtree(older)
    assert_made_again(run, original)


def test_an_end_of_fewer_steps_is_not_this_ones(run: Path, capsys: Any) -> None:
    """A run that went on behind its first end, and was killed before its second, is not finished."""
    longer = (f"max_steps={STEPS + 1}", "checkpoint.allow_changed=[max_steps]")
    summary = (run / "summary.json").read_bytes()
    assert again(run, *longer) == 0
    (run / "summary.json").write_bytes(summary)
    capsys.readouterr()
    assert again(run, *longer) == 0
    assert "already finished" not in capsys.readouterr().out
    assert read_run(run).summary["steps"] == STEPS + 1
