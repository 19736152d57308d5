"""What is asked of a cluster at once: what is told of the wait for it, and what ends that."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import HOLDER, Command, head_node, small_run
from waiting import HANG_SECONDS, wait_until

from benchmarks.recovery import last_step
from vlskv_ray.cluster import placement
from vlskv_ray.cluster.placement import Wait, shortage, write_waits_to
from vlskv_ray.errors import NoRoom

WORKERS = [{"CPU": 0.5}, {"CPU": 0.5}, {"CPU": 0.25}]


def test_the_numbers_are_those_of_all_that_is_wanted() -> None:
    total = {"CPU": 4.0, "GPU": 2.0, "memory": 1e9}
    said = shortage(WORKERS, "2 workers and a data task", {"CPU": 0.75}, total)
    assert said == "2 workers and a data task must have 1.25 CPUs at once, and 0.75 of the cluster's 4 CPUs are free"
    said = shortage([{"CPU": 1.0, "GPU": 1}] * 2, "2 workers", {"CPU": 4.0, "memory": 1e9}, total)
    assert said.startswith("2 workers must have 2 CPUs and 2 GPUs at once, and 4 of the cluster's 4 CPUs and 0 of the ")
    assert said.endswith(" 2 GPUs are free")
    said = shortage([{"CPU": 3.0}], "one trial", {"CPU": 4.0}, {"CPU": 4.0})
    assert said.startswith("one trial must have 3 CPUs at once, and 4 of ") and said.endswith(
        "not on nodes where each has room"
    )


def test_a_wait_is_told_of_after_a_moment_then_every_minute_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was waited for and has come nothing more is said; the next wait begins anew."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    now, told = [1000.0], list[tuple[float, str]]()
    monkeypatch.setattr(placement.time, "monotonic", lambda: now[0])
    wait = Wait(150, lambda text: told.append((now[0], text)))

    def goes_on(seconds: int) -> None:
        for _ in range(seconds):
            wait.goes_on(WORKERS, "2 workers and a data task")
            now[0] += 1

    goes_on(4)
    wait.ends()
    assert not told
    began = now[0]
    with pytest.raises(
        NoRoom, match=r"^cluster.wait_seconds: 2 workers and a data task must have 1.25 CPUs at once, and 1 of .* 150 s"
    ):
        goes_on(1000)
    assert now[0] - began == 150 and [at - began for at, _ in told] == [5, 65, 125]
    assert re.fullmatch(r"waiting       2 workers .* are free; for 65 s by now, 150 s at most", told[1][1])


def test_a_wait_names_the_option_of_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(NoRoom) as told:
        Wait(0, print, "--workers", "or ask for fewer").goes_on(WORKERS, "2 processes")
    assert str(told.value).startswith("--workers: 2 processes must have 1.25 CPUs at once, ")
    assert str(told.value).endswith(
        "wait for what else runs on the cluster, or ask for fewer; the same command tries again"
    )


def test_lines_for_who_looks_later(tmp_path: Path) -> None:
    tell = write_waits_to(tmp_path / "ray" / "waiting")
    tell("a")
    tell("b")
    assert (tmp_path / "ray" / "waiting").read_text() == "a\nb\n"


COMMANDS = {
    "tune, without workers": ("tune", "cluster.num_workers=0", "a trial must have 1 CPUs at once"),
    "tune, with workers": ("tune", "cluster.num_workers=1", "a trial must have 1.5 CPUs at once"),
    "cache": ("cache", "cluster.num_workers=1", "1 process must have 1 CPUs at once"),
}


@pytest.mark.cluster
def test_commands_that_take_a_cluster_do_not_wait_for_ever(tmp_path: Path, teacher_folder: Callable[..., Path]) -> None:
    """While a job that is none of ours holds all of it: exit status 1, and the numbers."""
    small_run(tmp_path, teacher_folder(), evaluation={"sources": [{"name": "shapes", "num_samples": 4}]})
    space = "tune.space={model.num_key_value_layers: [2, 3]}"
    with head_node() as (_, environment):
        held, log = tmp_path / "held", tmp_path / "held.txt"
        with open(log, "w") as file:
            holder = subprocess.Popen(
                [sys.executable, "-c", HOLDER, str(held), "2"], env=environment, stdout=file, stderr=file
            )
        wait_until(held.exists, lambda: holder.poll() is None, log.read_text)
        for command, workers, told in COMMANDS.values():
            options = [workers, "cluster.wait_seconds=7", *([space] if command == "tune" else [])]
            found = subprocess.run(
                [sys.executable, "-m", f"vlskv_ray.{command}", "--config", str(tmp_path / "run.yaml"), *options],
                env=environment,
                capture_output=True,
                text=True,
                timeout=HANG_SECONDS,
            )
            assert found.returncode == 1, found
            assert f"\nwaiting       {told}, and 0 of the cluster's 2 CPUs are free; for " in found.stdout, found
            assert found.stderr.startswith(f"error: cluster.wait_seconds: {told}, and 0 of the cluster's 2 CPUs"), found
        held.unlink()
        assert holder.wait(HANG_SECONDS) == 0, log.read_text()


@pytest.mark.cluster
@pytest.mark.parametrize("asked_to_stop", [False, True])
def test_a_machine_that_is_lost_for_good_is_not_waited_for_in_silence(
    tmp_path: Path, teacher_folder: Callable[..., Path], asked_to_stop: bool
) -> None:
    """What is left has no room for all workers: the run says so, ends after cluster.wait_seconds, or at once where it
    is asked to. The same command then goes on, with smaller workers."""
    seconds = 600 if asked_to_stop else 8
    cluster = {"num_workers": 2, "threads_per_worker": 1, "cpus_per_worker": 1.5, "wait_seconds": seconds}
    small_run(tmp_path, teacher_folder(), epochs=100, cluster=cluster, checkpoint={"every_steps": 20})
    needed = "2 workers and a data task must have 3.5 CPUs at once, and "  # what is free Ray learns by and by
    arguments = ("train", "--config", str(tmp_path / "run.yaml"))
    with head_node() as (nodes, environment):
        second = nodes.add_node(num_cpus=2)
        process = Command(*arguments, env=environment)
        process.wait_until(lambda: last_step(tmp_path / "runs" / "run") >= 21)
        nodes.remove_node(second, allow_graceful=False)
        if asked_to_stop:
            process.wait_until(lambda: f"\nwaiting       {needed}" in process.printed())
            process.send_signal(signal.SIGINT)
        told = process.ended(130 if asked_to_stop else 1)
        assert f"\nwaiting       {needed}" in told, told
        end = next(line for line in reversed(told.splitlines()) if line.startswith(("error: ", "ended ")))
        if asked_to_stop:
            assert end.startswith("ended at once; "), told
        else:
            assert re.match(
                rf"error: cluster.wait_seconds: {needed}[\d.]+ of the cluster's [24] CPUs are free after", end
            ), told
            again = Command(*arguments, "cluster.cpus_per_worker=0.5", env=environment)
            assert "resume        from step " in again.ended()
