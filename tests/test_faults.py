"""Killed at any moment, anything that is killed: the run ends as the one that was left alone, bit for bit."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import Evil
from clusters import free_ports
from runs import assert_same_run, lines, untimed, write_config, write_files
from waiting import HANG_SECONDS, wait_until

import vlskv_ray.train
from vlskv_ray.config import load_config_and_notices
from vlskv_ray.data.collate import Batch
from vlskv_ray.data.pipeline import local_batches
from vlskv_ray.launch.prepare import prepare
from vlskv_ray.report.finished import is_finished
from vlskv_ray.storage.checkpoint import newest_checkpoint
from vlskv_ray.train_loop import train_worker
from vlskv_ray.training import faults
from vlskv_ray.training.run import Worker
from vlskv_ray.training.watchdog import DEATHS

LOCAL = {"num_workers": 0, "threads_per_worker": 1}
STEPS, PER_EPOCH, EVERY = 14, 7, 4
KILLED = -signal.SIGKILL
# a process in which everything is imported, from which each command is forked: a second instead of six
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("vlskv_ray.launch.driver", "vlskv_ray.report.run_page", "datasets"),
        "transformers.models.llava_next.modeling_llava_next",
    ]
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Callable[..., Path]) -> Path:
    """Two epochs of 7 steps with rejects, images and text, answers measured on the way and at the end."""
    folder = tmp_path_factory.mktemp("faults")
    write_files(folder)
    evaluation = {"sources": [{"path": str(folder / "more.parquet")}], "max_new_tokens": 3, "every_steps": 5}
    write_config(
        folder,
        teacher_folder(),
        epochs=2,
        gradient_accumulation_steps=4,
        cluster=LOCAL,
        evaluation=evaluation,
        checkpoint={"every_steps": EVERY, "keep_last": 2},
        output={"dir": str(folder / "runs"), "name": "run", "order": True, "tensorboard": False},
    )
    return folder


def command(arguments: list[str], environment: dict[str, str], printed: Path) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(printed, "ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    raise SystemExit(vlskv_ray.train.main(arguments))


def started(files: Path, name: str, *arguments: str, **environment: str) -> Any:
    """The command in a process of its own."""
    options = ["--config", str(files / "run.yaml"), f"output.name={name}", *arguments]
    process = FORKS.Process(target=command, args=(options, environment, files / f"{name}.log"))
    process.start()
    return process


def wait_for(path: Path, process: Any) -> None:
    wait_until(path.exists, process.is_alive, lambda: f"{path} did not come")


def run(files: Path, name: str, *arguments: str, **environment: str) -> int | None:
    """The command's exit status, negative where a signal ended it."""
    process = started(files, name, *arguments, **environment)
    process.join(HANG_SECONDS)
    assert process.exitcode is not None, (files / f"{name}.log").read_text()
    return process.exitcode


def plant(folder: Path, *wanted: tuple[str, int, int], action: str = "kill") -> str:
    """A folder of faults (phase, step, rank), each of which happens once."""
    folder.mkdir()
    for i, (phase, step, rank) in enumerate(wanted):
        (folder / f"{i:02}.json").write_text(json.dumps({"phase": phase, "step": step, "rank": rank, "action": action}))
    return str(folder)


def own_fit(files: Path, name: str) -> str:
    """So that a run does not find the fit that another one made."""
    return f"model.teacher_cache_dir={files / 'caches' / name}"


def assert_same_end(folder: Path, alone: Path) -> None:
    """The same run, its evaluation too, and nothing left behind on the way."""
    assert_same_run(folder, alone)
    assert (folder / "checkpoints" / f"step-{STEPS:08d}").is_dir()
    a, b = (json.loads((run / "evaluation.json").read_text()) for run in (folder, alone))
    for timed in (a, b):
        timed.pop("savings")
    assert a == b
    assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()}
    assert {path.name for path in (folder / "final").iterdir()} == {path.name for path in (alone / "final").iterdir()}
    assert is_finished(folder)
    assert not [path for path in (folder / "checkpoints").iterdir() if not path.name.startswith("step-")]


@pytest.fixture(scope="module")
def alone(files: Path) -> Path:
    assert run(files, "alone") == 0, (files / "alone.log").read_text()
    return files / "runs" / "alone"


MOMENTS = [
    ("fit", 4),
    ("step", 0),
    ("micro_batch", 0),
    ("micro_batch", 5),
    ("reduce", 5),
    ("updated", 5),
    ("updated", EVERY),
    ("save_tensors", EVERY),
    ("save_tensors", 2 * EVERY),
    ("save_written", 2 * EVERY),
    ("save_renamed", 2 * EVERY),
    ("save_committed", 2 * EVERY),
    ("save_removing", 3 * EVERY),
    ("evaluate_on_the_way", 5),
    ("updated", PER_EPOCH),
    ("save_renamed", STEPS),
    ("save_committed", STEPS),
    ("export", STEPS),
    ("export_weights", STEPS),
    ("evaluate", STEPS),
    ("end", STEPS),
    ("summary", STEPS),
    ("report.html", 0),
    ("README.md", 0),
]


CHAINS = 4


@pytest.mark.parametrize("chain", range(CHAINS))
def test_killed_again_and_again(files: Path, alone: Path, chain: int) -> None:
    """At every fourth of these moments in turn, until none is left."""
    moments = MOMENTS[chain::CHAINS]
    planted = plant(files / f"faults-chain-{chain}", *((phase, step, 0) for phase, step in moments))
    ends = []
    while not ends or ends[-1] == KILLED:
        ends.append(run(files, f"chain-{chain}", own_fit(files, f"chain-{chain}"), **{faults.FOLDER: planted}))
    assert ends == [KILLED] * len(moments) + [0], (files / f"chain-{chain}.log").read_text()
    assert_same_end(files / "runs" / f"chain-{chain}", alone)


@pytest.mark.faults
@pytest.mark.parametrize(("phase", "step"), MOMENTS)
def test_killed_at_any_moment_it_ends_with_the_same_bits(files: Path, alone: Path, phase: str, step: int) -> None:
    """Once, and left alone from then on."""
    name = f"{phase}-{step}"
    planted = plant(files / f"faults-{name}", (phase, step, 0))
    assert run(files, name, own_fit(files, name), **{faults.FOLDER: planted}) == KILLED
    assert run(files, name, own_fit(files, name), **{faults.FOLDER: planted}) == 0, (files / f"{name}.log").read_text()
    assert_same_end(files / "runs" / name, alone)


def test_a_step_that_ends_its_worker_three_times_is_not_tried_again(files: Path, alone: Path) -> None:
    """Its samples are named; whoever starts the run once more has it tried once more."""
    planted = plant(files / "faults-poison", *[("micro_batch", 5, 0)] * 3)
    assert [run(files, "poison", **{faults.FOLDER: planted}) for _ in range(4)] == [KILLED] * 3 + [1]
    of_step = [uid for batch in lines(alone / "order.jsonl")[5]["micro_batches"] for uid in batch]
    (error,) = [line for line in (files / "poison.log").read_text().splitlines() if line.startswith("error: ")]
    assert "step 6 was begun 3 times" in error and all(uid in error for uid in of_step)
    assert run(files, "poison") == 0
    assert_same_end(files / "runs" / "poison", alone)


def test_an_end_from_outside_between_steps_is_not_the_steps_doing(files: Path, alone: Path) -> None:
    """However often it comes: while answers are measured, and after an update that was made."""
    moments = [("evaluate_on_the_way", 5, 0)] * DEATHS + [("updated", 7, 0)] * DEATHS
    planted = plant(files / "faults-outside", *moments)
    ends = [run(files, "outside", **{faults.FOLDER: planted}) for _ in range(len(moments) + 1)]
    assert ends == [KILLED] * len(moments) + [0], (files / "outside.log").read_text()
    assert_same_end(files / "runs" / "outside", alone)


def test_a_sample_that_ends_its_process_while_it_is_prepared_is_named(files: Path, alone: Path) -> None:
    """In one process; and that an end may have come from outside is said too."""
    planted = plant(files / "faults-prepared", *[("step", 5, 0)] * 3)
    assert [run(files, "prepared", **{faults.FOLDER: planted}) for _ in range(4)] == [KILLED] * 3 + [1]
    of_step = [uid for batch in lines(alone / "order.jsonl")[5]["micro_batches"] for uid in batch]
    (error,) = [line for line in (files / "prepared.log").read_text().splitlines() if line.startswith("error: ")]
    assert "step 6 was begun 3 times" in error and "or from outside" in error and all(uid in error for uid in of_step)
    assert "The same command tries it again" in error


# -------------------------------------------------------------------------------------------------- damaged on storage
def damage(checkpoint: Path, file: str, how: str, canary: Path) -> None:
    path = checkpoint / file
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
    path.unlink()
    if how != "remove":
        evil, garbage = pickle.dumps(Evil(canary)), os.urandom(500)
        path.write_bytes({"flip": content, "cut": content[:-9], "pickle": evil, "garbage": garbage}[how])


@pytest.fixture(scope="module")
def half_way(files: Path, alone: Path) -> Path:
    """A run that was killed in its 12th step, with checkpoints of steps 4 and 8."""
    planted = plant(files / "faults-half", ("reduce", 11, 0))
    assert run(files, "half", **{faults.FOLDER: planted}) == KILLED
    return files / "runs" / "half"


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("trainable.safetensors", "flip"),
        ("optimizer.safetensors", "cut"),
        ("state.json", "remove"),
        ("COMMIT", "remove"),
        ("manifest.json", "garbage"),
        *((name, "pickle") for name in ("trainable.safetensors", "optimizer.safetensors", "state.json", "COMMIT")),
    ],
)
def test_a_damaged_checkpoint_costs_steps_and_nothing_else(
    files: Path, alone: Path, half_way: Path, file: str, how: str
) -> None:
    name, canary = f"damaged-{file}-{how}", files / "canary"
    folder = files / "runs" / name
    shutil.copytree(half_way, folder)
    damage(folder / "checkpoints" / "step-00000008", file, how, canary)
    assert run(files, name) == 0, (files / f"{name}.log").read_text()
    said = (files / f"{name}.log").read_text()
    assert "resume        from step 4" in said and not canary.exists()
    assert ("looking for one before it" in said) == ((file, how) != ("COMMIT", "remove"))  # that was none yet
    for left in (folder / "checkpoints").glob("damaged-*"):  # kept for whoever wants to look at it
        shutil.rmtree(left)
    assert_same_end(folder, alone)


def test_what_ray_and_other_programs_left_does_no_harm(files: Path, alone: Path, half_way: Path) -> None:
    """A cut snapshot of Ray's controller, a log that ends in half a line, and an attempt.json of junk."""
    folder = files / "runs" / "littered"
    shutil.copytree(half_way, folder)
    (folder / "ray" / "attempt-1").mkdir(parents=True)
    (folder / "ray" / "attempt-1" / "checkpoint_manager_snapshot.json").write_text('{"checkpoints": [')
    (folder / "attempt.json").write_text('["junk"')
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "lo')
    assert run(files, "littered") == 0 and not (folder / "ray").exists()
    assert_same_end(folder, alone)


# -------------------------------------------------------------------------------------------------------- a full disk
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    path = folder / "filler"
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    return path


def test_a_full_disk_costs_checkpoints_not_the_run(files: Path, alone: Path, small_disk: Path) -> None:
    """Full from step 3 to step 9, with a checkpoint and many lines due between: told, and all is there at the end."""
    planted = Path(plant(files / "faults-disk", ("step", 3, 0), ("step", 9, 0), action="wait"))
    options = (f"output.dir={small_disk}", "checkpoint.keep_last=1")
    process = started(files, "disk", *options, **{faults.FOLDER: str(planted)})
    wait_for(planted / "00.json.done", process)
    filler = fill(small_disk)
    (planted / "00.json.go").touch()
    wait_for(planted / "01.json.done", process)
    held = list((small_disk / "disk" / "checkpoints").iterdir())
    filler.unlink()
    (planted / "01.json.go").touch()
    process.join(HANG_SECONDS)
    said = (files / "disk.log").read_text()
    assert process.exitcode == 0, said
    assert held == []  # neither a checkpoint nor half of one
    assert "warning: a checkpoint could not be written:" in said and "No space left on device" in said
    assert "warning: metrics.jsonl cannot be written" in said
    (small_disk / "disk" / "warnings.jsonl").unlink()
    assert_same_end(small_disk / "disk", alone)


@pytest.mark.parametrize("moment", ["export", "export_weights", "evaluate"])
def test_a_disk_that_is_full_at_the_end_is_one_line(files: Path, alone: Path, small_disk: Path, moment: str) -> None:
    """Before the weights, between them and the tokenizer, or after both: nothing half-written is left, and the same
    command goes on when there is room."""
    name = f"full-{moment}"
    planted = Path(plant(files / f"faults-{name}", (moment, STEPS, 0), action="wait"))
    options = (f"output.dir={small_disk}", "checkpoint.keep_last=1", "cluster.stall_seconds=60")
    process = started(files, name, *options, **{faults.FOLDER: str(planted)})
    wait_for(planted / "00.json.done", process)
    filler = fill(small_disk)
    (planted / "00.json.go").touch()
    process.join(HANG_SECONDS)
    said = (files / f"{name}.log").read_text()
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert process.exitcode == 1 and "Traceback" not in said
    assert "No space left on device" in error and "make room, and the same command goes on" in error
    if moment != "evaluate":
        assert str(small_disk / name / "final") in error and "its weights take 0.3" in error and "is free" in error
        assert not (small_disk / name / "final").exists()
    assert not (small_disk / name / ".writing-final").exists()
    filler.unlink()
    assert run(files, name, *options) == 0, (files / f"{name}.log").read_text()
    assert_same_end(small_disk / name, alone)


# ------------------------------------------------------------------------------------------ other numbers of workers
def work(rank: int, world: int, port: int, options: list[str], stop_after: int | None) -> None:
    """One of `world` gloo workers of a run, without Ray."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    config, _ = load_config_and_notices(options[0], options[1:])
    saved = newest_checkpoint(Path(config.output.dir) / str(config.output.name) / "checkpoints", warn=pytest.fail)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        run, loader = prepare(config, saved)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    run.stop_file.unlink(missing_ok=True)

    def batches_from(step: int) -> Iterator[Batch]:
        for batch in local_batches(loader, step, run.total_steps):
            if rank == 0 and batch.step == stop_after:
                run.stop_file.touch()
            if batch.micro_batch % world == rank:
                yield batch

    outcome = train_worker(run, Worker(rank, world), batches_from, loader.batch_of)
    assert outcome.status == ("done" if stop_after is None else "stopped"), outcome
    dist.destroy_process_group()


def run_on(files: Path, name: str, workers: int, stop_after: int | None = None) -> None:
    """So many workers go on with a run of 12 micro-batches a step, up to its end or a step."""
    options = [str(files / "run.yaml"), f"output.name={name}", f"cluster.num_workers={workers}", own_fit(files, name)]
    options += [f"gradient_accumulation_steps={12 // workers}", "cluster.bit_identical=true", "micro_batch_size=1"]
    options += ["evaluation.sources=[]", "evaluation.every_steps=null"]
    port = free_ports(1)[0]
    processes = [FORKS.Process(target=work, args=(rank, workers, port, options, stop_after)) for rank in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANG_SECONDS)
    assert [process.exitcode for process in processes] == [0] * workers


def test_any_number_of_workers_gives_the_same_bits(files: Path) -> None:
    """From the start, and going on: 2 after 4, 1 after 2, 2 after 1, 3 after 2."""
    run_on(files, "on-1", 1)
    run_on(files, "on-3", 3)
    for workers, stop_after in ((4, 2), (2, 4), (1, 6), (2, 8), (3, None)):
        run_on(files, "on-4-2-1-2-3", workers, stop_after)
    one = files / "runs" / "on-1"
    for name in ("on-3", "on-4-2-1-2-3"):
        other = files / "runs" / name
        (last,) = (path.name for path in (one / "checkpoints").iterdir() if not (path.name < "step-00000010"))
        for file in ("trainable", "optimizer"):
            path = f"checkpoints/{last}/{file}.safetensors"
            assert (one / path).read_bytes() == (other / path).read_bytes(), name
        assert untimed(one) == untimed(other)
        assert lines(one / "order.jsonl") == lines(other / "order.jsonl")
