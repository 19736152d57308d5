"""What a run goes on from, and what of it must be as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import seal, with_state
from conftest import conversation
from runs import NO_ANSWERS, main
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def one_step(files: Path) -> tuple[str, ...]:
    """The options of a run that has come to its end."""
    options = ("output.name=one-step", "max_steps=1", *NO_ANSWERS)
    assert main(files / "run.yaml", *options) == 0
    return options


CHANGED = {
    "optimizer.lr=1e-4": "cannot go on from here: optimizer.lr was 0.003 and is 0.0001; use --resume never",
    "--num-samples=9": "the data changed since",
    "gradient_accumulation_steps=3": "gradient_accumulation_steps was 4 and is 3",
    "cluster.num_workers=3": "3 workers cannot share the 4 micro-batches of a step equally",
    "cluster.num_workers=[1,4]": "3 workers cannot share the 4 micro-batches of a step equally",
    "cluster.threads_per_worker=2": "threads_per_worker was 1 and is 2; use --resume never",
    "cluster.use_gpu=true": "the run was on CPUs and is on GPUs (cluster.use_gpu); use --resume never",
}


@pytest.mark.parametrize("option", CHANGED)
def test_what_decides_the_numbers_may_not_change(
    files: Path, one_step: tuple[str, ...], capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert main(files / "run.yaml", *one_step, option) == 2
    refused = capsys.readouterr().err
    assert CHANGED[option] in refused
    assert ("allow it with checkpoint.allow_changed=[device]" in refused) == ("use_gpu" in option)


@pytest.mark.parametrize("option", ["model.num_key_value_layers=4", "gradient_accumulation_steps=2"])
def test_what_no_option_allows_to_change(
    files: Path, one_step: tuple[str, ...], capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert main(files / "run.yaml", *one_step, option, f"checkpoint.allow_changed=[{option.partition('=')[0]}]") == 2
    assert "use --resume never to start anew, or another output.name\n" in capsys.readouterr().err


def test_with_other_parts_no_run_goes_on(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is allowed to change; the same parts in another order are none, and a learning rate may be allowed."""
    model = "model={name_or_path: %s, trainable: [%s]}"
    folder = yaml.safe_load((files / "run.yaml").read_text())["model"]["name_or_path"]
    options = ("output.name=parts", "objective=sft", "max_steps=1", *NO_ANSWERS)
    assert main(files / "run.yaml", *options, model % (folder, "vision_tower, projector")) == 0
    reordered = (*options, model % (folder, "projector, vision_tower"))
    assert main(files / "run.yaml", *reordered) == 0
    allowed = "checkpoint.allow_changed=[model.trainable]"
    assert main(files / "run.yaml", *options, model % (folder, "text"), allowed) == 2
    refused = capsys.readouterr().err
    assert "cannot go on from here: model.trainable was vision_tower and projector and is text; use --resume" in refused
    assert refused.endswith("use --resume never to start anew, or another output.name\n")
    rate = "optimizer.learning_rates.projector=0.1"
    assert main(files / "run.yaml", *reordered, rate) == 2
    allowed = "checkpoint.allow_changed=[optimizer.learning_rates.projector]"
    assert allowed in capsys.readouterr().err
    shutil.rmtree(files / "runs" / "parts" / "final")
    assert main(files / "run.yaml", *reordered, rate, allowed) == 0


def test_nothing_to_resume(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files / "run.yaml", "output.name=nothing", "--resume", "must") == 2
    assert "there is no checkpoint to go on from" in capsys.readouterr().err


def test_what_a_run_was_made_of_must_not_change(
    files: Path, teacher_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other answers of equal length in the data, other weights in the model's folder: noticed before going on."""
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    shutil.copytree(teacher_folder(), model)
    rows = [json.dumps({"messages": conversation("a?", f"thing {i}")}) + "\n" for i in range(16)]
    data.write_text("".join(rows))
    options = (f"data.sources=[{{path: {data}}}]", f"model.name_or_path={model}", f"output.dir={tmp_path}", "epochs=2")
    assert main(files / "run.yaml", *options, "checkpoint.every_steps=1") == 0
    shutil.rmtree(tmp_path / "run" / "final")
    data.write_text("".join(rows).replace("thing 3", "gniht 3"))
    assert main(files / "run.yaml", *options) == 2
    assert "the data changed since" in capsys.readouterr().err
    data.write_text("".join(rows))
    weights = load_file(model / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    assert main(files / "run.yaml", *options) == 2
    refused = capsys.readouterr().err
    assert "the model changed since" in refused and "allow it with checkpoint.allow_changed=[model]" in refused
    assert main(files / "run.yaml", *options, "optimizer.lr=1e-5", "checkpoint.allow_changed=[model]") == 2
    assert "checkpoint.allow_changed=[optimizer.lr]" in capsys.readouterr().err
    assert main(files / "run.yaml", *options, "checkpoint.allow_changed=[model]") == 0
    shutil.rmtree(tmp_path / "run" / "final")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    shutil.copytree(teacher_folder(), model, dirs_exist_ok=True)
    assert main(files / "run.yaml", *options) == 0  # what was missing of a finished run is made again
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_a_run_without_a_whole_checkpoint_is_not_overwritten(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files / "run.yaml", "output.name=lost", "max_steps=2") == 0
    run = files / "runs" / "lost"
    metrics = (run / "metrics.jsonl").read_text()
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text("{}")
    assert main(files / "run.yaml", "output.name=lost", "max_steps=2") == 2
    assert "holds a run, but no checkpoint of it that is whole" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    assert main(files / "run.yaml", "output.name=lost", "max_steps=2") == 2
    assert (run / "metrics.jsonl").read_text() == metrics


def test_a_crafted_checkpoint_is_refused_in_one_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its hashes right, its weights of another model; moved away, the run goes on from the one before."""
    options = ("output.name=crafted", *NO_ANSWERS, "max_steps=2", "checkpoint.every_steps=1")
    assert main(files / "run.yaml", *options) == 0
    run = files / "runs" / "crafted"
    newest = run / "checkpoints" / "step-00000002"
    weights = load_file(newest / "trainable.safetensors")
    save_file({name: weight.flatten() for name, weight in weights.items()}, newest / "trainable.safetensors")
    seal(newest)
    shutil.rmtree(run / "final")
    capsys.readouterr()
    assert main(files / "run.yaml", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{newest}/trainable.safetensors: is not what this run wrote: ") and error.count("\n") == 1
    save_file(weights, newest / "trainable.safetensors")
    with_state(newest, fingerprints={"versions": "\x1b[2J"})
    assert main(files / "run.yaml", *options) == 2
    error = capsys.readouterr().err
    assert "the model changed since, the data changed since, the versions changed since" in error
    assert error.count("\n") == 1 and "\x1b" not in error
    newest.rename(run / "aside")
    assert main(files / "run.yaml", *options) == 0
    again = load_file(newest / "trainable.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
