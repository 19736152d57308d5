"""`--dry-run`: some samples and steps in this process, and what they say of memory and time. Writes nothing."""

import os
import resource
import time
from collections.abc import Iterator
from statistics import mean

import numpy as np
import torch

from vlskv_ray.cluster import Reserved, duration, reserve, threads_of
from vlskv_ray.counting import flop_counter, peak_bytes, size
from vlskv_ray.data.collate import Batch
from vlskv_ray.data.pipeline import Loader
from vlskv_ray.model.build import trainable_parameters
from vlskv_ray.train_loop import GradientBuffer, Run, build_optimizer, model_of, objective_of, train_step

TRIED_SAMPLES = 64
TIMED_MICRO_BATCHES = 6
SHOWN_REJECTED = 5
SHOWN_IDS = 4


def dry_run(run: Run, loader: Loader) -> None:
    """Prints what it finds.

    Raises:
        ValueError: the run would not get far: too many rows are left out, or its workers do not fit this machine.
        StoppedRun: loss or gradient of a step is not finite.
    """
    config = run.config
    here = config.cluster.address == "local" or not (config.cluster.address or os.environ.get("RAY_ADDRESS"))
    reserved = None
    if config.cluster.num_workers and here:
        reserved = reserve(config.cluster, config.data, os.cpu_count() or 1)
    threads = threads_of(config.cluster, os.cpu_count() or 1)
    torch.set_num_threads(threads)
    batches, data_seconds = try_data(run, loader)

    model = model_of(run)
    trained = trainable_parameters(model)
    optimizer, gradients = build_optimizer(config, trained), GradientBuffer(trained.values())
    objective = objective_of(config)
    largest = max(batches, key=lambda batch: int(batch.attention_mask.sum()))
    result = train_step(model, optimizer, gradients, [largest], objective)  # which also warms up
    with flop_counter() as counter:
        train_step(model, optimizer, gradients, [largest], objective)
    peak = peak_bytes(lambda: train_step(model, optimizer, gradients, [largest], objective))
    seconds = []
    for batch in batches[:TIMED_MICRO_BATCHES]:
        began = time.perf_counter()
        train_step(model, optimizer, gradients, [batch], objective)
        seconds.append(time.perf_counter() - began)

    parameters = {p: p.numel() * p.element_size() for p in model.parameters()}
    moving = sum(parameters[p] for p in trained.values())
    logits = min(config.model.logits_memory_mib * 2**20, peak)
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    supervised, tokens = int(result.sums.supervised_tokens), largest.attention_mask.sum(1).tolist()
    gflop = counter.get_total_flops() / 1e9
    step = seconds_per_step(run, mean(seconds), data_seconds, threads, reserved)
    ids, more = largest.sample_ids[:SHOWN_IDS], len(largest.sample_ids) - SHOWN_IDS
    names = ", ".join(ids) + (f" and {more} more" if more > 0 else "")
    print(f"micro-batch   {names}: {sum(tokens)} tokens, {supervised} supervised in all")
    print(f"loss          {result.sums.loss / supervised:.4g}, gradient norm {result.grad_norm:.4g}")
    print(f"parameters    {sum(p.numel() for p in parameters):,}, {sum(p.numel() for p in trained.values()):,} trained")
    print(
        f"memory        a worker: {size(sum(parameters.values()) - moving)} frozen weights, {size(moving)} trained, "
        f"{size(moving)} gradients, {size(2 * moving)} optimizer, {size(peak)} activations and logits (logits at "
        f"most {size(logits)}); this process, with its libraries, {size(process)}"
    )
    print(
        f"time          {mean(seconds):.3g} s a micro-batch with {threads} thread{'s' * (threads > 1)}; the one above "
        f"takes {gflop:.3g} GFLOP; its data take {data_seconds:.3g} s of one data task"
    )
    print(
        f"prediction    {step:.3g} s a step at best, {duration(step * run.total_steps)} for {run.total_steps} steps; "
        f"starting and measuring come on top"
    )
    print("dry run: all is well; nothing was written")


def seconds_per_step(
    run: Run, train_seconds: float, data_seconds: float, threads: int, reserved: Reserved | None
) -> float:
    """What a step will take, by the slowest of training, the data tasks, and all of it on this machine's CPUs.

    Args:
        train_seconds, data_seconds: of a micro-batch, with `threads` threads and in one data task.
        reserved: what runs on this machine; None where it runs in one process, or elsewhere, where the number of
            CPUs and data tasks is not known.
    """
    count, workers = run.micro_batches_per_step, run.config.cluster.num_workers
    if not workers:
        return count * (train_seconds + data_seconds)
    train = count / workers * train_seconds
    if reserved is None:
        return train
    of_cpus = count * (train_seconds * threads + data_seconds) / (os.cpu_count() or 1)
    return max(train, count * data_seconds / reserved.num_tasks, of_cpus)


def try_data(run: Run, loader: Loader) -> tuple[list[Batch], float]:
    """Micro-batches from all over an epoch that hold a sample, and the mean seconds to prepare one.

    Raises:
        ValueError: more of their samples are left out than the run would stand.
    """
    began, made, seen = time.perf_counter(), 0, 0
    rejected: list[dict[str, str]] = []
    found = []
    for batch in spread(run, loader):
        made, seen = made + 1, seen + len(batch.sample_ids) + len(batch.rejected)
        rejected += batch.rejected
        found += [batch] if batch.sample_ids else []
        if len(found) >= TIMED_MICRO_BATCHES and seen >= TRIED_SAMPLES:
            break
    seconds = (time.perf_counter() - began) / made
    for row in rejected[:SHOWN_REJECTED]:
        print(f"left out {row['id']}: {row['reason']}: {row['detail']}")
    more = len(rejected) - SHOWN_REJECTED
    print(f"tried         {seen} samples, {len(rejected)} left out" + (f", {more} more than shown" if more > 0 else ""))
    allowed = run.config.data.max_rejected_fraction
    if not found:
        raise ValueError(f"data.sources: none of {seen} samples tried can be used; mend the data")
    if len(rejected) > allowed * seen:
        raise ValueError(
            f"data.sources: of {seen} samples tried, {len(rejected)} cannot be used, more than "
            f"data.max_rejected_fraction={allowed}; mend the data, or raise it"
        )
    return found, seconds


def spread(run: Run, loader: Loader) -> Iterator[Batch]:
    """The first micro-batch of steps all over an epoch, then those of the steps between, then the second ones, ..."""
    steps = min(run.steps_per_epoch, run.total_steps)
    stride = max(1, steps // max(TIMED_MICRO_BATCHES, TRIED_SAMPLES // run.config.micro_batch_size))
    for j in range(run.micro_batches_per_step):
        for first in range(min(stride, steps)):
            for step in np.arange(first, steps, stride).tolist():
                yield loader(list(loader.plan.rows(step, step + 1))[j])
