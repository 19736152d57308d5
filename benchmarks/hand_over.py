"""How fast Ray hands micro-batches over, and how long it takes to begin: the package's own data graph, with
micro-batches that hold nothing and so cost nothing to make.

It is a module of its own since Ray's processes import it.
"""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recovery import processes
from vlskv_ray.cluster.start import ENVIRONMENT
from vlskv_ray.data.collate import Batch, collate
from vlskv_ray.data.pipeline import ROWS_PER_EXECUTION, begin_at, ray_batches, ray_dataset
from vlskv_ray.data.plan import Plan, Table

PER_STEP = 64
"""Micro-batches, so that every number of consumers that is tried shares them equally."""
WARM_UP = 128
"""Rows of an execution that do not count."""
STORE = 2**28
"""Bytes of Ray's object store: enough for micro-batches that hold nothing."""


@dataclass(frozen=True)
class NothingLoader:
    """In the place of `vlskv_ray.data.pipeline.Loader`: micro-batches without samples, in the order of a plan."""

    plan: Plan

    def __call__(self, row: dict[str, Any]) -> Batch:
        return collate([], 0, step=int(row["step"]), micro_batch=int(row["micro_batch"]))


def loader_of(rows: int) -> Any:
    """A loader of so many micro-batches."""
    lengths = np.broadcast_to(np.uint16(0), rows)
    return NothingLoader(Plan([Table(rows)], lengths, seed=0, micro_batch_size=1, micro_batches_per_step=PER_STEP))


@contextmanager
def private_cluster(cpus: int) -> Iterator[None]:
    """A Ray of our own on this machine, with its files in a folder that goes with it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    folder = tempfile.mkdtemp(prefix="ray-")
    ray.init(
        address="local",
        num_cpus=cpus,
        object_store_memory=STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=folder,
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def take_all(shards: Sequence[Any], steps: int, executions: int, first_step: str) -> list[list[tuple[int, float]]]:
    """What some consumers get, a thread each: of every micro-batch its place in the run, and when it came.

    Args:
        shards: of the consumers in this process.
        steps: of one execution.
        executions: how many, one after another.
        first_step: see `begin_at`; the first consumer says it.
    """
    taken: list[list[tuple[int, float]]] = [[] for _ in shards]

    def consume(shard: Any, mine: list[tuple[int, float]]) -> None:
        for execution in range(executions):
            begin_at(Path(first_step), execution * steps)  # all say the same
            mine.append((-1, time.time()))
            mine += ((batch.step * PER_STEP + batch.micro_batch, time.time()) for batch in ray_batches(shard))

    threads = [threading.Thread(target=consume, args=pair) for pair in zip(shards, taken, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def hand_over(consumers: int, rows: int, executions: int, folder: Path, tasks: int = 2) -> dict[str, Any]:
    """So many rows, again and again, dealt to so many consumers by the package's data graph, on the Ray there is.

    Returns:
        `rows_per_second` of each execution; `pause_seconds` from the last row of one to the first of the next, all
        consumers ready; `first_seconds` to the first row of all; `coordinator_seconds` of a CPU for each row, of the
        one process that deals; `in_turn`, whether each consumer got just its rows, in the order of the plan.
    """
    import ray

    steps, first_step = rows // PER_STEP, folder / "first_step"
    dataset = ray_dataset(loader_of(rows), steps, first_step, cpus_per_task=0.5, num_tasks=tasks)
    dataset.context.execution_options.preserve_order = True  # as `DataConfig` has it in a run
    shards = dataset.streaming_split(consumers, equal=True)
    (coordinator,) = coordinators()
    at_a_time = -(-consumers // 4)  # at most four processes: more would be in each other's way
    take = ray.remote(num_cpus=0)(take_all)
    begin_at(first_step, 0)
    before = cpu_seconds(coordinator)
    results = ray.get(
        [
            take.remote(shards[at : at + at_a_time], steps, executions, str(first_step))
            for at in range(0, consumers, at_a_time)
        ]
    )
    spent = cpu_seconds(coordinator) - before
    return {
        "consumers": consumers,
        "rows": rows,
        "coordinator_seconds": spent / rows / executions,
        **figures_of([taken for of_process in results for taken in of_process], rows, executions),
    }


def figures_of(of_consumers: Sequence[Sequence[tuple[int, float]]], rows: int, executions: int) -> dict[str, Any]:
    """Rates and pauses by what each consumer wrote down, see `take_all`."""
    count = len(of_consumers)
    in_turn = all(
        [place for place, _ in taken if place >= 0] == list(range(rank, rows * executions, count))
        for rank, taken in enumerate(of_consumers)
    )
    came = np.zeros(rows * executions)
    for taken in of_consumers:
        for place, when in taken:
            if place >= 0:
                came[place] = when
    of_executions = np.sort(came.reshape(executions, rows), axis=1)
    began = max(taken[0][1] for taken in of_consumers)
    warm = min(WARM_UP, rows // 2)
    return {
        "in_turn": in_turn,
        "rows_per_second": ((rows - warm) / (of_executions[:, -1] - of_executions[:, warm - 1])).tolist(),
        "first_seconds": float(of_executions[0, 0] - began),
        "pause_seconds": (of_executions[1:, 0] - of_executions[:-1, -1]).tolist(),
    }


def coordinators() -> list[int]:
    """Process ids of the actors of this process's Ray that deal rows, once they have begun."""
    for _ in range(600):
        if found := processes(b"SplitCoordinator", os.getpid()):
            return found
        time.sleep(0.1)
    raise RuntimeError("Ray started no SplitCoordinator within a minute")


def cpu_seconds(pid: int) -> float:
    """That a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def seconds_to_tell(folder: Path, rows: int = ROWS_PER_EXECUTION) -> float:
    """What telling Ray of so many rows takes, at every start of the workers."""
    began = time.perf_counter()
    ray_dataset(loader_of(rows), rows // PER_STEP, folder / "first_step", cpus_per_task=0.5, num_tasks=1)
    return time.perf_counter() - began
