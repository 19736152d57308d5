"""How workers' gradients are added up, measured between processes of this machine: gloo over its loopback network."""

import multiprocessing
import socket
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from vlskv_ray.training.step import add_of_all_workers

LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def exchange(processes: int, mebibytes: int, repeats: int) -> dict[str, Any]:
    """Between so many processes, for a gradient of that size: seconds of an all-reduce, and of what
    `cluster.bit_identical` does for one micro-batch of each; and the bytes that each process sends, over those that it
    should."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    port = free_port()
    workers = [
        context.Process(target=_worker, args=(rank, processes, port, mebibytes * 2**20, repeats, results))
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"processes of the exchange ended with {[worker.exitcode for worker in workers]}")
    return {"processes": processes, "mebibytes": mebibytes, **results.get()}


def _worker(rank: int, processes: int, port: int, size: int, repeats: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    gradient, total = torch.ones(size // 4), torch.zeros(size // 4)
    reduced, sent = timed(lambda: dist.all_reduce(gradient), repeats)
    in_order, sent_in_order = timed(lambda: add_of_all_workers(total, gradient), repeats)
    if rank == 0:
        should, should_in_order = 2 * (processes - 1) * size, processes * (processes - 1) * size  # of all together
        results.put(
            {
                "seconds": reduced,
                "bytes_over_computed": sent / should,
                "in_plan_order_seconds": in_order,
                "in_plan_order_bytes_over_computed": sent_in_order / should_in_order,
            }
        )
    dist.barrier()
    dist.destroy_process_group()


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds of what all processes do together, and what this machine's loopback carried each time."""
    work()  # connects, and touches all memory
    seconds = []
    carried = int(LOOPBACK.read_text())
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        work()
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    return median(seconds), (int(LOOPBACK.read_text()) - carried) / repeats
