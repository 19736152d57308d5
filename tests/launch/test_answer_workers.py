"""Prompts answered by processes of a Ray cluster: the same file, whichever of them is killed when."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import HOLDER, Command, plan_faults
from test_answers import NUM_PARTS, NUM_ROWS, write_prompts
from waiting import wait_until

from vlskv_ray.answers import main
from vlskv_ray.cluster.shares import Cluster
from vlskv_ray.launch import answer_workers
from vlskv_ray.launch.answer_prompts import Prompts, find_teacher
from vlskv_ray.launch.answer_workers import MOST_LOST, Job, Sampling
from vlskv_ray.training import faults

pytestmark = pytest.mark.ray
OPTIONS = ("--threads", "1", "--batch-size", "2", "--max-new-tokens", "30", "--temperature", "50")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    write_prompts(folder)
    return folder


@pytest.fixture(scope="module")
def ask(folder: Path, teacher_folder: Callable[..., Path]) -> Callable[..., list[str]]:
    """The options of a command that writes an output of that name."""

    def arguments(name: str, *options: str) -> list[str]:
        data = ["--data", str(folder / "prompts.jsonl"), "--image-root", str(folder / "images")]
        return ["--model", str(teacher_folder()), *data, "--output", str(folder / name), *OPTIONS, *options]

    return arguments


@pytest.fixture(scope="module")
def in_one_process(folder: Path, ask: Callable[..., list[str]]) -> bytes:
    assert main(ask("one.jsonl", "--workers", "0")) == 0
    return (folder / "one.jsonl").read_bytes()


def journal_of(folder: Path, name: str) -> list[dict[str, object]]:
    """The batches that are answered so far."""
    return [json.loads(line) for line in (folder / f"{name}.partial" / "journal").read_text().splitlines()[1:]]


def test_workers_answer_as_one_process_does(
    cluster: dict[str, str], folder: Path, ask: Callable[..., list[str]], planned: Path, in_one_process: bytes
) -> None:
    """One of two is killed in the middle of its prompts, and what it has told of is not asked again."""
    plan_faults(planned, ("answers_of_worker", 1, 0, "kill"))
    told = Command("answers", *ask("two.jsonl", "--workers", "2"), env=cluster).ended()
    assert (planned / "00.json.done").exists()
    assert "answering     with 2 processes of 1 thread" in told
    assert (folder / "two.jsonl").read_bytes() == in_one_process
    assert not (folder / "two.jsonl.partial").exists()


@pytest.mark.faults
def test_workers_that_are_lost_again_and_again(
    cluster: dict[str, str], folder: Path, ask: Callable[..., list[str]], planned: Path
) -> None:
    """End the command, which says what may help and keeps what was answered."""
    plan_faults(planned, *[("answers_of_worker", 1, 0, "kill")] * (MOST_LOST + 1))
    told = Command("answers", *ask("lost.jsonl", "--workers", "1"), env=cluster).ended(1)
    last = told.splitlines()[-1]
    assert last.startswith("error: processes that answer are lost again and again: ")
    assert last.endswith("what is answered is kept, and the same command goes on")
    assert [line["window"] for line in journal_of(folder, "lost.jsonl")] == [0] * 2


def test_a_model_that_workers_cannot_load_is_one_line(
    cluster: dict[str, str], folder: Path, ask: Callable[..., list[str]], teacher_folder: Callable[..., Path]
) -> None:
    """As what is wrong with it is only seen by those who load its weights."""
    model = folder / "model"
    model.mkdir()
    for file in teacher_folder().iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (model / "config.json").write_text(json.dumps(config))
    told = Command("answers", *ask("bad.jsonl", "--model", str(model)), env=cluster).ended(2)
    last = told.splitlines()[-1]
    assert last.startswith(f"--model: {model}: ") and "weights" in last and "Traceback" not in told


def test_as_many_workers_as_there_are_cpus_memory_and_prompts(
    cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch, ask: Callable[..., list[str]]
) -> None:
    """And the CPUs shared out as threads; what is asked for is taken as it is."""
    job = Job(find_teacher(ask("x")[1]), Prompts((), ()), Sampling(), 4)
    eight = Cluster(8.0, joined=False, largest_node=4.0)
    assert answer_workers.share_out(job, 100, eight, None, None) == (8, 1)
    assert answer_workers.share_out(job, 100, eight, None, 2) == (4, 2)
    assert answer_workers.share_out(job, 3, eight, None, None) == (3, 2)
    assert answer_workers.share_out(job, 1, eight, None, None) == (1, 4)
    assert answer_workers.share_out(job, 100, eight, 20, None) == (20, 1)
    monkeypatch.setattr(answer_workers, "WEIGHTS_AND_REST", answer_workers.WEIGHTS_AND_REST * 1e9)
    assert answer_workers.share_out(job, 100, eight, None, None)[0] == 1


@pytest.mark.cluster
def test_room_is_waited_for(cluster: dict[str, str], folder: Path, ask: Callable[..., list[str]]) -> None:
    """While others hold the cluster, and it is told of."""
    import ray

    held = folder / "held"
    cpus = ray.cluster_resources()["CPU"]
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(held), str(cpus - 0.5)], env=cluster)
    try:
        wait_until(held.exists, lambda: holder.poll() is None)
        command = Command("answers", *ask("waits.jsonl", "--workers", "1"), env=cluster)
        command.wait_until(lambda: "waiting       1 process must have 1 CPUs at once" in command.printed())
        held.unlink()
        command.ended()
    finally:
        held.unlink(missing_ok=True)
        holder.wait()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("phase", "step"),
    [("answers_made", 0), ("answers_kept", 4), ("answers_write", NUM_PARTS), ("answers_written", NUM_PARTS)],
)
def test_the_command_is_killed(
    cluster: dict[str, str],
    folder: Path,
    ask: Callable[..., list[str]],
    tmp_path: Path,
    in_one_process: bytes,
    phase: str,
    step: int,
) -> None:
    """With its cluster still there: the same command goes on, asks nothing again, and ends with the same file."""
    name = f"{phase}.jsonl"
    plan_faults(tmp_path, (phase, step, 0, "kill"))
    command = Command("answers", *ask(name, "--workers", "2"), env=cluster | {faults.FOLDER: str(tmp_path)})
    command.ended(-signal.SIGKILL)
    assert len(journal_of(folder, name)) == step
    told = Command("answers", *ask(name, "--workers", "2"), env=cluster).ended()
    assert (f"of {NUM_ROWS} rows were done before" in told) == (step > 0)
    assert (folder / name).read_bytes() == in_one_process


@pytest.mark.faults
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal(
    cluster: dict[str, str], folder: Path, ask: Callable[..., list[str]], number: int, status: int
) -> None:
    """Keeps what is answered, and ends at once with the status that shells know."""
    name, options = f"{status}.jsonl", ("--workers", "2", "--max-new-tokens", "200")
    command = Command("answers", *ask(name, *options), env=cluster)
    journal = folder / f"{name}.partial" / "journal"
    command.wait_until(lambda: journal.exists() and len(journal.read_text().splitlines()) > 1)
    os.kill(command.pid, number)
    told = command.ended(status)
    assert "rows are done and kept in" in told and "Traceback" not in told
    assert 0 < len(journal_of(folder, name)) < NUM_PARTS
    assert "rows were done before" in Command("answers", *ask(name, *options), env=cluster).ended()
