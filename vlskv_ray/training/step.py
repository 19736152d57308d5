"""One optimizer step on one global batch, and what it needs: optimizer, learning rate, gradients of all workers."""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer

from vlskv_ray.config import Config
from vlskv_ray.data.collate import Batch, parts
from vlskv_ray.data.teacher_cache import TeacherCache
from vlskv_ray.errors import StoppedRun
from vlskv_ray.model.build import trainable_parameters
from vlskv_ray.model.parts import part_of
from vlskv_ray.training.distill import LossSums
from vlskv_ray.training.faults import fault_point
from vlskv_ray.training.objective import Loss, objective_of
from vlskv_ray.training.run import gather_objects, this_rank
from vlskv_ray.words import printable


class GradientBuffer:
    """The gradients of all trained weights as views of one flat float32 tensor: one all-reduce, one norm, no copies."""

    def __init__(self, parameters: Any) -> None:
        parameters = list(parameters)
        first = parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        for parameter, part in zip(parameters, self.flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)  # backward adds to what is there


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step tells, the same on every worker."""

    sums: LossSums
    grad_norm: float
    stop: bool


def train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    gradients: GradientBuffer,
    micro_batches: Sequence[Batch],
    loss_of_part: Loss,
    *,
    max_grad_norm: float | None = None,
    max_tokens: int | None = None,
    in_plan_order: bool = False,
    asked_to_stop: bool = False,
    on_micro_batch: Callable[[], None] = lambda: None,
) -> StepResult:
    """One optimizer step on one global batch: sums over all its micro-batches, divided once by its supervised tokens.

    Args:
        model, optimizer, gradients: as they were built.
        micro_batches: this worker's.
        loss_of_part: gives the loss of a micro-batch, or of a part of one.
        max_grad_norm: clip the gradient to this.
        max_tokens: of one forward pass.
        in_plan_order: add up the gradients of all micro-batches in the order of the plan, whoever has them, so that
            every number of workers gives the same bits.
        asked_to_stop: told to all workers with the result.
        on_micro_batch: called after each.

    Raises:
        StoppedRun: loss or gradient is not finite; on every worker, before the update.
    """
    gradients.flat.zero_()  # in place: the parameters' gradients are views of it
    total = torch.zeros_like(gradients.flat) if in_plan_order else gradients.flat
    of_micro_batches = []
    for batch in micro_batches:  # 1. forward and backward on sums, one micro-batch at a time
        of_batch = LossSums()
        for part in parts(batch, max_tokens):
            with autocast(model):
                loss, of_part = loss_of_part(model, part.to(gradients.flat.device))
            if loss is not None:
                loss.backward()
            of_batch += of_part
        of_micro_batches.append(of_batch)
        on_micro_batch()
        fault_point("micro_batch", batch.step, this_rank())
        if in_plan_order:
            add_of_all_workers(total, gradients.flat)
    fault_point("reduce", micro_batches[0].step, this_rank())
    if in_plan_order:
        gradients.flat.copy_(total)
    elif dist.is_initialized():
        dist.all_reduce(gradients.flat)
    sums, stop = sums_of_all_workers(of_micro_batches, asked_to_stop)  # 2. every worker holds the same numbers
    if sums.supervised_tokens:  # 3. divided once, by the global count
        gradients.flat /= sums.supervised_tokens
    grad_norm = torch.linalg.vector_norm(gradients.flat, dtype=torch.float64).item()  # of millions of squares
    stop_if_not_finite(sums, grad_norm, micro_batches)  # 4. on every worker at once, before the update
    if max_grad_norm is not None and grad_norm > max_grad_norm:
        gradients.flat *= max_grad_norm / grad_norm
    if sums.supervised_tokens:  # 5. update; a step whose every row was left out has nothing to say
        optimizer.step()
    return StepResult(sums, grad_norm, stop)


def autocast(model: Any) -> Any:
    """bfloat16 products where a weight is bfloat16, as frozen ones can be, so that float32 trained ones mix with it."""
    rounded = next((parameter for parameter in model.parameters() if parameter.dtype == torch.bfloat16), None)
    if rounded is None:
        return nullcontext()
    # rounded weights are not kept: a student measured with others in their place would still go by the first ones
    return torch.autocast(rounded.device.type, dtype=torch.bfloat16, cache_enabled=False)


def add_of_all_workers(total: Tensor, gradient: Tensor) -> None:
    """Adds every worker's `gradient` of a micro-batch to `total`, one after another, and sets it to zero. Micro-batches
    are dealt in turn, so that is the order of the plan."""
    if not dist.is_initialized():
        total += gradient
    else:
        for rank in range(dist.get_world_size()):
            shared = gradient if rank == dist.get_rank() else torch.empty_like(gradient)
            dist.broadcast(shared, rank)
            total += shared
    gradient.zero_()


def sums_of_all_workers(mine: Sequence[LossSums], asked_to_stop: bool) -> tuple[LossSums, bool]:
    """The sums of all micro-batches, added up in the order of the plan; whether any worker was asked to stop."""
    numbers = torch.stack([torch.cat([sums.to_tensor(), torch.tensor([float(asked_to_stop)])]) for sums in mine])
    if dist.is_initialized():
        everyone = [torch.empty_like(numbers) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, numbers)
        numbers = torch.stack(everyone, dim=1).flatten(0, 1)  # micro-batches are dealt to the workers in turn
    total = LossSums()
    for row in numbers:
        total += LossSums.from_tensor(row[:-1])
    return total, bool(numbers[:, -1].any())


def stop_if_not_finite(sums: LossSums, grad_norm: float, micro_batches: Sequence[Batch]) -> None:
    """Decides from reduced numbers, so that all workers agree."""
    if math.isfinite(sums.loss) and math.isfinite(grad_norm):
        return
    what = f"loss is {sums.loss}" if not math.isfinite(sums.loss) else f"gradient norm is {grad_norm}"
    everyone = gather_objects([b.sample_ids for b in micro_batches])
    ids = printable(", ".join(sorted(i for mine in everyone for batch in mine for i in batch)))
    raise StoppedRun(
        f"step {micro_batches[0].step + 1}: the {what}; nothing was updated. Samples of this step: {ids}. "
        f"Look at these, or lower optimizer.lr; the checkpoints before this step are unharmed"
    )


def stop_if_ruined(trained: dict[str, torch.nn.Parameter], step: int) -> None:
    """Before weights are saved; all workers hold the same and so agree. A finite gradient can still make an update of
    them that is not: then every step from here on would stop, and the checkpoint before is the one to go on from."""
    ruined = [name for name, parameter in trained.items() if not parameter.isfinite().all()]
    if ruined:
        raise StoppedRun(
            f"step {step}: {len(ruined)} weights are not finite any more, such as {ruined[0]}; they were not saved. "
            f"Lower optimizer.lr, or set optimizer.max_grad_norm"
        )


def loss_of(config: Config, cache: TeacherCache | None = None) -> Loss:
    """The loss of a run's objective."""
    loss = objective_of(config).loss(config, cache)
    return recompute(loss) if config.model.gradient_checkpointing else loss


def recompute(loss: Loss) -> Loss:
    """The same loss and gradient by less memory: backward makes again what layers that train have made inside.

    transformers does so in training mode only. Here the layers are in it, for the time of a forward, and none of their
    parts: so nothing is dropped out, and nobody else meets a layer that would refuse a cache. What is frozen keeps
    nothing and makes nothing again.
    """
    checkpointed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # none are drawn

    def recomputed(model: Any, batch: Batch) -> tuple[Tensor | None, LossSums]:
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        for layer in layers:
            layer.gradient_checkpointing = layer.training = True
            layer._gradient_checkpointing_func = checkpointed
        try:
            return loss(model, batch)
        finally:
            for layer in layers:
                layer.gradient_checkpointing = layer.training = False

    return recomputed


def build_optimizer(config: Config, model: Any) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only, as is usual: a norm or a bias has no reason to shrink.

    Each group of weights knows its `part` of the model and, as `initial_lr`, the highest learning rate of that.
    """
    options, model_type = config.optimizer, model.config.model_type
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in trainable_parameters(model).items():
        part, is_matrix = part_of(model_type, name), parameter.ndim > 1
        rate = getattr(options.learning_rates, part) or options.lr
        group: dict[str, Any] = {"params": [], "part": part, "lr": rate, "initial_lr": rate}
        group |= {} if is_matrix else {"weight_decay": 0.0}
        groups.setdefault((part, is_matrix), group)["params"].append(parameter)
    return torch.optim.AdamW(
        list(groups.values()),
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,  # 5 to 6 times as fast on CPUs as the default
    )


def learning_rate_schedule(config: Config, total_steps: int) -> Callable[[int], float]:
    """The learning rate of step i as a fraction of the highest: a pure function, so nothing of it needs saving."""
    warmup = config.scheduler.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.scheduler.warmup_ratio * total_steps)
    unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    scheduler = get_scheduler(config.scheduler.type, unused, num_warmup_steps=warmup, num_training_steps=total_steps)
    fraction = scheduler.lr_lambdas[0]
    # transformers starts at exactly 0, a step that does nothing; count steps from 1 while warming up
    return lambda step: float(fraction(step + 1 if step < warmup else step))


def set_learning_rate(optimizer: torch.optim.Optimizer, fraction: float) -> None:
    """Sets all learning rates to this fraction of the highest of each."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * fraction


def learning_rates_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rate, and where parts of the model have different ones the highest and that of each part, by the
    names of the metrics."""
    rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
    highest = {"learning_rate": max(rates.values())}
    if len(set(rates.values())) == 1:
        return highest
    return highest | {f"learning_rate_{part}": rate for part, rate in rates.items()}
