"""What the commands say of rows: one that asks for what data may not open stops them, and what was changed is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import picture
from safetensors.torch import load_file

import vlskv_ray.cache
import vlskv_ray.evaluate
import vlskv_ray.train

REFUSED = {
    "path_outside_root": "../secret.png",
    "remote_image": "http://169.254.169.254/latest/meta-data",
}


def write_files(folder: Path, model: Path, asks_for: str) -> Path:
    """Twelve rows of which the fifth asks for what it may not have and the ninth holds a NUL, and a run on them."""
    (folder / "images").mkdir()
    (folder / "secret.png").write_bytes(picture(40, 30))
    (folder / "images" / "a.png").write_bytes(picture(40, 30))
    rows = [
        {
            "messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}],
            "images": ["a.png"] if i % 3 else [],
        }
        for i in range(12)
    ]
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows[4]["images"] = [asks_for]
    rows[8]["messages"][1]["content"] = "it\0 is 8"  # type: ignore[index, call-overload]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "epochs": 2,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "model": {"name_or_path": str(model), "num_key_value_layers": 3},
        "data": {
            "sources": [{"path": str(folder / "rows.jsonl"), "image_root": str(folder / "images")}],
            "max_rejected_fraction": 0.5,
        },
        "optimizer": {"lr": 1e-3},
        "cluster": {"num_workers": 0, "threads_per_worker": 1},
        "checkpoint": {"every_steps": 1},
        "output": {"dir": str(folder / "runs"), "name": "run"},
    }
    (folder / "run.yaml").write_text(yaml.dump(config))
    return folder / "run.yaml"


def train(config: Path, *overrides: str) -> int:
    return vlskv_ray.train.main(["--config", str(config), *overrides])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_told(error: str, reason: str, option: str = "data.on_refused=skip") -> None:
    """One line with the row, what it asked for and the remedy."""
    [line] = [line for line in error.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: rows.jsonl:5: {reason}: {REFUSED[reason]!r}") and error.endswith(f"{line}\n")
    assert option in line


def test_a_refused_row_stops_the_run(
    teacher_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the step that has it is saved; going on with skip gives the bits of a run that skipped from the start."""
    reason = "path_outside_root"
    config = write_files(tmp_path, teacher_folder(), REFUSED[reason])
    runs = tmp_path / "runs"
    assert train(config) == 1
    check_told(capsys.readouterr().err, reason)
    [told] = lines(runs / "run" / "rejected.jsonl")
    assert (told["id"], told["reason"], told["refused"]) == ("rows.jsonl:5", reason, True)
    saved = [int(path.name.removeprefix("step-")) for path in (runs / "run" / "checkpoints").iterdir()]
    assert max(saved, default=0) == told["step"] - 1
    assert train(config, "data.on_refused=skip") == 0
    assert train(config, "data.on_refused=skip", "output.name=skipped") == 0
    first, second = (load_file(runs / name / "final" / "model.safetensors") for name in ("run", "skipped"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("rejected", "notices"):
        assert lines(runs / "run" / f"{name}.jsonl") == lines(runs / "skipped" / f"{name}.jsonl")
    assert len(lines(runs / "run" / "rejected.jsonl")) == 2


def test_a_dry_run_and_the_other_commands_stop_too(
    teacher_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = "remote_image"
    config = write_files(tmp_path, teacher_folder(), REFUSED[reason])
    monkeypatch.chdir(tmp_path)
    assert train(config, "--dry-run") == 1
    check_told(capsys.readouterr().err, reason)
    good = json.dumps([{"path": str(config.parent / "good.jsonl"), "image_root": str(config.parent / "images")}])
    held_out = json.dumps([{"path": str(config.parent / "rows.jsonl"), "image_root": str(config.parent / "images")}])
    assert train(config, f"data.sources={good}", f"evaluation.sources={held_out}") == 1
    check_told(capsys.readouterr().err, reason)
    run = config.parent / "runs" / "run"
    assert not (run / "summary.json").exists() and not (run / "evaluation.json").exists()
    evaluate = ["--model", str(run / "final"), "--data", str(config.parent / "rows.jsonl"), "--max-new-tokens", "2"]
    evaluate += ["--image-root", str(config.parent / "images"), "--output", str(config.parent / "evaluation.json")]
    assert vlskv_ray.evaluate.main(evaluate) == 1
    check_told(capsys.readouterr().err, reason, "--on-refused skip")
    assert vlskv_ray.evaluate.main([*evaluate, "--on-refused", "skip"]) == 0
    assert json.loads((config.parent / "evaluation.json").read_text())["left_out"] == {reason: 1}


@pytest.mark.ray
def test_filling_the_teacher_cache_stops_too(
    teacher_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_files(tmp_path, teacher_folder(), REFUSED["remote_image"])
    arguments = ["--config", str(config), "--workers", "1", "cluster.address=local"]
    assert vlskv_ray.cache.main(arguments) == 1
    check_told(capsys.readouterr().err, "remote_image")


def test_what_was_changed_is_counted(
    teacher_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In notices.jsonl and the summary, each time a changed row is seen; and by a dry run, which says as well how many
    samples have images."""
    config = write_files(tmp_path, teacher_folder(), "a.png")
    assert train(config, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "changed rows.jsonl:9: control_characters: 1 control characters taken out of its text (U+0000)" in said
    assert "tried         12 samples: 12 used, 8 of them with images; 0 left out; 1 changed" in said
    assert train(config) == 0
    assert "0 samples left out; 2 samples changed: 2 control_characters" in capsys.readouterr().out
    run = tmp_path / "runs" / "run"
    assert [(line["id"], line["reason"]) for line in lines(run / "notices.jsonl")] == [
        ("rows.jsonl:9", "control_characters")
    ] * 2
    assert json.loads((run / "summary.json").read_text())["notices"] == {"control_characters": 2}
