"""Sweeps on real Ray Tune: all of their trials, whatever is killed, and one teacher pass for all of them."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from clusters import Command, has_ended
from waiting import wait_until

from benchmarks.recovery import processes
from vlskv_ray.cluster.shares import Cluster
from vlskv_ray.config import ClusterConfig, load_config
from vlskv_ray.data.pipeline import local_batches
from vlskv_ray.launch.prepare import prepare
from vlskv_ray.model.build import build_student, find_model
from vlskv_ray.sweep.space import trials_of
from vlskv_ray.sweep.trial_resources import concurrent_trials
from vlskv_ray.training.distill import cached_pass, frozen_states, shared_pass
from vlskv_ray.training.profiling import flop_counter
from vlskv_ray.tune import main

ROOT = Path(__file__).parent.parent
N = "model.num_key_value_layers"


def write_config(folder: Path, teacher: Path, space: dict[str, Any], **changes: Any) -> Path:
    config = {
        "epochs": 2,
        "micro_batch_size": 4,
        "model": {"name_or_path": str(teacher), "teacher_cache": "disk"},
        "data": {"sources": [{"name": "shapes", "num_samples": 120}]},
        "optimizer": {"lr": 1e-3},
        "cluster": {"num_workers": 0, "address": "local"},
        "checkpoint": {"every_steps": 10},
        "evaluation": {"sources": [{"name": "shapes", "split": "test"}], "num_samples": 16, "max_new_tokens": 4},
        "output": {"dir": str(folder / "runs"), "name": "sweep", "tensorboard": False},
        "tune": {"space": space},
    }
    for key, value in changes.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    (folder / "sweep.yaml").write_text(yaml.dump(config, sort_keys=False))
    return folder / "sweep.yaml"


def start(config: Path, *arguments: str) -> Command:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return Command("tune", "--config", str(config), *arguments, env=environment)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def points(sweep: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((sweep / "frontier.json").read_text())["points"]
    return found


@pytest.mark.cluster
def test_a_sweep_killed_and_stopped_ends_as_one_left_alone(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The same trials, figures and best; what fails is told and harms no other; no trial runs a teacher."""
    config = write_config(tmp_path, teacher_folder(), {N: [2, 4, 6], "data.max_length": [500, 6]})
    out = start(config, "output.name=alone").ended()
    alone = tmp_path / "runs" / "alone"
    assert "4 trials" in out and "left out      N6_max_length-500: model.num_key_value_layers: 6, but the text" in out
    assert "120 made, 0 were there, 0 left out" in out and "\x1b" not in out
    of_alone = json.loads((alone / "frontier.json").read_text())
    assert [point["name"] for point in of_alone["points"]] == ["N2_max_length-500", "N4_max_length-500"]
    assert of_alone["recommended"] in ("N2_max_length-500", "N4_max_length-500", None)
    assert {name: outcome["status"] for name, outcome in of_alone["others"].items()} == {
        "N2_max_length-6": "failed",
        "N4_max_length-6": "failed",
    }
    assert "too_long" in of_alone["others"]["N2_max_length-6"]["reason"]
    for name in ("N2_max_length-500", "N4_max_length-500"):
        metrics = lines(alone / "trials" / name / "metrics.jsonl")
        assert len(metrics) == 60 and all(line["cached_samples"] == line["samples"] == 4 for line in metrics)

    often, trials = tmp_path / "runs" / "often", tmp_path / "runs" / "often" / "trials"
    process = start(config, "output.name=often")
    process.wait_until(lambda: any(len(lines(path)) >= 15 for path in trials.glob("*/metrics.jsonl")))
    left = processes(b"ray::", process.pid)
    process.kill()
    process.wait()
    wait_until(lambda: all(has_ended(pid) for pid in left))
    before = {path.parent.name: path.stat().st_mtime_ns for path in trials.glob("*/trial.json")}
    process = start(config, "output.name=often", "--resume", "must")
    began = time.time()
    process.wait_until(lambda: any(path.stat().st_mtime > began for path in trials.glob("*/metrics.jsonl")))
    process.send_signal(signal.SIGTERM)
    out = process.ended(128 + signal.SIGTERM)
    assert "of 4 trials are done; the same command goes on with the others" in out
    assert "teacher cache 120 samples are there" in out
    start(config, "output.name=often").ended()
    assert points(often) == points(alone)
    assert json.loads((often / "frontier.json").read_text())["recommended"] == of_alone["recommended"]
    resumed = "".join((trials / point["name"] / "log.txt").read_text() for point in points(often))
    assert "error" not in resumed.lower()
    after = {path.parent.name: path.stat().st_mtime_ns for path in trials.glob("*/trial.json")}
    assert all(after[name] == when for name, when in before.items() if "500" in name)  # what was done is not redone


@pytest.mark.faults
def test_trials_with_workers_that_are_stopped_early_leave_their_cpus(
    teacher_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """One that falls behind is stopped, workers and all, and the next one finds room for its own."""
    config = write_config(
        tmp_path,
        teacher_folder(),
        {"optimizer.lr": [1e-3, 30.0, 20.0, 2e-3]},
        cluster={"num_workers": 2, "address": "local"},
        evaluation={"every_steps": 5},
        epochs=4,
        tune={"space": {"optimizer.lr": [1e-3, 30.0, 20.0, 2e-3]}, "scheduler": "asha"},
        optimizer={"lr": 1e-3, "max_grad_norm": None},
    )
    start(config).ended()
    found = json.loads((tmp_path / "runs" / "sweep" / "frontier.json").read_text())
    assert "stopped early" in {outcome["status"] for outcome in found["others"].values()}
    assert {"lr-0.001"} <= {point["name"] for point in found["points"]}
    assert len(found["points"]) + len(found["others"]) == 4
    assert "failed" not in {outcome["status"] for outcome in found["others"].values()}


@pytest.mark.cluster
def test_a_trial_whose_process_dies_is_told_of_and_tried_again(
    teacher_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """It ends as failed, with the reason; no other trial is harmed; a changed measure is not mixed in."""
    config = write_config(
        tmp_path, teacher_folder(), {N: [2, 4]}, cluster={"num_workers": 0, "address": "local", "max_failures": 0}
    )
    sweep = tmp_path / "runs" / "sweep"
    process = start(config, "tune.max_concurrent_trials=1")
    process.wait_until(lambda: len(lines(sweep / "trials" / "N2" / "metrics.jsonl")) > 3)
    (victim,) = processes(b"ray::ImplicitFunc", process.pid)
    os.kill(victim, signal.SIGKILL)
    process.ended()
    found = json.loads((sweep / "frontier.json").read_text())
    assert [point["name"] for point in found["points"]] == ["N4"]
    assert found["others"]["N2"]["status"] == "failed" and "its process ended" in found["others"]["N2"]["reason"]
    for other in (["evaluation.num_samples=8"], ["--num-samples", "8"], ["optimizer.lr=0.5"]):
        assert "this trial was begun with other options" in start(config, *other).ended(2)
    start(config).ended()
    assert [point["name"] for point in points(sweep)] == ["N2", "N4"]
    start(config, "tune.space={model.num_key_value_layers: [4]}").ended()
    assert [point["name"] for point in points(sweep)] == ["N4"]  # the other one is not of this space


@pytest.mark.faults
def test_optuna_goes_on_with_what_is_there(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Four trials in two goes of two: the second one is told of the first one's, and names are of their values."""
    space = {N: [2, 4], "optimizer.lr": {"loguniform": [1e-4, 1e-2]}}
    tune = {"space": space, "search": "optuna", "draws": 2}
    out = start(write_config(tmp_path, teacher_folder(), space, tune=tune, epochs=1)).ended()
    assert "up to 2 trials over model.num_key_value_layers, optimizer.lr" in out
    first = {point["name"]: point for point in points(tmp_path / "runs" / "sweep")}
    assert len(first) == 2
    start(write_config(tmp_path, teacher_folder(), space, tune=tune | {"draws": 4}, epochs=1)).ended()
    found = {point["name"]: point for point in points(tmp_path / "runs" / "sweep")}
    assert len(found) == 4 and all(found[name] == point for name, point in first.items())
    for point in found.values():
        assert point["values"][N] in (2, 4) and 1e-4 <= point["values"]["optimizer.lr"] <= 1e-2


def test_what_cannot_be_swept_is_told_before_anything_begins(
    teacher_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, teacher_folder(), {N: [2, 4]})
    for arguments, said in (
        (["tune.space={}"], "tune.space: nothing to try"),
        (["evaluation.sources=[]"], "evaluation.sources: missing; trials are compared"),
        (["tune.scheduler=asha"], "evaluation.every_steps: missing"),
        (["tune.space={model.num_key_value_layers: [6, 7]}"], "none of its 2 trials can be"),
        (["tune.space={optimizer.rate: [1]}"], "tune.space: optimizer.rate: unknown key; the keys here are"),
        (["tune.space={optimizer.lr: {normal: [0, 1]}}"], "optimizer.lr.normal: 'normal' is none of grid, choice, "),
        (["tune.space={optimizer: [1]}"], "tune.space: optimizer: is a section; name its options"),
        (["tune.space={optimizer.lr: [1e-3, x]}"], "optimizer.lr: wanted a number > 0, got 'x'"),
        (["tune.search=optuna"], "tune.draws: 1 trial"),
        (["--resume", "must"], "there is no sweep to go on with"),
        (["cluster.num_workers=2", "cluster.cpus_per_worker=64"], "so no data would ever come"),
    ):
        assert main(["--config", str(config), *arguments]) == 2, arguments
        assert said in capsys.readouterr().err
    assert not (tmp_path / "runs" / "sweep" / "ray").exists()


@pytest.mark.parametrize(
    ("options", "cpus", "gpus", "trials", "count"),
    [
        ({"num_workers": 0}, 2, 0, 6, 2),
        ({"num_workers": 0}, 16, 0, 6, 6),
        ({"num_workers": 0, "threads_per_worker": 4}, 16, 0, 6, 4),
        ({"num_workers": 2}, 2, 0, 6, 1),
        ({"num_workers": 2}, 16, 0, 6, 5),
        ({"num_workers": 2, "use_gpu": True}, 16, 4, 6, 2),
        ({"num_workers": 0, "use_gpu": True}, 16, 4, 6, 4),
    ],
)
def test_as_many_trials_as_there_is_room_for(
    options: dict[str, Any], cpus: float, gpus: float, trials: int, count: int
) -> None:
    config = load_config(ROOT / "configs" / "sweep-shapes.yaml")
    config = config.model_copy(update={"cluster": ClusterConfig(**options)})
    assert concurrent_trials(config, Cluster(cpus, joined=True, gpus=gpus), trials) == count


def test_a_dry_run_lists_the_trials(
    teacher_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, teacher_folder(), {N: [2, 3], "model.key_value_group_size": [1, 2]})
    assert main(["--config", str(config), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\nN2_g1\nN2_g2\nN3_g1\n")
    assert "left out      N3_g2: model: key_value_group_size=2 does not divide the 3 layers" in out
    assert not (tmp_path / "runs").exists()


def test_a_sweep_leaves_a_run_alone(
    teacher_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, teacher_folder(), {N: [2, 4]})
    (tmp_path / "runs" / "sweep").mkdir(parents=True)
    (tmp_path / "runs" / "sweep" / "metrics.jsonl").write_text("")
    assert main(["--config", str(config)]) == 2
    assert "holds a run, which a sweep does not touch" in capsys.readouterr().err


def test_one_pass_of_the_teacher_serves_all_trials() -> None:
    """For the sweep of configs/ less than a third of the teacher's operations that its trials would take, counted."""
    small = ["micro_batch_size=4", "output.level=error"]
    config = load_config(ROOT / "configs" / "sweep-shapes.yaml", small)
    batch, without = None, 0
    trials = trials_of(config)
    for trial in trials:
        changed = load_config(ROOT / "configs" / "sweep-shapes.yaml", [*trial.overrides, *small])
        model = changed.model
        student = build_student(find_model(model.name_or_path), model.num_key_value_layers, model.key_value_group_size)
        if batch is None:
            _, loader = prepare(changed)
            batch = next(local_batches(replace(loader, cache=None), 0, 1))
        with flop_counter() as whole, torch.no_grad():
            states = shared_pass(student, batch)
        cached = replace(batch, trunk=states.trunk, teacher=states.teacher, teacher_input=states.teacher_input)
        with flop_counter() as alone, torch.no_grad():
            cached_pass(student, cached)
        without += config.epochs * (whole.get_total_flops() - alone.get_total_flops())
    layers = sorted({trial.values[N] for trial in trials})
    student = build_student(find_model(config.model.name_or_path), layers[-1])
    assert batch is not None
    with flop_counter() as once:
        frozen_states(student, batch, layers)
    assert len(trials) == 6 and without > 3 * once.get_total_flops()
    assert without > 5 * once.get_total_flops()  # six trials, one pass, and a little for the student that comes with it
