"""One worker's life: build, resume, step, log, save. It knows neither Ray nor where its micro-batches come from."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch

from vlskv_ray.data.collate import Batch
from vlskv_ray.data.sample import refused_message
from vlskv_ray.errors import AskedToStop, StoppedRun
from vlskv_ray.evaluation.evaluator import SIDES, Evaluator, evaluation_of, figures_of
from vlskv_ray.evaluation.savings import layers_of, measure_savings
from vlskv_ray.files import write_json
from vlskv_ray.model.build import (
    build_plain,
    build_student,
    device_of,
    find_model,
    load_processor,
    trainable_parameters,
)
from vlskv_ray.storage.run_log import RunLog
from vlskv_ray.storage.saving import MAKE_ROOM, Saver, export, finish_saving, resume, save_is_due, stop_if_taken_over
from vlskv_ray.training.distill import LossSums
from vlskv_ray.training.faults import fault_point
from vlskv_ray.training.run import Run, Worker, gather_objects, this_rank
from vlskv_ray.training.step import (
    GradientBuffer,
    StepResult,
    autocast,
    build_optimizer,
    learning_rate_schedule,
    objective_of,
    set_learning_rate,
    stop_if_ruined,
    train_step,
)
from vlskv_ray.training.watchdog import Attempts, Watchdog


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
    poisoned = gather_objects(attempts.poisoned(run.total_steps) if attempts else None)[0]
    if poisoned is not None:
        if attempts:
            attempts.end()  # whoever starts the run again wants it tried
        return {"status": "poisoned", "step": poisoned}
    try:
        model = model_of(run)
        trained = trainable_parameters(model)
        optimizer = build_optimizer(config, trained)
        step, counts = resume(run, trained, optimizer)
    except ValueError as error:  # the same on every worker, and the next time
        return {"status": "refused", "message": str(error), "step": 0}
    gradients = GradientBuffer(trained.values())
    schedule = learning_rate_schedule(config, run.total_steps)
    log = saver = None
    if worker.rank == 0:
        log = RunLog(run.folder, step, order=output.order, tensorboard=output.tensorboard)
        saver = Saver(run, log)
    objective = objective_of(config, run.cache)
    per_worker = run.micro_batches_per_step // worker.world_size
    evaluator = None
    if run.held_out:
        processor = load_processor(find_model(config.model.name_or_path, config.model.revision), tried=True)
        evaluator = Evaluator(model, processor, run.held_out, rank=worker.rank, world_size=worker.world_size)
    watchdog = Watchdog(
        run.folder / "stacks", worker.rank, config.cluster.stall_seconds if config.cluster.most_workers else None
    )
    watchdog.begin()
    batches = batches_from(step)
    stopped, failure, first_step, warned = False, None, step, False

    while step < run.total_steps and not stopped:
        if attempts and config.cluster.most_workers == 0:
            attempts.begin(step)  # samples are prepared in this process, and may be what ends it
        fault_point("step", step, worker.rank)
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
            if attempts:
                attempts.done(step)
            step += 1
            fault_point("updated", step, worker.rank)
            counts.add(micro_batches, result.sums, gather(micro_batches, result.sums, always=output.order))
            seconds = time.perf_counter() - began - starting
            counts.seconds += seconds
            measured = measured_on_the_way(run, step, model, evaluator, watchdog)
            if log:
                metrics = metrics_of(run, step, result, optimizer, data_wait, seconds) | measured
                due = step % output.log_every_steps == 0 or step == run.total_steps or bool(measured)
                log.step(metrics, counts.latest_rejected, counts.latest_notices, counts.latest_ids, with_metrics=due)
            is_epoch = step % run.steps_per_epoch == 0
            counts.check(config.data.max_rejected_fraction, config.data.on_refused, whole_epoch=is_epoch)
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

    if failure is None and step == run.total_steps:
        failure = counts.nothing_learnt(config.vision_loss_weight, config.text_loss_weight)
    if saver:
        saver.wait()
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
        fault_point("export", step, worker.rank)
        try:
            export_for_all(run, worker, model, watchdog)
            measure(run, worker, model, evaluator, watchdog)
        except AskedToStop:
            outcome = {"status": "stopped", "step": step}
        except StoppedRun as reason:
            outcome = {"status": "failed", "message": str(reason), "step": step}
    watchdog.rest()
    return outcome


def export_for_all(run: Run, worker: Worker, model: Any, watchdog: Watchdog) -> None:
    """One worker writes `final/`; StoppedRun on all of them where it cannot."""
    watchdog.begin()
    wrong = ""
    if worker.rank == 0:
        try:
            export(run, model)
        except OSError as error:
            wrong = f"{error}; {MAKE_ROOM}"
    if wrong := gather_objects(wrong)[0]:
        raise StoppedRun(wrong)


def model_of(run: Run) -> Any:
    """The student of a distillation, or the whole model where all of it trains; on the device it will be used on.

    Everything else goes by where the model is.
    """
    device = device_of("cuda" if run.config.cluster.use_gpu else "cpu")
    options = run.config.model
    files = find_model(options.name_or_path, options.revision)  # here: each machine has its own copy of a hub model
    if run.config.objective == "sft":
        model = build_plain(
            files, options.num_hidden_layers, attn_implementation=options.attn_implementation, seed=run.config.seed
        )
    else:
        model = build_student(
            files,
            options.num_key_value_layers,
            options.key_value_group_size,
            attn_implementation=options.attn_implementation,
            dtype=getattr(torch, options.dtype),
        )
    return model.to(device)


def take(batches: Iterator[Batch], step: int, count: int) -> tuple[list[Batch], float]:
    """This worker's micro-batches of a step, and the seconds spent waiting for them."""
    began = time.perf_counter()
    taken = list(islice(batches, count))
    assert [b.step for b in taken] == [step] * count, f"step {step}: got {[b.step for b in taken]}, out of plan"
    return taken, time.perf_counter() - began


def gather(
    micro_batches: Sequence[Batch], sums: LossSums, always: bool
) -> list[tuple[int, list[str], list[Any], list[Any]]]:
    """Place, sample ids, left-out rows and notices of all workers' micro-batches; nothing where there is nothing to
    tell."""
    if not always and not sums.rejected and not sums.notices:
        return []
    mine = [(batch.micro_batch, batch.sample_ids, batch.rejected, batch.notices) for batch in micro_batches]
    return sorted(entry for of_worker in gather_objects(mine) for entry in of_worker)


def measured_on_the_way(
    run: Run, step: int, model: Any, evaluator: Evaluator | None, watchdog: Watchdog
) -> dict[str, float]:
    """What metrics.jsonl gets of a measurement of the model as it is, where one is due. All workers take part."""
    every = run.config.evaluation.every_steps
    if evaluator is None or every is None or step % every or step == run.total_steps:
        return {}
    side = "sft_model" if run.config.objective == "sft" else "student"

    def together(done: int, of: int) -> None:
        fault_point("evaluate_on_the_way", step, this_rank())
        stop_if_refused(run, evaluator)  # all are asked, so that one that does not answer is noticed
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
            fault_point("evaluate", run.total_steps, worker.rank)
            if any(gather_objects(worker.rank == 0 and run.stop_file.exists())):
                raise AskedToStop
            stop_if_refused(run, evaluator)
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
        try:
            write_json(run.folder / "evaluation.json", evaluation)
        except OSError as error:
            raise StoppedRun(f"{error.filename} {error.strerror}; {MAKE_ROOM}") from error
        fault_point("end", run.total_steps)


def stop_if_refused(run: Run, evaluator: Evaluator) -> None:
    """StoppedRun on every worker where a held-out row of one of them was refused."""
    rows = [row for of_worker in gather_objects(evaluator.refused) for row in of_worker]
    if message := refused_message(rows, run.config.data.on_refused):
        raise StoppedRun(message)


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
    if run.cache is not None:
        metrics["cached_samples"] = int(sums.cached)
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
