"""`--dry-run`: some samples and steps in this process, and what they say of memory and time. Writes nothing."""

import itertools
import math
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np
import torch

from vlskv_ray.cluster.shares import Reserved, reserve, threads_of
from vlskv_ray.config import changed
from vlskv_ray.data.collate import Batch, from_row, to_row
from vlskv_ray.data.pipeline import Loader
from vlskv_ray.data.sample import refused_message
from vlskv_ray.errors import StoppedRun
from vlskv_ray.launch.start_block import describe_parameters
from vlskv_ray.model.build import trainable_parameters
from vlskv_ray.model.swiftkv import swiftkv_backbone
from vlskv_ray.training.distill import LossSums, shared_pass
from vlskv_ray.training.fit import fit_bytes
from vlskv_ray.training.objective import build_model, objective_of
from vlskv_ray.training.profiling import flop_counter, peak_bytes
from vlskv_ray.training.run import Run
from vlskv_ray.training.step import GradientBuffer, StepResult, autocast, build_optimizer, loss_of, train_step
from vlskv_ray.words import format_bytes, format_duration, plural, printable

TRIED_SAMPLES = 64
TIMED_MICRO_BATCHES = 6
SHORT_STEP = 0.5
"""Seconds below which what Ray does for a step counts."""
NEAR_CHANCE = 0.75
"""Of ln(vocabulary), the cross-entropy of a model to which all tokens are equally likely: from this share on a teacher
is taken for one that knows nothing. One that knows how common each token is, and no more, is below it: at about 0.7 in
natural text. Language models are at 0.1 to 0.4, a random head at 1 or above."""
SHOWN_REJECTED = 5
SHOWN_IDS = 4


def dry_run(run: Run, loader: Loader) -> float:
    """Prints what it finds; returns the seconds that a step of the run is expected to take.

    Raises:
        ValueError: the run would not get far: too many rows are left out, or its workers do not fit this machine.
        StoppedRun: a row was refused; loss or gradient of a step is not finite.
    """
    config = run.config
    here = config.cluster.address == "local" or not (config.cluster.address or os.environ.get("RAY_ADDRESS"))
    if config.cluster.use_gpu and not torch.cuda.is_available():
        refused = ", where the run itself would be refused" if here else ""
        print(f"device        no GPU is to be found here: all below is of this machine's CPUs{refused}")
        run = replace(run, config=changed(config, {"cluster.use_gpu": False}))
    cpus = os.cpu_count() or 1
    reserved = reserve(config.cluster, config.data, cpus, cpus) if config.cluster.most_workers and here else None
    threads = threads_of(run.config.cluster, cpus)
    torch.set_num_threads(threads)
    batches, data_seconds = try_data(run, loader)

    model = build_model(run)
    largest = max(batches, key=lambda batch: int(batch.attention_mask.sum()))
    step_on = steps_of(run, model)
    result, gflop, peak = count_step(step_on, largest)
    timed = batches[:TIMED_MICRO_BATCHES]
    neighbours = min(config.cluster.most_workers or 1, cpus // threads) - 1 if here else 0
    neighbours = 0 if run.config.cluster.use_gpu else neighbours  # each has a GPU of its own
    with busy_neighbours(run, timed, neighbours):  # they share caches and memory with each other
        results, times = time_steps(step_on, timed)
        cached = time_steps(step_on, [with_states(model, batch) for batch in timed])[1] if run.cache else [0.0]
    seconds = mean(times)
    step = seconds_per_step(run, seconds, data_seconds, threads, reserved)
    later = seconds_per_step(run, mean(cached), 0, threads, reserved)  # which decodes no image

    print_first_step(largest, result)
    if objective_of(run.config).has_student:
        vocabulary = swiftkv_backbone(model).config.vocab_size
        print_teacher(sum((of_step.sums for of_step in results), LossSums()), vocabulary)
    print_memory(run, model, peak)
    print(
        f"time          {seconds:.3g} s a micro-batch with {plural(threads, 'thread')}; the one above "
        f"takes {gflop:.3g} GFLOP; its data take {data_seconds:.3g} s of one data task"
    )
    print_prediction(run, step, later)
    print("dry run: all is well; nothing was written")
    return step


def print_first_step(batch: Batch, result: StepResult) -> None:
    supervised, tokens = int(result.sums.supervised_tokens), int(batch.attention_mask.sum())
    ids, more = batch.sample_ids[:SHOWN_IDS], len(batch.sample_ids) - SHOWN_IDS
    names = ", ".join(ids) + (f" and {more} more" if more > 0 else "")
    print(f"micro-batch   {names}: {tokens} tokens, {supervised} supervised in all")
    print(f"loss          {result.sums.loss / supervised:.4g}, gradient norm {result.grad_norm:.4g}")


def print_teacher(sums: LossSums, vocabulary: int) -> None:
    """How well the teacher foretells the answers, which no step changes, and a warning where it hardly does at all."""
    cross_entropy, chance = sums.teacher_ce / sums.supervised_tokens, math.log(vocabulary)
    samples = plural(int(sums.samples), "sample")
    print(f"teacher       cross-entropy {cross_entropy:.4g} per supervised token of {samples}")
    if not cross_entropy < NEAR_CHANCE * chance:
        print(
            f"warning: that is near ln({vocabulary:,} tokens) = {chance:.4g}: it answers as if it knew nothing. Had "
            f"all weights been read when its checkpoint was made? A head that is the embeddings is drawn at random "
            f"unless tie_word_embeddings is true in config.json, at its outermost level"
        )


def print_memory(run: Run, model: Any, peak: int) -> None:
    """What a worker holds; `peak` bytes of it during a step, beside weights, gradients and moments."""
    parameters = {p: p.numel() * p.element_size() for p in model.parameters()}
    trained = trainable_parameters(model).values()
    moving = sum(parameters[p] for p in trained)
    logits = min(run.config.model.logits_memory_mib * 2**20, peak)
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"parameters    {describe_parameters(run)}")
    print(
        f"memory        a worker: {format_bytes(sum(parameters.values()) - moving)} frozen weights, "
        f"{format_bytes(moving)} trained, {format_bytes(moving)} gradients, {format_bytes(2 * moving)} optimizer, "
        f"{format_bytes(3 * moving)} more while one saves, {format_bytes(peak)} activations and logits (logits at most "
        f"{format_bytes(logits)}); this process, with its libraries, {format_bytes(process)}"
    )
    if run.fit:
        sums = format_bytes(fit_bytes(model, run.config.cluster.most_workers))
        print(f"              {sums} of sums while the student is fitted, before the first step")


def print_prediction(run: Run, step: float, later: float) -> None:
    """How long the run takes, by the seconds of a step in the first epoch and with a teacher cache in later ones."""
    first = min(run.steps_per_epoch, run.total_steps) if run.cache else run.total_steps
    whole = first * step + (run.total_steps - first) * later
    of_later = f", {later:.3g} s from the second epoch on" if first < run.total_steps else ""
    steps = plural(run.total_steps, "step")
    print(
        f"prediction    {step:.3g} s a step{of_later}, {format_duration(whole)} for {steps}; starting and measuring "
        f"come on top"
    )
    if run.config.cluster.most_workers and step < SHORT_STEP:
        print("              and what Ray itself does for a step, 0.05 s and more, counts in one so short")


def steps_of(run: Run, model: Any) -> Callable[[Batch], StepResult]:
    """A function that makes a step on one micro-batch."""
    trained = trainable_parameters(model)
    optimizer, gradients = build_optimizer(run.config, model), GradientBuffer(trained.values())
    loss, most = loss_of(run.config), run.config.micro_batch_tokens
    return lambda batch: train_step(model, optimizer, gradients, [batch], loss, max_tokens=most)


def count_step(step_on: Callable[[Batch], StepResult], batch: Batch) -> tuple[StepResult, float, int]:
    """The result of a first step, its operations in GFLOP, and the most bytes that a second one held at once: the first
    makes the optimizer's moments, which are counted apart."""
    with flop_counter() as counter:
        result = step_on(batch)
    return result, counter.get_total_flops() / 1e9, peak_bytes(lambda: step_on(batch))


def time_steps(
    step_on: Callable[[Batch], StepResult], batches: Sequence[Batch]
) -> tuple[list[StepResult], list[float]]:
    """What a step on each of some micro-batches comes to, and the seconds that it takes."""
    results, seconds = [], []
    for batch in batches:
        began = time.perf_counter()
        results.append(step_on(batch))
        seconds.append(time.perf_counter() - began)
    return results, seconds


def with_states(model: Any, batch: Batch) -> Batch:
    """The micro-batch as later epochs get it from a teacher cache."""
    with torch.no_grad(), autocast(model):
        states = shared_pass(model, batch.to(model.device))
    known = {name: getattr(states, name) for name in ("trunk", "teacher", "teacher_input")}
    return replace(batch, pixels={}, **known)


@contextmanager
def busy_neighbours(run: Run, batches: Sequence[Batch], count: int) -> Iterator[None]:
    """While other workers of this machine step too, on the same micro-batches over and over."""
    context = multiprocessing.get_context("spawn")
    started = context.Semaphore(0)
    work = (run, [to_row(batch) for batch in batches], started, os.getpid())
    processes = [context.Process(target=_keep_stepping, args=work, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            while not started.acquire(timeout=1) and process.is_alive():
                pass  # one that cannot start leaves the others more room: the prediction is then at best
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _keep_stepping(run: Run, rows: Sequence[dict[str, Any]], started: Any, parent: int) -> None:
    """Until it is killed, or the dry run is gone however it ended."""
    torch.set_num_threads(threads_of(run.config.cluster, os.cpu_count() or 1))
    step_on = steps_of(run, build_model(run))
    started.release()
    for row in itertools.cycle(rows):
        if os.getppid() != parent:
            break
        step_on(from_row(row))


def seconds_per_step(
    run: Run, train_seconds: float, data_seconds: float, threads: int, reserved: Reserved | None
) -> float:
    """What a step will take, by the slowest of training, the data tasks, and all of it on this machine's CPUs.

    Args:
        train_seconds, data_seconds: of a micro-batch, with `threads` threads and in one data task.
        reserved: what runs on this machine; None where it runs in one process, or elsewhere, where the number of
            CPUs and data tasks is not known.
    """
    count, workers = run.micro_batches_per_step, run.config.cluster.most_workers
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
        StoppedRun: a row was refused.
    """
    began, made, seen = time.perf_counter(), 0, 0
    rejected: list[dict[str, Any]] = []
    notices: list[dict[str, str]] = []
    found = []
    for batch in batches_of_epoch(run, loader):
        made, seen = made + 1, seen + len(batch.sample_ids) + len(batch.rejected)
        rejected += batch.rejected
        notices += batch.notices
        found += [batch] if batch.sample_ids else []
        if len(found) >= TIMED_MICRO_BATCHES and seen >= TRIED_SAMPLES:
            break
    seconds = (time.perf_counter() - began) / made
    if message := refused_message(rejected, run.config.data.on_refused):
        raise StoppedRun(message)
    for what, rows in (("left out", rejected), ("changed", notices)):
        for row in rows[:SHOWN_REJECTED]:
            print(printable(f"{what} {row['id']}: {row['reason']}: {row['detail']}"))
    more = len(rejected) - SHOWN_REJECTED
    with_images = sum(int(batch.has_image.sum()) for batch in found)
    print(
        f"tried         {seen} samples: {seen - len(rejected)} used, {with_images} of them with images; "
        f"{len(rejected)} left out"
        + (f", {more} more than shown" if more > 0 else "")
        + (f"; {len(notices)} changed" if notices else "")
    )
    allowed = run.config.data.max_rejected_fraction
    if not found:
        raise ValueError(f"data.sources: none of {seen} samples tried can be used; mend the data")
    if len(rejected) > allowed * seen:
        raise ValueError(
            f"data.sources: of {seen} samples tried, {len(rejected)} cannot be used, more than "
            f"data.max_rejected_fraction={allowed}; mend the data, or raise it"
        )
    return found, seconds


def batches_of_epoch(run: Run, loader: Loader) -> Iterator[Batch]:
    """The first micro-batch of steps all over an epoch, then those of the steps between, then the second ones, ..."""
    steps = min(run.steps_per_epoch, run.total_steps)
    stride = max(1, steps // max(TIMED_MICRO_BATCHES, TRIED_SAMPLES // run.config.micro_batch_size))
    for j in range(run.micro_batches_per_step):
        for first in range(min(stride, steps)):
            for step in np.arange(first, steps, stride).tolist():
                yield loader(list(loader.plan.rows(step, step + 1))[j])
