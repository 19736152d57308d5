"""`--dry-run`: one step on one micro-batch in this process, and what it says of memory and time. Writes nothing."""

import os
import resource
import time

import torch

from vlskv_ray.cluster import duration
from vlskv_ray.data.pipeline import Loader, local_batches
from vlskv_ray.model.build import trainable_parameters
from vlskv_ray.train_loop import GradientBuffer, Run, build_optimizer, objective_of, student_of, train_step


def dry_run(run: Run, loader: Loader) -> None:
    """Prints what it finds. ValueError if not one row can be used."""
    config, workers = run.config, max(run.config.cluster.num_workers, 1)
    threads = config.cluster.threads_per_worker or max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    began = time.perf_counter()
    for batch in local_batches(loader, 0, run.total_steps):
        for row in batch.rejected:
            print(f"left out {row['id']}: {row['reason']}: {row['detail']}")
        if batch.sample_ids:
            break
    else:
        raise ValueError("data.sources: not one row of them can be used, for the reasons above")
    data_seconds = time.perf_counter() - began

    model = student_of(run)
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
    whole = seconds * run.micro_batches_per_step / workers * run.total_steps
    tokens, supervised = batch.input_ids.shape[1], int(result.sums.supervised_tokens)
    print(f"micro-batch   {', '.join(batch.sample_ids)}: up to {tokens} tokens, {supervised} supervised in all")
    print(f"loss          {result.sums.loss / supervised:.4g}, gradient norm {result.grad_norm:.4g}")
    print(f"parameters    {sum(p.numel() for p in parameters):,}, {sum(p.numel() for p in trained.values()):,} trained")
    print(
        f"memory        a worker: {gib(weights)} weights, {gib(moments)} gradients and moments, at most {gib(logits)} "
        f"logits; this process, with all of it, {gib(peak)}"
    )
    print(
        f"time          {data_seconds:.2f} s to prepare the micro-batch, {seconds:.2f} s to train on it with {threads} "
        f"threads: about {duration(whole)} for {run.total_steps} steps like it"
    )
    print("dry run: all is well; nothing was written")


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
