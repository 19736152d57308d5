"""One worker's life: build, resume, fit, step, log, save. It knows neither Ray nor whence its micro-batches come."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from vlskv_ray.data.collate import Batch
from vlskv_ray.data.sample import refused_message
from vlskv_ray.errors import AskedToStop, StoppedRun
from vlskv_ray.evaluation.evaluator import Evaluator, evaluation_of, figures_of, sides_with
from vlskv_ray.evaluation.savings import layers_of, measure_savings
from vlskv_ray.files import write_json
from vlskv_ray.model.build import trainable_parameters
from vlskv_ray.model.processor import load_processor
from vlskv_ray.storage.run_log import RunLog
from vlskv_ray.storage.saving import (
    MAKE_ROOM,
    Counts,
    Saver,
    export,
    finish_saving,
    resume,
    save_is_due,
    stop_if_taken_over,
)
from vlskv_ray.training.distill import LossSums
from vlskv_ray.training.faults import fault_point
from vlskv_ray.training.objective import Loss, build_model, made_by, objective_of
from vlskv_ray.training.outcome import Outcome
from vlskv_ray.training.run import Run, Worker, gather_objects, this_rank
from vlskv_ray.training.start import BatchOf, is_whole, read_weights, start_fitted
from vlskv_ray.training.step import (
    GradientBuffer,
    StepResult,
    autocast,
    build_optimizer,
    learning_rate_schedule,
    learning_rates_of,
    loss_of,
    set_learning_rate,
    stop_if_ruined,
    train_step,
)
from vlskv_ray.training.watchdog import Attempts, Watchdog


@dataclass
class Training:
    """What a worker trains with. Weights, counts and `step` change as it goes on; the other parts stay."""

    run: Run
    worker: Worker
    model: Any
    trained: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    gradients: GradientBuffer
    loss: Loss
    learning_rate: Callable[[int], float]
    """Of a step, as a fraction of the highest."""
    evaluator: Evaluator | None
    watchdog: Watchdog
    counts: Counts
    step: int
    """Steps that have been made."""
    log: RunLog | None = None
    saver: Saver | None = None
    attempts: Attempts | None = None
    """These three are one worker's, who writes for all."""


def train_worker(
    run: Run, worker: Worker, batches_from: Callable[[int], Iterator[Batch]], batch_of: BatchOf | None = None
) -> Outcome:
    """Trains from the newest checkpoint to the end of the run; what is measured goes into evaluation.json.

    Args:
        run: the same on every worker.
        worker: this one.
        batches_from: this worker's micro-batches from a step on, in the order of the plan.
        batch_of: the micro-batch of any samples, for a student that is fitted before its first step.
    """
    torch.set_num_threads(run.config.cluster.threads_per_worker or 1)  # Ray sets 1; the number decides the last bits
    with run.cache.in_use() if run.cache is not None else nullcontext():
        attempts = Attempts(run.attempt_file) if worker.rank == 0 else None
        poisoned = gather_objects(attempts.poisoned(run.total_steps) if attempts else None)[0]
        if poisoned is not None:
            if attempts:
                attempts.end()  # whoever starts the run again wants it tried
            return Outcome("poisoned", poisoned)
        try:
            model, optimizer, step, counts = load(run)
        except ValueError as error:  # the same on every worker, and the next time
            return Outcome("refused", message=str(error))
        training = build(run, worker, model, optimizer, step, counts, attempts)
        training.watchdog.begin()
        failure = run_steps(training, batches_from(training.step), batch_of)
        close(training)
        outcome = finish(training, failure)
        training.watchdog.rest()
        return outcome


def load(run: Run) -> tuple[Any, torch.optim.Optimizer, int, Counts]:
    """Model, optimizer, steps made and counts, as the newest checkpoint has them.

    Raises:
        ValueError: model or checkpoint is not what the run needs.
    """
    model = build_model(run)
    trained = trainable_parameters(model)
    optimizer = build_optimizer(run.config, model)
    return model, optimizer, *resume(run, trained, optimizer)


def build(
    run: Run,
    worker: Worker,
    model: Any,
    optimizer: torch.optim.Optimizer,
    step: int,
    counts: Counts,
    attempts: Attempts | None,
) -> Training:
    """What the worker needs beside `load`, ready for the next step."""
    config, log, evaluator = run.config, None, None
    trained = trainable_parameters(model)
    if worker.rank == 0:
        log = RunLog(run.folder, step, order=config.output.order, tensorboard=config.output.tensorboard)
    if run.held_out:
        processor = load_processor(run.model_files, tried=True)
        evaluator = Evaluator(
            model,
            processor,
            run.held_out,
            rank=worker.rank,
            world_size=worker.world_size,
            fitted=functools.partial(read_weights, run.start_file),
        )
    stall_seconds = config.cluster.stall_seconds if config.cluster.most_workers else None
    return Training(
        run=run,
        worker=worker,
        model=model,
        trained=trained,
        optimizer=optimizer,
        gradients=GradientBuffer(trained.values()),
        loss=loss_of(config, run.cache),
        learning_rate=learning_rate_schedule(config, run.total_steps),
        evaluator=evaluator,
        watchdog=Watchdog(run.folder / "stacks", worker.rank, stall_seconds),
        counts=counts,
        step=step,
        log=log,
        saver=Saver(run, log) if log else None,
        attempts=attempts,
    )


# ---------------------------------------------------------------------------------------------------------- the steps
def run_steps(training: Training, batches: Iterator[Batch], batch_of: BatchOf | None) -> str | None:
    """Makes the steps that are left, up to a stop if one is asked for; why the run cannot go on, if it cannot."""
    config, counts = training.run.config, training.counts
    try:
        if training.step == 0 and training.run.fit is not None:
            assert batch_of is not None
            fit(training, batch_of)
        train(training, batches)
    except AskedToStop:
        return None
    except StoppedRun as reason:
        return str(reason)
    if training.step < training.run.total_steps or not training.run.total_steps:
        return None
    return counts.nothing_learnt(config.vision_loss_weight, config.text_loss_weight, config.trained_parts)


def fit(training: Training, batch_of: BatchOf) -> None:
    """What comes before the first step. Where none follows, which would see the same samples, it tells of those that
    are left out; StoppedRun where they are too many."""
    run, counts, data = training.run, training.counts, training.run.config.data
    about = start_fitted(run, training.model, batch_of, training.watchdog)
    if run.total_steps:
        return
    counts.add_left_out(int(about["samples"]) + len(about["left_out"]), about["left_out"])
    if training.log:
        training.log.left_out(0, about["left_out"])
    counts.check(data.max_rejected_fraction, data.on_refused, whole_epoch=True)


def train(training: Training, batches: Iterator[Batch]) -> None:
    """The loop. StoppedRun, on every worker at the same step, where it cannot go on."""
    run, worker, counts, data = training.run, training.worker, training.counts, training.run.config.data
    first_step, stopped, warned = training.step, False, False
    while training.step < run.total_steps and not stopped:
        begin_waiting(training)
        began = time.perf_counter()
        micro_batches, data_wait = take(batches, training.step, run.micro_batches_per_step // worker.world_size)
        starting = (
            data_wait if training.step == first_step else 0.0
        )  # data tasks have to get going: no part of training
        result = make_step(training, micro_batches)
        counts.add(micro_batches, result.sums, gather(micro_batches, result.sums, always=run.config.output.order))
        seconds = time.perf_counter() - began - starting
        counts.seconds += seconds
        measured = evaluate_during_training(training)
        write_log(training, result, data_wait, seconds, measured)
        is_epoch = training.step % run.steps_per_epoch == 0
        counts.check(data.max_rejected_fraction, data.on_refused, whole_epoch=is_epoch)
        stopped = result.stop  # one worker was asked, and all have heard of it with the sums of this step
        newly_warned = worker.is_warned() and not warned
        warned |= newly_warned
        if stopped or newly_warned or save_is_due(run, training.step, measured):
            save(training, measured)
        if stopped or training.step == run.total_steps:
            finish_saving(training.saver)


def begin_waiting(training: Training) -> None:
    """A step's micro-batches are about to be waited for."""
    if training.attempts and training.run.config.cluster.most_workers == 0:
        training.attempts.begin(training.step)  # samples are prepared in this process, and may be what ends it
    fault_point("step", training.step, training.worker.rank)


def take(batches: Iterator[Batch], step: int, count: int) -> tuple[list[Batch], float]:
    """This worker's micro-batches of a step, and the seconds spent waiting for them."""
    began = time.perf_counter()
    taken = list(islice(batches, count))
    assert [b.step for b in taken] == [step] * count, f"step {step}: got {[b.step for b in taken]}, out of plan"
    return taken, time.perf_counter() - began


def make_step(training: Training, micro_batches: Sequence[Batch]) -> StepResult:
    """One optimizer step, by which `training` is a step further."""
    run, config, step = training.run, training.run.config, training.step
    if training.attempts:
        stop_if_taken_over(run)
        training.attempts.begin(step)
    training.watchdog.alive()
    set_learning_rate(training.optimizer, training.learning_rate(step))
    result = train_step(
        training.model,
        training.optimizer,
        training.gradients,
        micro_batches,
        training.loss,
        max_grad_norm=config.optimizer.max_grad_norm,
        max_tokens=config.micro_batch_tokens,
        in_plan_order=config.cluster.bit_identical,
        asked_to_stop=training.worker.rank == 0 and run.stop_file.exists(),
        on_micro_batch=training.watchdog.done,
    )
    if training.attempts:
        training.attempts.done(step)
    training.step += 1
    fault_point("updated", training.step, training.worker.rank)
    return result


def gather(
    micro_batches: Sequence[Batch], sums: LossSums, always: bool
) -> list[tuple[int, list[str], list[Any], list[Any]]]:
    """Place, sample ids, left-out rows and notices of all workers' micro-batches; nothing where there is nothing to
    tell."""
    if not always and not sums.rejected and not sums.notices:
        return []
    mine = [(batch.micro_batch, batch.sample_ids, batch.rejected, batch.notices) for batch in micro_batches]
    return sorted(entry for of_worker in gather_objects(mine) for entry in of_worker)


def evaluate_during_training(training: Training) -> dict[str, float]:
    """What metrics.jsonl gets of a measurement of the model as it is, where one is due. All workers take part."""
    run, step, evaluator, watchdog = training.run, training.step, training.evaluator, training.watchdog
    every = run.config.evaluation.every_steps
    if evaluator is None or every is None or step % every or step == run.total_steps:
        return {}
    side = objective_of(run.config).trained_side

    def stay_in_step(done: int, of: int) -> None:
        fault_point("evaluate_on_the_way", step, this_rank())
        stop_if_refused(run, evaluator)  # all are asked, so that one that does not answer is noticed
        watchdog.done()

    watchdog.begin()
    with autocast(training.model):
        shares = gather_objects(evaluator.results(side, on_progress=stay_in_step))
        results = [result for mine in shares for result in mine]
    watchdog.begin()
    figures = figures_of(results, side)
    names = ("accuracy", "accuracy_vision", "accuracy_text", "kl_mean", "top1_agreement")
    return {f"eval_{name}": figures[name] for name in names if figures[name] is not None}


def write_log(
    training: Training, result: StepResult, data_wait: float, seconds: float, measured: dict[str, float]
) -> None:
    """Writes down the step that was made, its metrics where they are due."""
    run, step, counts, output = training.run, training.step, training.counts, training.run.config.output
    if training.log:
        metrics = metrics_of(run, step, result, training.optimizer, data_wait, seconds) | measured
        is_due = step % output.log_every_steps == 0 or step == run.total_steps or bool(measured)
        training.log.step(
            metrics, counts.latest_rejected, counts.latest_notices, counts.latest_ids, with_metrics=is_due
        )


def metrics_of(
    run: Run, step: int, result: StepResult, optimizer: Any, data_wait: float, seconds: float
) -> dict[str, float]:
    """One line of metrics.jsonl. Means are per supervised token; those of which the step has none are left out."""
    sums = result.sums
    metrics = {
        "step": step,
        "epoch": round(step / run.steps_per_epoch, 6),
        **learning_rates_of(optimizer),
        "grad_norm": result.grad_norm,
        "samples": int(sums.samples),
        "supervised_tokens": int(sums.supervised_tokens),
        "tokens_per_second": sums.tokens / seconds,
        "data_wait_seconds": data_wait,
        "step_seconds": seconds,
    }
    if run.cache is not None:
        metrics["cached_samples"] = int(sums.cached)
    return metrics | objective_of(run.config).metrics(sums, run.config)


def save(training: Training, measured: dict[str, float]) -> None:
    """Begins to write a checkpoint; StoppedRun where the weights are ruined, which all workers see alike."""
    stop_if_ruined(training.trained, training.step)
    training.counts.gather()
    if training.saver:
        training.saver.save(training.step, training.trained, training.optimizer, training.counts, measured)


# ------------------------------------------------------------------------------------------------------------ the end
def close(training: Training) -> None:
    """Waits for what is being written; no step is being made any more."""
    if training.saver:
        training.saver.wait()
    if training.log:
        training.log.close()
    if training.attempts:
        training.attempts.end()


def finish(training: Training, failure: str | None) -> Outcome:
    """Exports and measures the model of a run whose steps are all made; how the worker's part ended."""
    run, step = training.run, training.step
    if failure:
        return Outcome("failed", step, failure)
    if step < run.total_steps:
        return Outcome("stopped", step)
    training.model.to(getattr(torch, run.config.model.dtype))  # measured as it is exported
    fault_point("export", step, training.worker.rank)
    try:
        export_for_all(training)
        measure(training)
    except AskedToStop:
        return Outcome("stopped", step)
    except StoppedRun as reason:
        return Outcome("failed", step, str(reason))
    return Outcome("done", step, counts=training.counts.to_json())


def export_for_all(training: Training) -> None:
    """One worker writes `final/`; StoppedRun on all of them where it cannot."""
    training.watchdog.begin()
    problem = ""
    if training.worker.rank == 0:
        try:
            export(training.run, training.model)
        except OSError as error:
            problem = f"{error}; {MAKE_ROOM}"
    if problem := gather_objects(problem)[0]:
        raise StoppedRun(problem)


def measure(training: Training) -> None:
    """Writes evaluation.json: what the model answers to held-out questions, and what a student saves."""
    run, worker, evaluator, watchdog = training.run, training.worker, training.evaluator, training.watchdog
    objective = objective_of(run.config)
    evaluation: dict[str, Any] = {}
    if evaluator:

        def stop_if_asked(done: int, of: int) -> None:
            fault_point("evaluate", run.total_steps, worker.rank)
            if any(gather_objects(worker.rank == 0 and run.stop_file.exists())):
                raise AskedToStop
            stop_if_refused(run, evaluator)
            watchdog.done()

        watchdog.begin()
        sides = sides_of(run)
        results = evaluator.results(*sides, on_progress=stop_if_asked)
        everyone = gather_objects((results, evaluator.left_out))
        if worker.rank == 0:
            evaluation = evaluation_of(everyone, sides, evaluator.held_out)
    watchdog.rest()  # the workers part here
    if worker.rank == 0:
        if objective.has_student:
            evaluation["student_is"] = made_by(run.config)
            evaluation["model"] = layers_of(training.model)
            typical = evaluator.typical_sample() if evaluator else None
            evaluation["savings"] = measure_savings(training.model, typical)
        try:
            write_json(run.folder / "evaluation.json", evaluation)
        except OSError as error:
            raise StoppedRun(f"{error.filename} {error.strerror}; {MAKE_ROOM}") from error
        fault_point("end", run.total_steps)


def sides_of(run: Run) -> tuple[str, ...]:
    """Whose answers are compared at the end; the fitted student's where it is another than the one that is made."""
    fitted = run.fit is not None and run.total_steps > 0 and is_whole(run.start_file)  # it may have been taken away
    return sides_with(objective_of(run.config).sides, fitted=fitted)


def stop_if_refused(run: Run, evaluator: Evaluator) -> None:
    """StoppedRun on every worker where a held-out row of one of them was refused."""
    rows = [row for of_worker in gather_objects(evaluator.refused) for row in of_worker]
    if message := refused_message(rows, run.config.data.on_refused):
        raise StoppedRun(message)
