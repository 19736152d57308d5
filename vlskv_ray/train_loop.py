"""One worker's life: build, resume, step, log, save. It knows neither Ray nor where its micro-batches come from."""

import math
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import get_scheduler
from transformers.utils import logging as transformers_logging

from vlskv_ray.checkpoint import newest_checkpoint, save_checkpoint, share, write_json
from vlskv_ray.config import Config
from vlskv_ray.data.collate import Batch, parts
from vlskv_ray.data.plan import Tokens
from vlskv_ray.data.questions import HeldOut
from vlskv_ray.distill import LossSums, Objective
from vlskv_ray.evaluation import SIDES, Evaluator, evaluation_of, figures_of
from vlskv_ray.faults import point
from vlskv_ray.lease import is_owner
from vlskv_ray.model.build import build_student, build_whole, find_model, load_processor, trainable_parameters
from vlskv_ray.run_log import RunLog
from vlskv_ray.savings import layers_of, measure_savings
from vlskv_ray.sft import cross_entropy_loss
from vlskv_ray.teacher_cache import TeacherCache
from vlskv_ray.watchdog import Attempts, Watchdog

TRIES, SECONDS_BETWEEN_TRIES = 3, 5.0
"""Of writing the last checkpoint, where the disk does not take it."""
Loss = Callable[[Any, Batch], tuple[Tensor | None, LossSums]]
"""Of model and micro-batch: the loss as a sum with a graph, and all sums; see `distillation_loss`."""


@dataclass(frozen=True)
class Run:
    """What every worker is told about the run, the same for all of them."""

    config: Config
    folder: Path
    """On storage that every worker shares."""
    micro_batches_per_step: int
    steps_per_epoch: int
    total_steps: int
    fingerprints: dict[str, str]
    """Of model and data: a run goes on only with the same."""
    shares_per_step: int = 1
    tokens: Tokens = Tokens()  # noqa: RUF009 - cannot be changed
    """By which the plan shares out work, see `Plan`; fixed when a run starts."""
    watches_nodes: bool = False
    """The cluster may tell that a node is about to be taken away."""
    owner: str = ""
    """Whose the run folder is while this holds, see `lease`."""
    cache: TeacherCache | None = None
    """Where the frozen states of samples are kept; None: nowhere."""
    held_out: HeldOut | None = None
    """What answers are measured on; None: nothing was given."""

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def stop_file(self) -> Path:
        """Made by the driver to ask for a stop: the workers save at the end of the step they are in."""
        return self.folder / "STOP"

    @property
    def placement_group_file(self) -> Path:
        """The id of what Ray reserved for the workers."""
        return self.folder / "ray" / "placement_group"

    @property
    def attempt_file(self) -> Path:
        """Which step is being made, see `Attempts`."""
        return self.folder / "attempt.json"


@dataclass(frozen=True)
class Worker:
    """Which of the workers this one is."""

    rank: int = 0
    world_size: int = 1
    is_warned: Callable[[], bool] = lambda: False
    """Whether a node of the workers is about to be taken away; all of them ask equally often, and hear the same."""


class AskedToStop(Exception):  # noqa: N818 - nothing went wrong
    """Raised on every worker alike, while answers are measured: training is done and saved, and measured next time."""


class TakenOver(RuntimeError):  # noqa: N818 - a state of affairs
    """The run folder is another driver's now."""


class StoppedRun(RuntimeError):
    """Raised on every worker alike: this run cannot go on, and starting it again would end the same way."""


def train_worker(run: Run, worker: Worker, batches_from: Callable[[int], Iterator[Batch]]) -> dict[str, Any]:
    """Trains from the newest checkpoint to the end of the run.

    Args:
        run: the same on every worker.
        worker: this one.
        batches_from: this worker's micro-batches from a step on, in the order of the plan.

    Returns:
        `status` and `step`: "done", with the samples left out by reason and the seconds that all steps took; "stopped",
        saved and left as asked; "poisoned": this step has ended its workers again and again; "refused", where the model
        cannot be used, or "failed", each with a `message`. What was measured is in evaluation.json.
    """
    with run.cache.in_use() if run.cache is not None else nullcontext():
        return _train(run, worker, batches_from)


def _train(run: Run, worker: Worker, batches_from: Callable[[int], Iterator[Batch]]) -> dict[str, Any]:
    config, output = run.config, run.config.output
    torch.set_num_threads(config.cluster.threads_per_worker or 1)
    attempts = Attempts(run.attempt_file) if worker.rank == 0 else None
    poisoned = gather_objects(attempts.poisoned() if attempts else None)[0]
    if poisoned is not None:
        if attempts:
            attempts.end()  # whoever starts the run again wants it tried
        return {"status": "poisoned", "step": poisoned}
    try:
        model = model_of(run)
    except ValueError as error:  # the same on every worker, and the next time
        return {"status": "refused", "message": str(error), "step": 0}
    trained = trainable_parameters(model)
    optimizer = build_optimizer(config, trained)
    gradients = GradientBuffer(trained.values())
    schedule = learning_rate_schedule(config, run.total_steps)
    step, counts = resume(run, trained, optimizer)
    log = saver = None
    if worker.rank == 0:
        log = RunLog(run.folder, step, order=output.order, tensorboard=output.tensorboard)
        saver = Saver(run, log)
    objective = objective_of(config, run.cache)
    per_worker = run.micro_batches_per_step // worker.world_size
    evaluator = None
    if run.held_out:
        processor = load_processor(find_model(config.model.name_or_path, config.model.revision))
        evaluator = Evaluator(model, processor, run.held_out, rank=worker.rank, world_size=worker.world_size)
    watchdog = Watchdog(
        run.folder / "stacks", worker.rank, config.cluster.stall_seconds if config.cluster.most_workers else None
    )
    watchdog.begin()
    batches = batches_from(step)
    stopped, failure, first_step, warned = False, None, step, False

    while step < run.total_steps and not stopped:
        point("step", step, worker.rank)
        began = time.perf_counter()
        micro_batches, data_wait = take(batches, step, per_worker)
        starting = data_wait if step == first_step else 0.0  # data tasks have to get going: no part of training
        if attempts:
            stop_if_taken_over(run)
            attempts.begin(step)
        watchdog.alive()
        set_learning_rate(optimizer, config.optimizer.lr * schedule(step))
        try:
            result = train_step(
                model,
                optimizer,
                gradients,
                micro_batches,
                objective,
                max_grad_norm=config.optimizer.max_grad_norm,
                max_tokens=config.micro_batch_tokens,
                in_plan_order=config.cluster.bit_identical,
                asked_to_stop=worker.rank == 0 and run.stop_file.exists(),
                on_micro_batch=watchdog.done,
            )
            step += 1
            point("updated", step, worker.rank)
            counts.add(micro_batches, result.sums, gather(micro_batches, result.sums, always=output.order))
            seconds = time.perf_counter() - began - starting
            counts.seconds += seconds
            measured = measured_on_the_way(run, step, model, evaluator, watchdog)
            if log:
                metrics = metrics_of(run, step, result, optimizer, data_wait, seconds) | measured
                due = step % output.log_every_steps == 0 or step == run.total_steps or bool(measured)
                log.step(metrics, counts.latest_rejected, counts.latest_ids, with_metrics=due)
            counts.check(config.data.max_rejected_fraction, whole_epoch=step % run.steps_per_epoch == 0)
            stopped = result.stop
            newly_warned = worker.is_warned() and not warned
            warned |= newly_warned
            if stopped or newly_warned or save_is_due(run, step, measured):
                stop_if_ruined(trained, step)
                counts.gather()
                if saver:
                    saver.save(step, trained, optimizer, counts, measured)
            if stopped or step == run.total_steps:
                finish_saving(saver)
        except StoppedRun as reason:
            failure = str(reason)
            break

    if log:
        log.close()
    if attempts:
        attempts.end()
    outcome: dict[str, Any] = {"status": "done", "step": step, **counts.to_json()}
    if failure:
        outcome = {"status": "failed", "message": failure, "step": step}
    elif step < run.total_steps:
        outcome = {"status": "stopped", "step": step}
    else:
        model.to(getattr(torch, config.model.dtype))  # measured as it is exported
        point("export", step, worker.rank)
        if worker.rank == 0:
            export(run, model)
        try:
            measure(run, worker, model, evaluator, watchdog)
        except AskedToStop:
            outcome = {"status": "stopped", "step": step}
    watchdog.rest()
    return outcome


# --------------------------------------------------------------------------------------------------------- the step
class GradientBuffer:
    """The gradients of all trained weights as views of one flat float32 tensor: one all-reduce, one norm, no copies."""

    def __init__(self, parameters: Any) -> None:
        parameters = list(parameters)
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
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
    objective: Loss,
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
        objective: gives their loss.
        max_grad_norm: clip the gradient to this.
        max_tokens: of one forward pass.
        in_plan_order: add up the gradients of all micro-batches in the order of the plan, whoever has them, so that
            every number of workers gives the same bits.
        asked_to_stop: told to all workers with the result.
        on_micro_batch: called after each.

    Raises:
        StoppedRun: loss or gradient is not finite; on every worker, before the update.
    """
    gradients.flat.zero_()
    total = torch.zeros_like(gradients.flat) if in_plan_order else gradients.flat
    of_micro_batches = []
    for batch in micro_batches:  # 1. forward and backward on sums, one micro-batch at a time
        of_batch = LossSums()
        for part in parts(batch, max_tokens):
            with autocast(model):
                loss, of_part = objective(model, part)
            if loss is not None:
                loss.backward()
            of_batch += of_part
        of_micro_batches.append(of_batch)
        on_micro_batch()
        point("micro_batch", batch.step, this_rank())
        if in_plan_order:
            add_of_all_workers(total, gradients.flat)
    point("reduce", micro_batches[0].step, this_rank())
    if in_plan_order:
        gradients.flat.copy_(total)
    elif dist.is_initialized():
        dist.all_reduce(gradients.flat)
    sums, stop = sums_of_all_workers(of_micro_batches, asked_to_stop)  # 2. every worker holds the same numbers
    if sums.supervised_tokens:  # 3. divided once, by the global count
        gradients.flat /= sums.supervised_tokens
    grad_norm = torch.linalg.vector_norm(gradients.flat, dtype=torch.float64).item()
    stop_if_not_finite(sums, grad_norm, micro_batches)  # 4. on every worker at once, before the update
    if max_grad_norm is not None and grad_norm > max_grad_norm:
        gradients.flat *= max_grad_norm / grad_norm
    if sums.supervised_tokens:  # 5. update; a step whose every row was left out has nothing to say
        optimizer.step()
    return StepResult(sums, grad_norm, stop)


def autocast(model: Any) -> Any:
    """bfloat16 products where the frozen weights are bfloat16, so that float32 trained weights mix with them."""
    is_bfloat16 = model.get_output_embeddings().weight.dtype == torch.bfloat16
    return torch.autocast("cpu", dtype=torch.bfloat16) if is_bfloat16 else nullcontext()


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
    ids = sorted(i for mine in gather_objects([b.sample_ids for b in micro_batches]) for batch in mine for i in batch)
    raise StoppedRun(
        f"step {micro_batches[0].step + 1}: the {what}; nothing was updated. Samples of this step: {', '.join(ids)}. "
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


# ------------------------------------------------------------------------------------------------- parts of the loop
def model_of(run: Run) -> Any:
    """The student of a distillation; the whole model where all of it trains."""
    options = run.config.model
    files = find_model(options.name_or_path, options.revision)  # here: each machine has its own copy of a hub model
    if run.config.objective == "sft":
        return build_whole(
            files, options.num_hidden_layers, attn_implementation=options.attn_implementation, seed=run.config.seed
        )
    return build_student(
        files,
        options.num_key_value_layers,
        options.key_value_group_size,
        attn_implementation=options.attn_implementation,
        dtype=getattr(torch, options.dtype),
    )


def objective_of(config: Config, cache: TeacherCache | None = None) -> Loss:
    if config.objective == "sft":
        return cross_entropy_loss
    return Objective(
        temperature=config.temperature,
        vision_loss_weight=config.vision_loss_weight,
        text_loss_weight=config.text_loss_weight,
        hidden_loss_weight=config.hidden_loss_weight,
        logits_memory_mib=config.model.logits_memory_mib,
        cache=cache,
    )


def build_optimizer(config: Config, trained: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only, as is usual: a norm or a bias has no reason to shrink."""
    matrices = [p for p in trained.values() if p.ndim > 1]
    vectors = [p for p in trained.values() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    options = config.optimizer
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,
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


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def take(batches: Iterator[Batch], step: int, count: int) -> tuple[list[Batch], float]:
    """This worker's micro-batches of a step, and the seconds spent waiting for them."""
    began = time.perf_counter()
    taken = list(islice(batches, count))
    assert [b.step for b in taken] == [step] * count, f"step {step}: got {[b.step for b in taken]}, out of plan"
    return taken, time.perf_counter() - began


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather_objects(mine: Any) -> list[Any]:
    """What every worker has, by rank."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def gather(micro_batches: Sequence[Batch], sums: LossSums, always: bool) -> list[tuple[int, list[str], list[Any]]]:
    """Place, sample ids and left-out rows of all workers' micro-batches; nothing where there is nothing to tell."""
    if not always and not sums.rejected:
        return []
    mine = [(batch.micro_batch, batch.sample_ids, batch.rejected) for batch in micro_batches]
    return sorted(entry for of_worker in gather_objects(mine) for entry in of_worker)


class Counts:
    """What was seen since the run began: samples, rows left out by reason, and those of the latest step; how long
    samples were in tokens, and how many images they had; and the seconds all steps took."""

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        saved = saved or {"seen": 0, "rejected": {}, "seconds": 0.0, "lengths": {}, "images": {}}
        self.seen, self.reasons, self.seconds = saved["seen"], Counter(saved["rejected"]), saved["seconds"]
        self.lengths, self.images = Counter(saved["lengths"]), Counter(saved["images"])
        self.mine: list[tuple[int, int]] = []  # length and images of this worker's samples since the last gathering
        self.latest_rejected: list[dict[str, str]] = []
        self.latest_ids: list[list[str]] = []

    def to_json(self) -> dict[str, Any]:
        return {
            "seen": self.seen,
            "rejected": dict(self.reasons),
            "seconds": self.seconds,
            "lengths": dict(self.lengths),
            "images": dict(self.images),
        }

    def gather(self) -> None:
        """Adds up what the workers counted each for itself: all of them call this at the same steps."""
        for lengths_and_images in gather_objects(self.mine):
            self.lengths.update(str(length) for length, _ in lengths_and_images)
            self.images.update(str(images) for _, images in lengths_and_images)
        self.mine = []

    def add(
        self,
        micro_batches: Sequence[Batch],
        sums: LossSums,
        gathered: Sequence[tuple[int, list[str], list[Any]]],
    ) -> None:
        for batch in micro_batches:
            self.mine += zip(batch.attention_mask.sum(1).tolist(), batch.num_images.tolist(), strict=True)
        self.seen += int(sums.samples + sums.rejected)
        self.latest_ids = [ids for _, ids, _ in gathered]
        self.latest_rejected = [row for _, _, rejected in gathered for row in rejected]
        self.reasons.update(row["reason"] for row in self.latest_rejected)

    def check(self, max_fraction: float, whole_epoch: bool) -> None:
        """StoppedRun once more rows are left out than allowed; within an epoch, of the first hundred as many as of a
        hundred."""
        rejected = sum(self.reasons.values())
        if rejected > max_fraction * (self.seen if whole_epoch else max(self.seen, 100)):
            reasons = ", ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common(5))
            example = self.latest_rejected[0] if self.latest_rejected else {"id": "?", "detail": "?"}
            raise StoppedRun(
                f"{rejected} of the {self.seen} samples so far had to be left out ({reasons}), more than "
                f"data.max_rejected_fraction={max_fraction}. For one, {example['id']}: {example['detail']} - all are "
                f"listed in rejected.jsonl of the run folder; mend the data, or raise data.max_rejected_fraction"
            )


# -------------------------------------------------------------------------------------------------- state on storage
def resume(run: Run, trained: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> tuple[int, Counts]:
    """Takes weights, moments and counts from the newest checkpoint, if there is one; returns the step to go on with."""
    saved = newest_checkpoint(run.checkpoints, warn=lambda _: None)  # the driver has told
    steps = gather_objects(saved.step if saved else 0)
    if len(set(steps)) > 1:  # then it is tried once more
        raise RuntimeError(f"{run.checkpoints}: workers see checkpoints of different steps: {steps}")
    if saved is None:
        return 0, Counts()
    weights = saved.tensors("trainable")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    for key, moment in saved.tensors("optimizer").items():
        name, _, kind = key.rpartition(".")
        optimizer.state[trained[name]][kind] = moment
    return saved.step, Counts(saved.state)


class Saver:
    """Writes checkpoints beside the training, which waits for a copy of what is saved and no longer."""

    def __init__(self, run: Run, log: RunLog) -> None:
        self.run, self.log = run, log
        self.writing: threading.Thread | None = None
        self.error: Exception | None = None
        self.latest: Callable[[], None] | None = None

    def save(
        self,
        step: int,
        trained: dict[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        counts: Counts,
        measured: dict[str, float],
    ) -> None:
        """Begins to write; tells first what became of the one before."""
        self.wait()
        moments = {
            f"{name}.{key}": value.clone()
            for name, parameter in trained.items()
            for key, value in optimizer.state[parameter].items()
        }
        weights = {name: parameter.detach().clone() for name, parameter in trained.items()}
        options = self.run.config.checkpoint
        state = state_of(self.run, counts, measured)

        def write() -> None:
            try:
                stop_if_taken_over(self.run)
                tensors = {"trainable": weights, "optimizer": moments}
                save_checkpoint(self.run.checkpoints, step, tensors, state, options.keep_last, options.keep_best)
            except Exception as error:  # raised again, or told, in the thread that trains
                self.error = error

        self.latest = write
        self._start()

    def wait(self) -> Exception | None:
        """Until nothing is being written. A disk that did not take it costs a warning and a checkpoint, not the run."""
        if self.writing:
            self.writing.join()
        error, self.error, self.writing = self.error, None, None
        if error and not isinstance(error, OSError):
            raise error
        if error:
            self.log.warn(f"a checkpoint could not be written: {error}; the next one is tried when it is due")
        return error

    def finish(self) -> str:
        """Until the last one is written, tried a few times; what is wrong if it cannot be."""
        for attempt in range(TRIES):
            error = self.wait()
            if error is None:
                return ""
            if attempt + 1 < TRIES:
                time.sleep(SECONDS_BETWEEN_TRIES)
                self._start()
        return f"the last checkpoint could not be written ({error}); make room, and the same command goes on"

    def _start(self) -> None:
        assert self.latest is not None
        self.writing = threading.Thread(target=self.latest)
        self.writing.start()


def finish_saving(saver: Saver | None) -> None:
    """Waits until the last checkpoint is there; StoppedRun on all workers if it cannot be."""
    wrong = gather_objects(saver.finish() if saver else "")[0]
    if wrong:
        raise StoppedRun(wrong)


def save_is_due(run: Run, step: int, measured: dict[str, float]) -> bool:
    options = run.config.checkpoint
    every = options.every_steps or run.total_steps
    return step % every == 0 or step == run.total_steps or bool(measured and options.keep_best)


def state_of(run: Run, counts: Counts, measured: dict[str, float]) -> dict[str, Any]:
    """What a checkpoint says beside weights and moments."""
    score = measured.get("eval_kl_mean")
    if score is None and "eval_accuracy" in measured:
        score = -measured["eval_accuracy"]
    return {
        "micro_batches_per_step": run.micro_batches_per_step,
        "shares_per_step": run.shares_per_step,
        "tokens": asdict(run.tokens),
        "threads": run.config.cluster.threads_per_worker,
        "fingerprints": run.fingerprints,
        **({} if score is None else {"score": score}),
        **counts.to_json(),
        "config": run.config.model_dump(mode="json"),
    }


def stop_if_taken_over(run: Run) -> None:
    """Workers outlive a driver that is killed by a moment: what they still do must not get into the next one's run."""
    if run.owner and not is_owner(run.folder, run.owner):
        raise TakenOver(f"{run.folder}: another process runs this run now")


def export(run: Run, model: Any) -> None:
    """Writes `final/`: the model as a Hugging Face folder with its processor."""
    final, aside = run.folder / "final", run.folder / ".writing-final"
    shutil.rmtree(aside, ignore_errors=True)
    transformers_logging.disable_progress_bar()
    model.save_pretrained(aside)
    load_processor(find_model(run.config.model.name_or_path, run.config.model.revision)).save_pretrained(aside)
    share(aside)
    if final.exists():  # written by this very run before it was killed at its last step
        shutil.rmtree(final)
    aside.rename(final)


# ------------------------------------------------------------------------------------------------- how good it is
def measured_on_the_way(
    run: Run, step: int, model: Any, evaluator: Evaluator | None, watchdog: Watchdog
) -> dict[str, float]:
    """What metrics.jsonl gets of a measurement of the model as it is, where one is due. All workers take part."""
    every = run.config.evaluation.every_steps
    if evaluator is None or every is None or step % every or step == run.total_steps:
        return {}
    side = "sft_model" if run.config.objective == "sft" else "student"

    def together(done: int, of: int) -> None:
        point("evaluate_on_the_way", step, this_rank())
        gather_objects(None)  # so that one that does not answer is noticed
        watchdog.done()

    watchdog.begin()
    with autocast(model):
        shares = gather_objects(evaluator.results(side, on_progress=together))
        results = [result for mine in shares for result in mine]
    watchdog.begin()
    figures = figures_of(results, side)
    names = ("accuracy", "accuracy_vision", "accuracy_text", "kl_mean", "top1_agreement")
    return {f"eval_{name}": figures[name] for name in names if figures[name] is not None}


def measure(run: Run, worker: Worker, model: Any, evaluator: Evaluator | None, watchdog: Watchdog) -> None:
    """Writes evaluation.json: what the model answers to held-out questions, and what a student saves."""
    is_sft = run.config.objective == "sft"
    sides = ("sft_model",) if is_sft else SIDES
    evaluation: dict[str, Any] = {}
    if evaluator:

        def stop_if_asked(done: int, of: int) -> None:
            point("evaluate", run.total_steps, worker.rank)
            if any(gather_objects(worker.rank == 0 and run.stop_file.exists())):
                raise AskedToStop
            watchdog.done()

        watchdog.begin()
        results = evaluator.results(*sides, on_progress=stop_if_asked)
        everyone = gather_objects((results, evaluator.left_out))
        if worker.rank == 0:
            evaluation = evaluation_of(everyone, sides, evaluator.held_out)
    watchdog.rest()  # the workers part here
    if worker.rank == 0:
        if not is_sft:
            evaluation["model"] = layers_of(model)
            evaluation["savings"] = measure_savings(model, evaluator.typical_sample() if evaluator else None)
        write_json(run.folder / "evaluation.json", evaluation)
        point("end", run.total_steps)


def metrics_of(
    run: Run, step: int, result: StepResult, optimizer: Any, data_wait: float, seconds: float
) -> dict[str, float]:
    """One line of metrics.jsonl. Means are per supervised token; those of which the step has none are left out."""
    sums, count = result.sums, result.sums.supervised_tokens
    metrics = {
        "step": step,
        "epoch": round(step / run.steps_per_epoch, 6),
        "learning_rate": optimizer.param_groups[0]["lr"],
        "grad_norm": result.grad_norm,
        "samples": int(sums.samples),
        "supervised_tokens": int(sums.supervised_tokens),
        "tokens_per_second": sums.tokens / seconds,
        "data_wait_seconds": data_wait,
        "step_seconds": seconds,
    }
    is_sft = run.config.objective == "sft"
    if count:
        metrics |= {"loss": sums.loss / count, "token_accuracy" if is_sft else "top1_agreement": sums.top1 / count}
    if count and not is_sft:
        metrics |= {"teacher_ce": sums.teacher_ce / count, "student_ce": sums.student_ce / count}
        if run.config.hidden_loss_weight:
            metrics["hidden_loss"] = sums.hidden / count
    prefix = "ce" if is_sft else "kl"
    if sums.tokens_vision:
        metrics[f"{prefix}_vision"] = (sums.ce_vision if is_sft else sums.kl_vision) / sums.tokens_vision
    if sums.tokens_text:
        metrics[f"{prefix}_text"] = (sums.ce_text if is_sft else sums.kl_text) / sums.tokens_text
    return metrics
