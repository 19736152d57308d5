"""A teacher cache filled ahead of the runs that use it, on all CPUs or GPUs."""

import functools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlskv_ray.cluster.placement import Wait, room_for
from vlskv_ray.cluster.shares import Cluster, check_gpus
from vlskv_ray.config import changed
from vlskv_ray.data.collate import Batch, Encoded, FrozenStates
from vlskv_ray.data.pipeline import Loader
from vlskv_ray.data.sample import refused_message
from vlskv_ray.data.teacher_cache import TeacherCache
from vlskv_ray.errors import StoppedRun
from vlskv_ray.training.distill import frozen_states
from vlskv_ray.training.objective import build_model
from vlskv_ray.training.run import Run
from vlskv_ray.training.step import autocast
from vlskv_ray.words import format_duration, plural, short_path


class SeveralCaches:
    """The caches of one teacher for several N, which one pass over the samples fills together."""

    def __init__(self, by_layer: dict[int, TeacherCache]) -> None:
        self.by_layer = by_layer
        self.first = next(iter(by_layer.values()))

    @property
    def full(self) -> bool:
        return any(cache.full for cache in self.by_layer.values())

    def __contains__(self, key: str) -> bool:
        return all(key in cache for cache in self.by_layer.values())

    def get(self, key: str, uid: str) -> Encoded | None:
        """The sample as the first of them has it; None where one lacks it or has it damaged."""
        found = [cache.get(key, uid) for cache in self.by_layer.values()]
        return None if any(of_one is None for of_one in found) else found[0]

    def put_batch(self, batch: Batch, states: dict[int, FrozenStates]) -> None:
        """Keeps the samples of a batch that are not there yet, from its states for each N."""
        for layer, cache in self.by_layer.items():
            cache.put_batch(batch, states[layer].trunk, states[layer].teacher, states[layer].teacher_input)


def fill_ahead(
    run: Run, loader: Loader, caches: SeveralCaches, cluster: Cluster, workers: int | None = None, quiet: bool = False
) -> None:
    """Makes what is missing of the samples of a run, on all CPUs or GPUs, and tells of it.

    OSError where the disk is full; ValueError where there is no GPU for a run that wants them; StoppedRun where a row
    is refused; NoRoom where others hold the cluster for longer than this waits.
    """
    import ray

    tell = functools.partial(print, flush=True) if not quiet else lambda text: None
    check_gpus(run.config.cluster, cluster.gpus)
    wanted = samples_seen(run, loader)
    made = done = 0
    left_out: Counter[str] = Counter()
    at_most = int(cluster.gpus) if run.config.cluster.use_gpu else len(wanted)
    free = ray.available_resources().get("CPU", 0) if cluster.joined else cluster.cpus  # others may hold some
    workers = min(workers or max(1, int(free)), at_most, -(-len(wanted) // run.config.micro_batch_size))
    wait = Wait(run.config.cluster.wait_seconds, tell)
    tell(f"filling       {len(wanted)} samples, {plural(workers, 'process')}")
    began = told = time.monotonic()
    for result in results_of_workers(run, loader, caches, wanted, workers, cpus=cluster.cpus / workers, wait=wait):
        done, made = done + result["samples"], made + result["made"]
        left_out.update(result["left_out"])
        if message := refused_message(result["refused"], run.config.data.on_refused):
            raise StoppedRun(message)
        if result["full"]:
            raise OSError(f"{caches.first.folder}: the disk is full; {made} samples were made")
        now = time.monotonic()
        if now - told >= 10 and done > len(wanted) / 50:
            tell(f"{done} of {len(wanted)}  {format_duration((now - began) * (len(wanted) - done) / done)} left")
            told = now
    reasons = f": {', '.join(f'{count} x {reason}' for reason, count in left_out.most_common())}" if left_out else ""
    count = sum(left_out.values())
    folders = ", ".join(str(short_path(cache.folder)) for cache in caches.by_layer.values())
    tell(
        f"{made} made, {len(wanted) - made - count} were there, {count} left out{reasons}; "
        f"in {folders}, for runs with model.teacher_cache=disk"
    )


def samples_seen(run: Run, loader: Loader) -> NDArray[np.int64]:
    """The samples that a run sees, each once."""
    # steps, not epochs: a run of few steps sees few of its samples
    seen = np.zeros(len(loader.plan.lengths) + 1, dtype=bool)  # the last one stands for NO_SAMPLE
    for step in range(run.total_steps):
        seen[loader.plan.micro_batches(step)] = True
        if step % run.steps_per_epoch == 0 and seen[:-1].all():
            break
    return np.flatnonzero(seen[:-1])


class CacheWorker:
    """A process that runs teacher and trunk over samples and keeps what they make of them."""

    def __init__(self, run: Run, loader: Loader, caches: SeveralCaches) -> None:
        torch.set_num_threads(run.config.cluster.threads_per_worker or 1)
        layers = {"model.num_key_value_layers": max(caches.by_layer), "model.key_value_group_size": None}
        run = replace(run, config=changed(run.config, layers))
        self.loader, self.caches, self.model = replace(loader, cache=caches), caches, build_model(run)

    @torch.no_grad()
    def __call__(self, numbers: list[int]) -> dict[str, Any]:
        batch = self.loader({"samples": numbers, "step": 0, "micro_batch": 0})
        made = 0
        if batch.sample_ids and batch.trunk is None:
            made = sum(key not in self.caches for key in batch.keys)
            with autocast(self.model):
                states = frozen_states(self.model, batch.to(self.model.device), self.caches.by_layer)
            self.caches.put_batch(batch, states)
        left_out = Counter(rejected["reason"] for rejected in batch.rejected)
        refused = [rejected for rejected in batch.rejected if rejected.get("refused")]
        return {
            "samples": len(numbers),
            "made": made,
            "left_out": dict(left_out),
            "refused": refused,
            "full": self.caches.full,
        }


def results_of_workers(
    run: Run, loader: Loader, caches: SeveralCaches, samples: NDArray[np.int64], workers: int, cpus: float, wait: Wait
) -> Iterator[dict[str, Any]]:
    """What the workers say of a few samples after another, as they are done."""
    import ray
    from ray.util import ActorPool
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    each = {"CPU": min(1.0, cpus)} | ({"GPU": 1} if run.config.cluster.use_gpu else {})
    size = run.config.micro_batch_size
    at_once = (samples[at : at + size].tolist() for at in range(0, len(samples), size))
    try:
        with room_for([each] * workers, plural(workers, "process"), wait) as group:
            where = PlacementGroupSchedulingStrategy(group)
            worker = ray.remote(num_cpus=each["CPU"], num_gpus=each.get("GPU", 0), scheduling_strategy=where)(
                CacheWorker
            )
            processes = [worker.remote(run, loader, caches) for _ in range(workers)]
            yield from ActorPool(processes).map_unordered(lambda process, few: process.__call__.remote(few), at_once)
    except ray.exceptions.RayActorError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"cluster.address: a process that fills the teacher cache was lost: {reason}; what is filled stays, "
            f"so try again, or use cluster.address=local"
        ) from error
