"""A run in one process, from its start to its end, whatever that is."""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from clusters import Command, plan_faults
from pages import PLOTS, SECTIONS
from runs import LOCAL, NO_ANSWERS, assert_same_weights, lines, main
from safetensors.torch import load_file

import vlskv_ray.fit
from vlskv_ray.model.build import build_student, find_model
from vlskv_ray.report.figures import columns, decimal, percent
from vlskv_ray.storage.run_lock import own_run_folder
from vlskv_ray.training import faults
from vlskv_ray.training.objective import SIDES
from vlskv_ray.training.start import read_weights

ONE_EPOCH = ("epochs=1", "data.max_rejected_fraction=0.2")
SHORT = (*NO_ANSWERS, "epochs=1")
PLAIN = ("objective=sft", "model.num_key_value_layers=null")


@pytest.fixture(scope="module")
def ended(files: Path) -> tuple[Path, str]:
    """The folder of a run of one epoch, with answers measured, and what the command printed."""
    with redirect_stdout(StringIO()) as printed:
        assert main(files / "run.yaml", *ONE_EPOCH, "output.name=ended") == 0
    return files / "runs" / "ended", printed.getvalue()


@pytest.fixture
def copied(ended: tuple[Path, str]) -> Iterator[Path]:
    """The same run in a folder of the test's own, which is the one that `again` goes on with."""
    copy = ended[0].with_name("copied")
    shutil.copytree(ended[0], copy)
    yield copy
    for path in copy.parent.glob("copied*"):
        shutil.rmtree(path)


def again(copied: Path, *options: str) -> int:
    return main(copied.parent.parent / "run.yaml", *ONE_EPOCH, "output.name=copied", *options)


def test_a_run_says_what_it_does_and_leaves_out(ended: tuple[Path, str]) -> None:
    _, printed = ended
    assert "global batch  8 = 2 samples x 4 accumulation x 1 worker\n" in printed
    assert "3 samples left out: 1 image_missing, 1 json_line, 1 too_long" in printed
    assert "12 questions of 12 held-out samples" in printed and "warning: more.parquet of evaluation.sources" in printed


def test_the_loss_of_a_run_falls(ended: tuple[Path, str]) -> None:
    summary = json.loads((ended[0] / "summary.json").read_text())
    assert summary["steps"] == 7 and summary["last"]["loss"] < summary["first"]["loss"]


def test_whoever_may_read_the_folder_may_read_the_weights(ended: tuple[Path, str]) -> None:
    run, _ = ended
    weights = list(run.glob("*/**/*.safetensors"))
    assert len(weights) >= 3
    assert {path.stat().st_mode & 0o777 for path in weights} == {(run / "summary.json").stat().st_mode & 0o777}


def test_terminal_report_and_card_have_the_figures_that_were_measured(ended: tuple[Path, str]) -> None:
    """Of a student that came nearer to its teacher; the report has all its parts."""
    run, printed = ended
    page, card = (run / "report.html").read_text(), (run / "final" / "README.md").read_text()
    assert all(f'id="{section}"' in page for section in (*SECTIONS, *PLOTS)) and page.count("data:image/png") == 8
    teacher, before, after = (json.loads((run / "evaluation.json").read_text())[side] for side in SIDES)
    assert teacher["kl_mean"] == 0 < after["kl_mean"] < before["kl_mean"]
    for figure in (decimal(before["kl_mean"]), decimal(after["kl_mean"]), percent(after["top1_agreement"])):
        assert figure in printed and figure in page and figure in card


def test_a_finished_run_is_not_made_again(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert again(copied) == 0
    assert "already finished" in capsys.readouterr().out


def test_a_damaged_model_is_made_again_from_the_last_checkpoint(
    ended: tuple[Path, str], copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "final" / "model.safetensors").write_bytes(b"junk")
    assert again(copied) == 0
    assert "already finished" not in capsys.readouterr().out
    assert_same_weights(copied, ended[0])


def test_started_anew_the_older_run_is_kept(copied: Path) -> None:
    assert again(copied, "--resume", "never", "--num-samples", "9") == 0
    (older,) = copied.parent.glob("copied-until-*")
    assert (older / "final" / "model.safetensors").exists()
    assert json.loads((copied / "summary.json").read_text())["steps"] == 2


def test_the_final_folder_continues_as_a_student(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run on the first one's `final/` starts from its SwiftKV weights."""
    assert main(files / "run.yaml", "output.name=first", "max_steps=3", "optimizer.lr=0.02") == 0
    final = files / "runs" / "first" / "final"
    options = (f"model.name_or_path={final}", "optimizer.lr=1e-12", "max_steps=1")
    assert main(files / "run.yaml", "output.name=second", *options) == 0
    first, second = (load_file(files / "runs" / name / "final" / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_logs_with_junk_in_them_do_no_harm(files: Path) -> None:
    assert main(files / "run.yaml", "output.name=junk", "max_steps=3", "checkpoint.every_steps=2") == 0
    run = files / "runs" / "junk"
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'5\nnull\n[]\n{}\n{"step": null}\n{"step": Infinity}\n\xff\n{"step": 1')
    assert main(files / "run.yaml", "output.name=junk", "max_steps=3") == 0
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3]


def test_two_commands_never_run_one_run(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with own_run_folder(files / "runs" / "taken"):
        assert main(files / "run.yaml", "output.name=taken") == 2
        assert "another process runs this run" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_saved(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("output.name=ruined", "optimizer.lr=1e38", "optimizer.max_grad_norm=null", "max_steps=1")
    assert main(files / "run.yaml", *options) == 1
    assert "weights are not finite any more" in capsys.readouterr().err
    assert not list((files / "runs" / "ruined" / "checkpoints").iterdir())


def test_rows_that_cannot_be_used_stop_a_run_with_exit_status_1(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(files / "run.yaml", "output.name=short", "data.max_length=40") == 1
    assert "samples so far had to be left out" in capsys.readouterr().err
    assert len(lines(files / "runs" / "short" / "rejected.jsonl")) > 10


@pytest.mark.parametrize("objective", ["distill", "sft"])
def test_a_run_that_learnt_from_nothing_has_failed(
    files: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    """Though it made all its steps, and as often as it is asked; stopped on the way, it goes on to the same end."""
    options = (f"output.name=nothing-{objective}", *NO_ANSWERS, "data.max_length=20", "max_steps=3")
    options += ("data.max_rejected_fraction=1", "checkpoint.every_steps=1", *(PLAIN if objective == "sft" else ()))
    run = files / "runs" / f"nothing-{objective}"
    for last in (None, "step-00000003", None):
        if last:
            shutil.rmtree(run / "checkpoints" / last)
            (run / "rejected.jsonl").unlink()
        assert main(files / "run.yaml", *options) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: the run has come to its end and learnt nothing: ") and error.count("\n") == 1
        assert re.search(r"all 2[24] samples had to be left out \(", error)
        assert "x too_long" in error and "For one, " in error and "data.max_length=20" in error
        assert "mend the data, and start anew with --resume never" in error
        assert not (run / "final").exists() and not (run / "summary.json").exists()


def test_samples_without_weight_teach_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of these have images."""
    source = f"data.sources=[{{path: {files / 'more.parquet'}}}]"
    options = ("output.name=weightless", *NO_ANSWERS, source, "max_steps=1", "vision_loss_weight=0")
    assert main(files / "run.yaml", *options) == 1
    assert "all its samples have images, and vision_loss_weight is 0; raise it" in capsys.readouterr().err
    assert not (files / "runs" / "weightless" / "final").exists()


def test_steps_without_samples_are_told(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where others had some: the run is done, and says how many had none."""
    few = ("gradient_accumulation_steps=1", "micro_batch_size=1", "data.max_rejected_fraction=1", "data.max_length=150")
    options = ("output.name=holes", *NO_ANSWERS, *few, "epochs=1", "--num-samples", "12")
    assert main(files / "run.yaml", *options) == 0
    empty = sum(not line["supervised_tokens"] for line in lines(files / "runs" / "holes" / "metrics.jsonl"))
    assert 0 < empty < 12
    assert f"warning: {empty} of the 12 steps had no sample to learn from\n" in capsys.readouterr().out
    assert json.loads((files / "runs" / "holes" / "summary.json").read_text())["empty_steps"] == empty


def test_ctrl_c_and_sigterm_save_first(files: Path, tmp_path: Path) -> None:
    """Exit status 130 and 143; the same command goes on, and ends as the run that was left alone."""
    started = {}
    for name in ("interrupted", "terminated"):
        planned = tmp_path / name
        planned.mkdir()
        plan_faults(planned, ("micro_batch", 3, 0, "wait"))
        arguments = ("--config", str(files / "run.yaml"), *LOCAL, *SHORT, f"output.name={name}")
        started[name] = Command("train", *arguments, env=os.environ | {faults.FOLDER: str(planned)})
    for name, number, status in (("interrupted", signal.SIGINT, 130), ("terminated", signal.SIGTERM, 143)):
        started[name].wait_until((tmp_path / name / "00.json.done").exists)
        started[name].send_signal(number)
        (tmp_path / name / "00.json.go").touch()
        assert "the same command goes on from there" in started[name].ended(status)
    assert main(files / "run.yaml", *SHORT, "output.name=interrupted", "--resume", "must") == 0
    assert main(files / "run.yaml", *SHORT, "output.name=alone") == 0
    assert_same_weights(files / "runs" / "interrupted", files / "runs" / "alone")


def test_a_run_without_steps_is_the_fitted_student(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exported and measured as what it is; asked again it says so, and another config does not write over it."""
    arguments = ["--config", str(files / "run.yaml"), *LOCAL, "output.name=of-no-steps", "evaluation.every_steps=null"]
    arguments.append("cluster.threads_per_worker=null")
    assert vlskv_ray.fit.main(arguments) == 0
    run = files / "runs" / "of-no-steps-fit"
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert columns(evaluation) == ["teacher", "student copied", "student fitted"]
    assert "mean of" not in capsys.readouterr().out and (run / "report.html").exists()
    exported = dict(build_student(find_model(str(run / "final"))).named_parameters())
    fitted = read_weights(run / "start.safetensors")
    assert fitted and all(torch.equal(exported[name], weight) for name, weight in fitted.items())
    left_out = {(row["step"], row["id"]) for row in lines(run / "rejected.jsonl")}
    assert left_out == {(0, f"chat.jsonl:{number}") for number in (9, 14, 22)}
    assert sum(json.loads((run / "summary.json").read_text())["rejected"].values()) == 3
    assert vlskv_ray.fit.main(arguments) == 0 and "already finished" in capsys.readouterr().out
    assert vlskv_ray.fit.main([*arguments, "seed=5"]) == 2
    assert "of-no-steps-fit: holds a run of another config: seed was 0 and is 5; use" in capsys.readouterr().err
    few = [*arguments, "output.name=few", "data.max_rejected_fraction=0.01"]
    assert [vlskv_ray.fit.main(few) for _ in range(2)] == [1, 1]
    assert "3 of the 52 samples so far had to be left out" in capsys.readouterr().err
    assert len(lines(files / "runs" / "few-fit" / "rejected.jsonl")) == 3
    assert vlskv_ray.fit.main([*arguments, "objective=sft"]) == 2
    assert vlskv_ray.fit.main([*arguments, f"model.name_or_path={run / 'final'}"]) == 2
    assert "is a student already" in capsys.readouterr().err
