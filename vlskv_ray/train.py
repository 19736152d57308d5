"""The command `python -m vlskv_ray.train`: config -> checks -> Ray -> TorchTrainer -> summary."""

import argparse
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlskv_ray.cluster.node import process_group, travels
from vlskv_ray.cluster.placement import NoRoom, Wait, together, told_in
from vlskv_ray.cluster.preflight import check_nodes
from vlskv_ray.cluster.start import (
    ProgressLine,
    Reserved,
    check_gpus,
    describe,
    free_what_the_dead_reserved,
    ray_cluster,
    reserve,
)
from vlskv_ray.command import DONE, FAILED, exit_status, run_parser, shown
from vlskv_ray.config import ClusterConfig, Config, dump_config, load_config_and_notices
from vlskv_ray.data.collate import Batch
from vlskv_ray.data.pipeline import Loader, begin_at, executions, local_batches, ray_batches, ray_dataset
from vlskv_ray.data.plan import ROWS_IN_MEMORY
from vlskv_ray.launch.dry_run import dry_run
from vlskv_ray.launch.prepare import REMEDY, check_cache, prepare, run_folder, say
from vlskv_ray.report.finished import is_untouched, seals, unfinished, unmade, write_pages
from vlskv_ray.report.summary import closing, write_summary
from vlskv_ray.storage.checkpoint import has_checkpoints, newest_checkpoint, newest_step, sweep, write_text
from vlskv_ray.storage.lease import owned
from vlskv_ray.storage.run_log import take_back
from vlskv_ray.train_loop import train_worker
from vlskv_ray.training.faults import point
from vlskv_ray.training.run import Run, StoppedRun, Worker
from vlskv_ray.training.watchdog import DEATHS
from vlskv_ray.words import printable, printable_lines

FOR_EVER = 30 * 24 * 3600
"""Seconds that workers wait for each other: of one that ends they hear at once, and of one that stalls the watchdog."""
ROOM_IS_LOOKED_FOR_EVERY = 30.0
"""Seconds, where the number of workers follows the cluster."""


Told = Callable[[dict[str, Any]], None] | None
"""What is told every line of metrics.jsonl."""


class RunFailed(RuntimeError):
    """The run ended by an error that is not the user's input; its cause is the error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options, overrides = parse(arguments)
    return exit_status(lambda: run_command(options, overrides))


def run_command(options: argparse.Namespace, overrides: list[str]) -> int:
    """Does what the options say. ValueError for what the user can mend."""
    config, notices = load_config_and_notices(options.config, overrides)
    if options.print_config:
        print(dump_config(config), end="")
        return DONE
    if config.output.level in ("debug", "info"):
        print("\n".join(notices), end="\n" if notices else "")
    if not options.dry_run:
        return train(config, num_samples=options.num_samples, resume=options.resume)
    try:
        run, loader = prepare(config, num_samples=options.num_samples)
        if run.cache is not None:
            check_cache(run, loader)
        dry_run(run, replace(loader, cache=None))
    except StoppedRun as error:
        tell(f"error: {error}")
        return FAILED
    return DONE


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of the command, and what is left: overrides of the config."""
    parser = run_parser("train", "Distils a LLaVA-style vision-language model into its SwiftKV form.")
    parser.add_argument("--dry-run", action="store_true", help="check everything up to one step of one micro-batch")
    parser.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="auto: go on from the newest checkpoint if there is one; never: start anew, an older run of this name is "
        "moved aside; must: fail where there is nothing to go on from",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and end")
    return parser.parse_known_args(arguments)


# ------------------------------------------------------------------------------------------------------------ the run
def train(
    config: Config,
    *,
    num_samples: int | None = None,
    resume: str = "auto",
    on_metrics: Told = None,
) -> int:
    """A whole run, from config to `final/` and summary.json.

    Args:
        config: of the run.
        num_samples: use only the first so many samples of the mixture.
        resume: "auto", "never" or "must", as on the command line.
        on_metrics: told every line of metrics.jsonl, in the calling thread; what it raises ends the run.

    Returns:
        the exit status of the command.

    Raises:
        ValueError: for what the user can mend.
    """
    began = time.monotonic()
    folder = run_folder(config)
    if resume == "never" and folder.exists():
        say(config, f"moved the older run to {shown(moved_aside(folder))}")
    with owned(folder) as owner:
        saved = newest_checkpoint(folder / "checkpoints", warn=lambda text: tell(f"warning: {text}"))
        if saved is None and resume == "must":
            raise ValueError(f"{folder}: --resume must was given, but there is no checkpoint to go on from")
        if saved is None and ((folder / "summary.json").exists() or has_checkpoints(folder / "checkpoints")):
            raise ValueError(f"{folder}: holds a run, but no checkpoint of it that is whole; {REMEDY}")
        run, loader = prepare(config, saved, num_samples, owner)
        if len(loader.plan.lengths) > ROWS_IN_MEMORY:
            loader = replace(loader, plan=loader.plan.with_lengths_in(folder / "lengths.npy"))
        if saved and saved.step >= run.total_steps and is_completed(run):
            return DONE
        if run.cache is not None:
            check_cache(run, loader)
        sweep(run.checkpoints, saved.step if saved else 0)
        take_back(run.folder, saved.step if saved else 0)
        if saved:
            say(config, f"resume        from step {saved.step}")
        start = run_here if config.cluster.most_workers == 0 else run_on_ray
        try:
            outcome, asked_by = start(run, loader, on_metrics)
        except RunFailed as error:
            assert error.__cause__ is not None
            return told_of_failure(folder, error.__cause__)
        if outcome["status"] != "done":
            return told_of_end(run, loader, outcome, asked_by)
        finish(run, outcome, time.monotonic() - began)
        return DONE


def finish(run: Run, outcome: dict[str, Any], seconds: float) -> None:
    """Writes down what a run came to, and says it; model and evaluation are there already."""
    write_summary(run, outcome, seconds, seals(run.folder))
    point("summary", run.total_steps)
    write_pages(run.folder)
    say(run.config, closing(run.folder))


def is_completed(run: Run) -> bool:
    """Whether a run whose steps are all made has what a finished one has; pages that it lacks are made from the rest.

    Where more is missing, what somebody may have changed of the model is kept: it is about to be exported once more.
    """
    folder, config_text = run.folder, dump_config(run.config)
    written = folder / "config.yaml"
    if not written.is_file() or config_text.startswith(written.read_text(errors="replace")):
        write_text(written, config_text)
    why = unfinished(folder, run.total_steps)
    if why is None:
        lacked = unmade(folder)
        write_pages(folder, lacked)
        print(f"this run is already finished; `--resume never` starts it anew\n{printable_lines(closing(folder))}")
        if lacked:
            say(run.config, f"made again    {', '.join(lacked)}")
        return True
    if (folder / "summary.json").exists():  # it came to its end before, and all had time to look at it
        say(run.config, f"made again    what the end of this run leaves: {why}")
        if (folder / "final").exists() and not is_untouched(folder):
            older = unused_name(folder / "final")
            (folder / "final").rename(older)
            say(run.config, f"moved the model that was there to {shown(older)}")
    return False


def told_of_failure(folder: Path, cause: BaseException) -> int:
    """Says what ended a run and keeps all of it in error.log; returns the exit status."""
    with suppress(OSError):  # a full disk may be what it is about
        write_text(folder / "error.log", "".join(traceback.format_exception(cause)))
    reason = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[-1]}"
    if "OutOfMemory" in reason and "CUDA" not in reason:  # of a GPU, torch says itself what was full
        reason = "the memory of a machine was full, whoever filled it, and Ray ended processes of this run"
    tell(f"error: {reason}; all of it is in {shown(folder / 'error.log')}{advice(cause)}")
    return FAILED


def told_of_end(run: Run, loader: Loader, outcome: dict[str, Any], asked_by: int | None) -> int:
    """Says why a run ended before it was done; returns the exit status. ValueError where its model was refused."""
    match outcome["status"]:
        case "refused":
            raise ValueError(outcome["message"])
        case "poisoned":
            ids = printable(", ".join(samples_of(loader, outcome["step"])))
            tell(
                f"error: step {outcome['step'] + 1} was begun {DEATHS} times and its workers ended in it each time: by "
                f"one of its samples, or from outside, as by a machine that has no memory left or by a person. Its "
                f"samples are {ids}. The same command tries it again"
            )
            return FAILED
        case "failed":
            tell(f"error: {outcome['message']}")
            return FAILED
        case "interrupted":
            print("ended at once; the same command goes on from the newest checkpoint, if there is one yet")
        case _:
            print(f"saved at step {outcome['step']} of {run.total_steps}; the same command goes on from there")
    return 128 + (asked_by or signal.SIGINT)


def tell(text: str) -> None:
    print(printable_lines(text), file=sys.stderr)


def moved_aside(folder: Path) -> Path:
    """Gives a folder that nobody is using another name, and returns that: nothing is deleted."""
    with owned(folder):
        older = unused_name(folder)
        folder.rename(older)
    return older


def unused_name(folder: Path) -> Path:
    """What a folder that is there may be called from now on."""
    older = folder.with_name(f"{folder.name}-until-{time.strftime('%Y%m%d-%H%M%S')}")
    while older.exists():
        older = older.with_name(f"{older.name}-")
    return older


def samples_of(loader: Loader, step: int) -> list[str]:
    """The ids of a step's samples."""
    places = [loader.plan.locate(number) for row in loader.plan.rows(step, step + 1) for number in row["samples"]]
    return [loader.sources[table].uid(row) for table, row in places]


def advice(error: BaseException) -> str:
    """What to change where the memory was not enough, as far as an error tells."""
    text = str(error)
    if "OutOfMemory" in text or "low on memory" in text:
        sure = "if it was this run's"
    elif "SIGKILL" in text or "unexpectedly" in text:
        sure = "a process was ended from outside, as a machine does that has no memory left"
    else:
        return ""
    return (
        f"\n{sure}: --dry-run tells what a worker takes; lower micro_batch_tokens, micro_batch_size, "
        f"model.logits_memory_mib or cluster.num_workers; the same command goes on from the newest checkpoint there is"
    )


def run_here(run: Run, loader: Loader, on_metrics: Told = None) -> tuple[dict[str, Any], int | None]:
    """Everything in this process, without Ray: `cluster.num_workers: 0`."""
    run = with_threads(run, run.config.cluster.threads_per_worker or os.cpu_count() or 1)

    def work() -> dict[str, Any]:
        return train_worker(run, Worker(), lambda step: local_batches(loader, step, run.total_steps))

    return watch(run, work, apart=False, on_metrics=on_metrics)


def run_on_ray(run: Run, loader: Loader, on_metrics: Told = None) -> tuple[dict[str, Any], int | None]:
    """A TorchTrainer on the cluster there is, or on this machine."""
    config = run.config
    with ray_cluster(config.cluster.address, quiet=config.output.level != "debug") as cluster:
        # nodes of a cluster may be taken away with notice; this machine is not, and watching costs a process
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", str(int(cluster.joined)))
        run = replace(run, watches_nodes=os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "1")
        check_gpus(config.cluster, cluster.gpus)
        reserved = reserve(config.cluster, config.data, cluster.cpus, cluster.largest_node)
        run = with_threads(run, reserved.threads_per_worker)
        say(config, f"cluster       {describe(config, reserved, cluster)}")
        check_nodes(run, loader.sources, reserved, cluster)
        say(config, "starting      the workers, which takes Ray a while: up to a minute on two cores")
        try:
            for failures in range(config.cluster.max_failures + 1):
                try:
                    return watch(run, lambda: fit(run, loader, reserved), apart=True, on_metrics=on_metrics)
                except RunFailed as error:
                    if lacks := no_room(error.__cause__):
                        return {"status": "failed", "message": str(lacks)}, None
                    if not is_lost_controller(error.__cause__) or failures == config.cluster.max_failures:
                        raise
                    say(
                        config, "Ray's controller of this run was lost or gave up; it is started again with the workers"
                    )
                    free_what_the_dead_reserved()  # the workers' CPUs, which the next ones need
                    take_back(run.folder, newest_step(run.checkpoints))
            raise AssertionError("not reached")
        finally:
            shutil.rmtree(run.folder / "ray", ignore_errors=True)  # Ray's own notes; ours are all that is resumed from


def no_room(error: BaseException | None) -> NoRoom | None:
    """What says that the cluster had no room for the workers in time, if that is what ended a run."""
    from ray.train import ControllerError

    while isinstance(error, ControllerError):
        error = error.controller_failure
    return error if isinstance(error, NoRoom) else None


def is_lost_controller(error: BaseException | None) -> bool:
    """Whether the process died that holds the workers together, or gave up because one of theirs died while they were
    being started; what Ray replaces itself is no such case."""
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.train import ControllerError

    if isinstance(error, ControllerError):
        error = error.controller_failure
    return isinstance(error, RayActorError | OutOfMemoryError)


def fit(run: Run, loader: Loader, reserved: Reserved) -> dict[str, Any]:
    """Runs the workers; Ray starts all of them again when one dies, and they go on from the newest checkpoint."""
    from ray.data import ExecutionOptions
    from ray.train import DataConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    config = run.config

    def dataset() -> Any:  # called at every start of the workers, when it is known which step comes next
        return ray_dataset(
            loader,
            executions(newest_step(run.checkpoints), run.total_steps, run.micro_batches_per_step).step,
            run.first_step_file,
            cpus_per_task=reserved.cpus_per_task,
            num_tasks=reserved.num_tasks,
            first_task=asking.first_data_task(),
        )

    each = each_worker_takes(config.cluster, reserved)
    asking = together(
        {"CPU": reserved.cpus_per_task},
        each["resources_per_worker"],
        config.cluster.fewest_workers,
        Wait(config.cluster.wait_seconds, told_in(run.waiting_file)),
    )
    travels()
    trainer = TorchTrainer(
        ray_worker,
        train_loop_config={"run": run},
        torch_config=process_group(backend_of(config.cluster), config.cluster.network_interface, FOR_EVER),
        scaling_config=ScalingConfig(
            num_workers=config.cluster.num_workers,
            **each,
            placement_strategy="SPREAD",
            elastic_resize_monitor_interval_s=ROOM_IS_LOOKED_FOR_EVERY,
        ),
        datasets={"train": dataset},
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
        run_config=RunConfig(
            name=f"attempt-{time.time_ns()}",  # a new one each time: Ray's own records are never resumed from
            storage_path=str(run.folder / "ray"),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            callbacks=[asking],
            logging_config=LoggingConfig(log_level="INFO" if config.output.level == "debug" else "ERROR"),
        ),
    )
    outcome: dict[str, Any] = trainer.fit().return_value
    return outcome


def backend_of(cluster: ClusterConfig) -> str:
    """By what tensors travel between workers. What workers tell each other beside gradients stays on CPUs, for which
    gloo is there in any case."""
    return "cpu:gloo,cuda:nccl" if cluster.use_gpu else "gloo"


def each_worker_takes(cluster: ClusterConfig, reserved: Reserved) -> dict[str, Any]:
    """What Ray's ScalingConfig is told of each worker's share of the cluster."""
    resources = {"CPU": reserved.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {})
    return {"use_gpu": cluster.use_gpu, "resources_per_worker": resources}


def ray_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What Ray runs on each worker: where `train_worker` meets Ray Train."""
    import ray.train

    run: Run = settings["run"]
    context = ray.train.get_context()

    def is_warned() -> bool:
        return ray.train.get_preemption_info() is not None  # the same on all workers

    rank, world_size = context.get_world_rank(), context.get_world_size()
    worker = Worker(rank, world_size, is_warned if run.watches_nodes else lambda: False)

    def batches_from(step: int) -> Iterator[Batch]:
        shard = ray.train.get_dataset_shard("train")
        for first_step in executions(step, run.total_steps, run.micro_batches_per_step):
            if worker.rank == 0:  # the steps before are done, and Ray begins when every worker has come here
                begin_at(run.first_step_file, first_step)
            yield from ray_batches(shard)

    return train_worker(run, worker, batches_from)


def watch(
    run: Run, work: Callable[[], dict[str, Any]], apart: bool, on_metrics: Told = None
) -> tuple[dict[str, Any], int | None]:
    """Runs `work` in a thread while this one shows progress and takes signals.

    Args:
        run: whose folder to watch.
        work: returns the outcome.
        apart: the work itself is done by other processes, so that it can be left before it has ended.
        on_metrics: told every line of metrics.jsonl.

    Returns:
        what `work` returned, and the signal that asked it to stop, if one did.

    Raises:
        RunFailed: `work` raised; the error is its cause.
    """
    outcome: dict[str, Any] = {}
    failure: list[BaseException] = []
    asked: list[int] = []

    def target() -> None:
        try:
            outcome.update(work())
        except BaseException as error:  # whatever it is, it is raised again below, in the thread that can report it
            failure.append(error)

    def stop(signum: int, frame: Any) -> None:
        asked.append(signum)
        if len(asked) > 1 + apart:
            run.attempt_file.unlink(missing_ok=True)
            os._exit(128 + signum)
        run.stop_file.touch()
        if is_underway():
            print("\nstopping, with all that is done saved (once more to end at once)", flush=True)

    def is_underway() -> bool:
        return not apart or (bool(progress.latest) and not progress.waits)

    run.checkpoints.mkdir(exist_ok=True)
    run.stop_file.unlink(missing_ok=True)
    write_text(run.folder / "config.yaml", dump_config(run.config))
    shown_at = run.config.output.level in ("debug", "info")
    progress = ProgressLine(
        run.folder / "metrics.jsonl",
        run.total_steps,
        shown_at,
        afterwards=measuring(run),
        on_metrics=on_metrics,
        notes=run.waiting_file,
    )
    before = {}
    if threading.current_thread() is threading.main_thread():  # others, as in a sweep, take no signals
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
            progress.update()
            if asked and apart and (len(asked) > 1 or not is_underway()):  # asked twice, or there is nothing to save
                run.attempt_file.unlink(missing_ok=True)  # it was not the step that ended it
                return {"status": "interrupted"}, asked[0]
    finally:
        progress.close()
        run.stop_file.unlink(missing_ok=True)
        for number, handler in before.items():
            signal.signal(number, handler)
    if failure:
        raise RunFailed("the run failed") from failure[0]
    return outcome, asked[0] if asked else None


def measuring(run: Run) -> str:
    """What happens after the last step."""
    samples = len(run.held_out.rows()) if run.held_out else 0
    answers = [f"answers to {samples} held-out samples"] if samples else []
    savings = ["what the student saves"] if run.config.objective == "distill" else []
    return f"measuring     {' and '.join(answers + savings)}" if answers or savings else ""


def with_threads(run: Run, threads: int) -> Run:
    """The run with its thread count spelled out: it decides the last bits of every number."""
    cluster = run.config.cluster.model_copy(update={"threads_per_worker": threads})
    return replace(run, config=run.config.model_copy(update={"cluster": cluster}))


if __name__ == "__main__":
    sys.exit(main())
