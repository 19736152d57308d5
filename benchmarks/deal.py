"""The plan of very many samples for very many workers: how long any step of it takes, and whether it deals them all."""

import multiprocessing
import pickle
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlskv_ray.data.plan import NO_SAMPLE, Plan, Table

PIECE = 2**22
"""Lengths written at a time."""
LONGEST_SAMPLE = 4096
"""Tokens."""


def plan_of(rows: int, workers: int, folder: Path, *, micro_batch_size: int = 8) -> Plan:
    """A plan of one micro-batch a worker and step, whose samples are of random lengths that lie in a file."""
    path = folder / "lengths.npy"
    lengths = np.lib.format.open_memmap(path, "w+", np.uint16, (rows,))
    rng = np.random.default_rng(0)
    for at in range(0, rows, PIECE):
        lengths[at : at + PIECE] = rng.integers(1, LONGEST_SAMPLE, min(PIECE, rows - at))
    lengths.flush()
    return Plan(
        [Table(rows)],
        np.load(path, mmap_mode="r"),
        seed=0,
        micro_batch_size=micro_batch_size,
        micro_batches_per_step=workers,
        shares_per_step=workers,
    )


def travelled(plan: Plan) -> Plan:
    """As another process gets it."""
    copy: Plan = pickle.loads(pickle.dumps(plan))
    return copy


def hands(plan: Plan, step: int, workers: int) -> NDArray[np.int64]:
    """int64[workers, micro-batches of each, micro_batch_size]: a step, dealt in turn as `streaming_split` deals blocks
    of one row."""
    return plan.micro_batches(step).reshape(-1, workers, plan.micro_batch_size).swapaxes(0, 1)


def together(of_workers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The micro-batches of a step in the order of the plan, from the hands of any number of workers."""
    return of_workers.swapaxes(0, 1).reshape(-1, of_workers.shape[-1])


def deal_an_epoch(plan: Plan, workers: int, epoch: int = 0) -> dict[str, int]:
    """Every step of an epoch dealt to the workers: samples dealt in all, different ones among them, and how many the
    workers with most and with fewest had."""
    seen = np.zeros(len(plan.lengths), dtype=bool)
    dealt = np.zeros(workers, dtype=np.int64)
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        of_workers = hands(plan, step, workers)
        there = of_workers != NO_SAMPLE
        seen[of_workers[there]] = True
        dealt += there.sum((1, 2))
    return {
        "dealt": int(dealt.sum()),
        "different": int(seen.sum()),
        "most": int(dealt.max()),
        "least": int(dealt.min()),
    }


def same_after_resume(plan: Plan, steps: NDArray[np.int64], workers: int) -> bool:
    """Whether a process that goes on at each of these steps, with as many workers or half of them, deals what one does
    that has come there from the step before."""
    for step in steps.tolist():
        before = travelled(plan)
        if step:
            before.micro_batches(step - 1)
        wanted = before.micro_batches(step)
        for count in (workers, workers // 2):
            if not np.array_equal(together(hands(travelled(plan), step, count)), wanted):
                return False
    return True


def random_steps(plan: Plan, count: int) -> NDArray[np.int64]:
    """Steps of the first three epochs."""
    return np.random.default_rng(1).integers(0, 3 * plan.steps_per_epoch, count)


def peak_of_steps(plan: Plan, steps: NDArray[np.int64]) -> int:
    """The most bytes that Python and NumPy hold at once for a plan and some of its steps, its lengths in the file
    apart."""
    content = pickle.dumps(plan)
    tracemalloc.start()
    try:
        copy = pickle.loads(content)
        for step in steps.tolist():
            copy.micro_batches(step)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def seconds_of_steps(plan: Plan, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64[2, steps]: what each of some steps takes by itself, on the clock and of a CPU."""
    clocks = (time.perf_counter, time.thread_time)
    seconds = []
    for step in steps.tolist():
        began = [clock() for clock in clocks]
        plan.micro_batches(step)
        seconds.append([clock() - then for clock, then in zip(clocks, began, strict=True)])
    return np.array(seconds).T


def resident_bytes() -> int:
    """Of this process, files that it maps apart."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status tells no RssAnon")


def elsewhere(content: bytes, steps: int, repeats: int) -> dict[str, Any]:
    """In a process that has just begun, as a data worker: what random steps take, and by how much it grows."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_elsewhere, args=(content, steps, repeats, results))
    process.start()
    found: dict[str, Any] = results.get()
    process.join()
    return found


def _elsewhere(content: bytes, steps: int, repeats: int, results: Any) -> None:
    before = resident_bytes()
    plan = pickle.loads(content)
    rounds = [
        np.percentile(seconds_of_steps(plan, random_steps(plan, steps)), [50, 99], axis=1).T for _ in range(repeats)
    ]
    on_the_clock, of_a_cpu = np.median(rounds, axis=0).tolist()
    results.put(
        {"step_seconds": on_the_clock, "step_cpu_seconds": of_a_cpu, "resident_bytes": resident_bytes() - before}
    )


def measure(folder: Path, rows: int, workers: int, steps: int, repeats: int) -> dict[str, Any]:
    """All of it: so many random steps so many times, and one epoch."""
    plan = plan_of(rows, workers, folder)
    began = time.perf_counter()
    epoch = deal_an_epoch(plan, workers)
    epoch_seconds = time.perf_counter() - began
    return {
        "rows": rows,
        "workers": workers,
        "micro_batch_size": plan.micro_batch_size,
        "steps_per_epoch": plan.steps_per_epoch,
        **elsewhere(pickle.dumps(plan), steps, repeats),
        "peak_bytes": peak_of_steps(plan, random_steps(plan, min(steps, 200))),
        "pickled_bytes": len(pickle.dumps(plan)),
        "file_bytes": (folder / "lengths.npy").stat().st_size,
        "epoch_seconds": epoch_seconds,
        "epoch": epoch,
        "same_after_resume": same_after_resume(plan, random_steps(plan, 100), workers),
    }
