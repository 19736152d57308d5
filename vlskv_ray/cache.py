"""The command `python -m vlskv_ray.cache`: fills the teacher cache of a run ahead of it, on all CPUs."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vlskv_ray.cluster import duration, ray_cluster
from vlskv_ray.command import DONE, exit_status, run_parser, shown, up_to
from vlskv_ray.config import load_config_and_notices
from vlskv_ray.data.pipeline import Loader
from vlskv_ray.distill import shared_pass
from vlskv_ray.prepare import check_cache, prepare
from vlskv_ray.run import Run
from vlskv_ray.step import autocast
from vlskv_ray.train_loop import model_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    what = "Fills the teacher cache of a run (model.teacher_cache=disk) ahead of it, on all CPUs."
    parser = run_parser("cache", what)
    parser.add_argument("--workers", type=up_to(10**5), metavar="N", help="processes; default: one a CPU")
    options, overrides = parser.parse_known_args(arguments)
    return exit_status(lambda: fill(options, overrides))


def fill(options: argparse.Namespace, overrides: list[str]) -> int:
    """Makes what is missing; returns the exit status. ValueError for what the user can mend."""
    config, _ = load_config_and_notices(options.config, ["model.teacher_cache=disk", *overrides])
    if config.model.teacher_cache != "disk":
        raise ValueError(f"model.teacher_cache: {config.model.teacher_cache}; only one on disk outlives this command")
    run, loader = prepare(config, num_samples=options.num_samples)
    assert run.cache is not None
    check_cache(run, loader)
    rows = list(rows_of(run, loader))
    wanted, made, done = sum(len(row["samples"]) for row in rows), 0, 0
    left_out: Counter[str] = Counter()
    with ray_cluster(config.cluster.address, quiet=config.output.level != "debug") as cluster:
        workers = min(options.workers or max(1, int(cluster.cpus)), len(rows))
        print(f"filling       {wanted} samples, {workers} processes", flush=True)
        began = told = time.monotonic()
        for result in results(run, loader, rows, workers, cpus=cluster.cpus / workers):
            done, made = done + result["samples"], made + result["made"]
            left_out.update(result["left_out"])
            if result["full"]:
                raise OSError(f"{run.cache.folder}: the disk is full; {made} samples were made")
            now = time.monotonic()
            if now - told >= 10 and done > wanted / 50:
                print(f"{done} of {wanted}  {duration((now - began) * (wanted - done) / done)} left", flush=True)
                told = now
    reasons = f": {', '.join(f'{count} x {reason}' for reason, count in left_out.most_common())}" if left_out else ""
    count = sum(left_out.values())
    print(
        f"{made} made, {wanted - made - count} were there, {count} left out{reasons}; "
        f"in {shown(run.cache.folder)}, for runs with model.teacher_cache=disk"
    )
    return DONE


def rows_of(run: Run, loader: Loader) -> Iterator[dict[str, Any]]:
    """Rows of the run's plan, without samples that come a second time."""
    seen: set[int] = set()
    for row in loader.plan.rows(0, run.total_steps):
        numbers = [int(number) for number in row["samples"] if int(number) not in seen]
        seen.update(numbers)
        if numbers:
            yield {"samples": numbers, "step": 0, "micro_batch": 0}


class CacheWorker:
    """A process that runs teacher and trunk over samples and keeps what they make of them."""

    def __init__(self, run: Run, loader: Loader) -> None:
        torch.set_num_threads(run.config.cluster.threads_per_worker or 1)
        self.run, self.loader, self.model = run, loader, model_of(run)

    @torch.no_grad()
    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        cache = self.run.cache
        assert cache is not None
        batch = self.loader(row)
        made = 0
        if batch.sample_ids and batch.trunk is None:
            made = sum(key not in cache for key in batch.keys)
            with autocast(self.model):
                states = shared_pass(self.model, batch)
            cache.put_batch(batch, states.trunk, states.teacher, states.teacher_input)
        left_out = Counter(rejected["reason"] for rejected in batch.rejected)
        return {"samples": len(row["samples"]), "made": made, "left_out": dict(left_out), "full": cache.full}


def results(
    run: Run, loader: Loader, rows: list[dict[str, Any]], workers: int, cpus: float
) -> Iterator[dict[str, Any]]:
    """What the workers say of each row, as they are done."""
    import ray
    from ray.util import ActorPool

    processes = [ray.remote(num_cpus=min(1.0, cpus))(CacheWorker).remote(run, loader) for _ in range(workers)]
    yield from ActorPool(processes).map_unordered(lambda process, row: process.__call__.remote(row), rows)


if __name__ == "__main__":
    sys.exit(main())
