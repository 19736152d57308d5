"""`--dry-run`: some samples and one step in this process, and what they say of memory and time. Writes nothing."""

import os
import resource
import time

import torch

from vlskv_ray.cluster import duration, reserve
from vlskv_ray.data.collate import Batch
from vlskv_ray.data.pipeline import Loader, local_batches
from vlskv_ray.model.build import trainable_parameters
from vlskv_ray.train_loop import GradientBuffer, Run, build_optimizer, model_of, objective_of, train_step

TRIED_SAMPLES = 64


def dry_run(run: Run, loader: Loader) -> None:
    """Prints what it finds.

    Raises:
        ValueError: the run would not get far: too many rows are left out, or its workers do not fit this machine.
        StoppedRun: loss or gradient of the step is not finite.
    """
    config, workers = run.config, max(run.config.cluster.num_workers, 1)
    here = config.cluster.address == "local" or not (config.cluster.address or os.environ.get("RAY_ADDRESS"))
    if config.cluster.num_workers and here:
        reserve(config.cluster, config.data, os.cpu_count() or 1)
    threads = config.cluster.threads_per_worker or max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    batch, data_seconds = try_data(run, loader)

    model = model_of(run)
    trained = trainable_parameters(model)
    optimizer, gradients = build_optimizer(config, trained), GradientBuffer(trained.values())
    for _ in range(2):  # the first one also warms up
        began = time.perf_counter()
        result = train_step(model, optimizer, gradients, [batch], objective_of(config))
        seconds = time.perf_counter() - began

    parameters = list(model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    moments = sum(p.numel() * 3 * p.element_size() for p in trained.values())  # the gradient and AdamW's two
    logits = config.model.logits_memory_mib * 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    micro_batches = run.micro_batches_per_step * run.total_steps
    tokens, supervised = batch.input_ids.shape[1], int(result.sums.supervised_tokens)
    print(f"micro-batch   {', '.join(batch.sample_ids)}: up to {tokens} tokens, {supervised} supervised in all")
    print(f"loss          {result.sums.loss / supervised:.4g}, gradient norm {result.grad_norm:.4g}")
    print(f"parameters    {sum(p.numel() for p in parameters):,}, {sum(p.numel() for p in trained.values()):,} trained")
    print(
        f"memory        a worker: {size(weights)} weights, {size(moments)} gradients and moments, up to {size(logits)} "
        f"logits; this process, with all of it, {size(peak)}"
    )
    print(
        f"time          {seconds:.2f} s to train on the micro-batch with {threads} threads: about "
        f"{duration(seconds * micro_batches / workers)} for {run.total_steps} steps like it; its data take "
        f"{data_seconds:.2f} s of one data task: {duration(data_seconds * micro_batches)} in all, shared by the tasks"
    )
    print("dry run: all is well; nothing was written")


def try_data(run: Run, loader: Loader) -> tuple[Batch, float]:
    """The first micro-batch that holds a sample, and the mean seconds to prepare one, after some samples of an epoch.

    Raises:
        ValueError: more of them are left out than the run would stand.
    """
    began, made, seen = time.perf_counter(), 0, 0
    rejected: list[dict[str, str]] = []
    found = None
    for batch in local_batches(loader, 0, run.steps_per_epoch):
        made, seen = made + 1, seen + len(batch.sample_ids) + len(batch.rejected)
        rejected += batch.rejected
        found = found or (batch if batch.sample_ids else None)
        if found and seen >= TRIED_SAMPLES:
            break
    seconds = (time.perf_counter() - began) / made
    for row in rejected:
        print(f"left out {row['id']}: {row['reason']}: {row['detail']}")
    allowed = run.config.data.max_rejected_fraction
    if found is None or len(rejected) > allowed * seen:
        raise ValueError(
            f"data.sources: of {seen} samples tried, {len(rejected)} cannot be used, more than "
            f"data.max_rejected_fraction={allowed}; mend the data, or raise it"
        )
    return found, seconds


def size(count: float) -> str:
    """Bytes as GiB, or MiB where it is less."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
