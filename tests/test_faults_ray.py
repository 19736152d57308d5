"""What takes minutes, for `make test-faults` and `make soak`: nodes lost and back, and kills at random moments."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from clusters import Command, plan_faults, worker_processes
from runs import assert_ended_as, assert_same_run, lines, write_config, write_files
from waiting import HANG_SECONDS

from benchmarks.recovery import last_step

pytestmark = [pytest.mark.ray, pytest.mark.faults]
MOMENTS = [
    ("fit", 0),
    ("step", 0),
    ("micro_batch", 2),
    ("reduce", 5),
    ("updated", 6),
    ("save_tensors", 8),
    ("save_renamed", 12),
    ("save_committed", 16),
    ("evaluate_on_the_way", 10),
    ("updated", 14),
    ("evaluate", 21),
    ("end", 21),
]
"""Of a run of three epochs of 7 steps: phase, and steps that were done before."""
OF_RANK_0 = {"save_tensors", "save_renamed", "save_committed", "end"}
VICTIMS = {"worker 0": b"RayTrainWorker", "worker 1": b"RayTrainWorker", "data worker": b"MapWorker"}
VICTIMS |= {"controller": b"TrainController", "command": b""}


@pytest.mark.parametrize("victim", VICTIMS)
def test_each_process_killed_at_each_moment(
    cluster: dict[str, str], files: Path, left_alone: Path, planned: Path, victim: str
) -> None:
    """One run that loses the same kind of process at all of these moments."""
    rank = int(victim[-1]) if victim[-1].isdigit() else 0
    moments = sorted(
        ((phase, step) for phase, step in MOMENTS if not (rank and phase in OF_RANK_0)), key=lambda m: m[1]
    )
    of_a_worker = victim.startswith("worker")
    plan_faults(planned, *((phase, step, rank, "kill" if of_a_worker else "wait") for phase, step in moments))
    name = f"output.name=matrix-{victim.replace(' ', '-')}"
    of_its_own = f"model.teacher_cache_dir={files / 'caches' / victim.replace(' ', '-')}"  # where no fit is found
    arguments = ("--config", str(files / "run.yaml"), name, of_its_own, f"cluster.max_failures={2 * len(moments)}")
    process = Command("train", *arguments, env=cluster)
    for i in range(0 if of_a_worker else len(moments)):
        process.wait_until((planned / f"{i:02}.json.done").exists)
        title = VICTIMS[victim]
        for pid in worker_processes(title)[:1] if title else [process.pid]:
            os.kill(pid, signal.SIGKILL)
        (planned / f"{i:02}.json.go").touch()  # whatever outlives it goes on
        if victim == "command":
            process.wait()
            process = Command("train", *arguments, env=cluster)
    process.ended()
    assert len(list(planned.glob("*.done"))) == len(moments)
    assert_ended_as(files / "runs" / name.partition("=")[2], left_alone)


@contextmanager
def two_nodes(folder: Path, teacher: Path, every_steps: int) -> Iterator[tuple[Any, Any, Command]]:
    """Two nodes on one machine, the second of them, and a run of 1 or 2 workers that has begun on them."""
    from ray.cluster_utils import Cluster

    write_files(folder)
    write_config(
        folder,
        teacher,
        epochs=400,
        cluster={"num_workers": [1, 2], "threads_per_worker": 1},
        checkpoint={"every_steps": every_steps},
        evaluation={},
        output={"dir": str(folder / "runs"), "name": "run", "order": True, "tensorboard": False},
    )
    settings = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "RAY_AUTH_MODE": "disabled",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        try:
            second = nodes.add_node(num_cpus=2)
            yield (
                nodes,
                second,
                Command("train", "--config", str(folder / "run.yaml"), env=os.environ | {"RAY_ADDRESS": nodes.address}),
            )
        finally:
            nodes.shutdown()


def test_a_node_is_lost_and_comes_back(tmp_path: Path, teacher_folder: Callable[..., Path]) -> None:
    """1 or 2 workers on two nodes: one goes on alone, and shares the work when the other is back."""
    run = tmp_path / "runs" / "run"
    with two_nodes(tmp_path, teacher_folder(), every_steps=20) as (nodes, second, process):
        process.wait_until(lambda: last_step(run) >= 50)
        assert len(worker_processes()) == 2
        nodes.remove_node(second, allow_graceful=False)
        lost_at = last_step(run)
        process.wait_until(lambda: len(worker_processes()) == 1 and last_step(run) > lost_at + 50)
        nodes.add_node(num_cpus=2)
        back_at = last_step(run)
        process.wait_until(lambda: len(worker_processes()) == 2 and last_step(run) > back_at + 50)
        process.send_signal(signal.SIGTERM)  # it has shown what it can; stop and look
        process.ended(143)
    order = lines(run / "order.jsonl")
    assert [line["step"] for line in order] == list(range(1, len(order) + 1))
    bad = {"chat.jsonl:9", "chat.jsonl:14", "chat.jsonl:22"}
    for epoch in range(len(order) // 7):
        of_epoch = order[7 * epoch : 7 * epoch + 7]
        seen = Counter(uid for line in of_epoch for batch in line["micro_batches"] for uid in batch)
        assert len(seen) == 49 and set(seen.values()) == {1} and not bad & set(seen)


def test_a_node_that_is_about_to_go_is_saved_for(tmp_path: Path, teacher_folder: Callable[..., Path]) -> None:
    """Told that a node is drained, the run saves at once, and goes on from there with the workers that are left."""
    run = tmp_path / "runs" / "run"
    with two_nodes(tmp_path, teacher_folder(), every_steps=100_000) as (nodes, second, process):
        process.wait_until(lambda: last_step(run) >= 20)
        drain = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        drain += ["--node-id", second.node_id, "--deadline-remaining-seconds", "600"]
        ray_command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", nodes.address]
        subprocess.run([*ray_command, *drain], check=True, capture_output=True, text=True)
        checkpoints = run / "checkpoints"
        process.wait_until(lambda: any(checkpoints.glob("step-*/COMMIT")))
        nodes.remove_node(second, allow_graceful=False)
        process.wait_until(lambda: len(worker_processes()) == 1 and last_step(run) > 0)
        (saved,) = (int(path.name[5:]) for path in checkpoints.iterdir())
        process.wait_until(lambda: last_step(run) > saved + 20)
        process.send_signal(signal.SIGTERM)
        process.ended(143)
    order = lines(run / "order.jsonl")
    assert [line["step"] for line in order] == list(range(1, len(order) + 1))


def kill_one(process: Command, dice: random.Random) -> str:
    """Ends a process of the run at once; its kind, empty where there was none of that kind."""
    title = dice.choice(list(VICTIMS.values()))
    pids = worker_processes(title) if title else [process.pid]
    if not pids:
        return ""
    with suppress(ProcessLookupError):
        os.kill(dice.choice(pids), signal.SIGKILL)
    return title.decode() or "command"


def test_killed_at_random_moments(tmp_path: Path, teacher_folder: Callable[..., Path]) -> None:
    """For SOAK_SECONDS, every 20 seconds on average; each run that is finished meanwhile ends as the one left alone."""
    write_files(tmp_path)
    config = write_config(
        tmp_path,
        teacher_folder(),
        epochs=2,
        cluster={"num_workers": 2, "threads_per_worker": 1, "address": "local", "max_failures": 1000},
        checkpoint={"every_steps": 20},
        evaluation={},
        output={"dir": str(tmp_path / "runs"), "name": "alone", "order": True, "tensorboard": False},
    )
    content = yaml.safe_load(config.read_text())
    content["data"]["sources"].append({"name": "shapes", "num_samples": 800})
    config.write_text(yaml.dump(content))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}

    def start(name: str) -> Command:
        return Command("train", "--config", str(config), f"output.name={name}", env=environment)

    start("alone").ended()
    alone, dice = tmp_path / "runs" / "alone", random.Random(0)
    kills: Counter[str] = Counter()
    finished, process = 0, start("run-0")
    until = time.monotonic() + float(os.environ.get("SOAK_SECONDS", "90"))
    while time.monotonic() < until or process is not None:
        pause = time.monotonic() + dice.expovariate(1 / 20)
        while process.poll() is None and time.monotonic() < (pause if pause < until else until + HANG_SECONDS):
            time.sleep(0.05)
        assert time.monotonic() < until + HANG_SECONDS, process.printed()  # it hangs
        if process.poll() is None:
            kills[kill_one(process, dice)] += 1
            continue
        log = process.printed()
        if process.returncode == 0:
            assert_same_run(tmp_path / "runs" / f"run-{finished}", alone)
            finished += 1
            if time.monotonic() >= until:
                break
        else:  # killed itself, or the same step three times by chance
            assert process.returncode == -signal.SIGKILL or "was begun 3 times" in log.splitlines()[-1], log
        process = start(f"run-{finished}")
    print(f"{sum(kills.values())} kills ({dict(kills)}), {finished} runs ended as the one left alone")
    assert finished and sum(kills.values()) >= 2
