"""The command `python -m vlskv_ray.train`: config -> checks -> Ray -> TorchTrainer -> summary."""

import argparse
import fcntl
import json
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

import vlskv_ray
from vlskv_ray.checkpoint import SavedState, has_checkpoints, newest_checkpoint, newest_step, sweep, write_text
from vlskv_ray.cluster import ProgressLine, Reserved, describe, ray_cluster, reserve, threads_of
from vlskv_ray.command import DONE, FAILED, exit_status, run_parser, shown
from vlskv_ray.config import Config, changed_keys, dump_config, load_config_and_notices
from vlskv_ray.counting import matmul_seconds, size
from vlskv_ray.data.chat import Limits, check_template
from vlskv_ray.data.collate import IGNORE_INDEX, Batch
from vlskv_ray.data.pipeline import Loader, local_batches, ray_batches, ray_dataset
from vlskv_ray.data.plan import Plan, Table, first_of_mixture
from vlskv_ray.data.questions import HeldOut
from vlskv_ray.data.sources import open_sources
from vlskv_ray.dry_run import dry_run
from vlskv_ray.model.build import (
    check_growth,
    find_model,
    fingerprint_of,
    load_config,
    load_processor,
    refuse_student,
    swiftkv_config,
    with_layers,
)
from vlskv_ray.model_card import write_model_card
from vlskv_ray.report import closing, write_summary
from vlskv_ray.report_page import write_report
from vlskv_ray.run_log import take_back
from vlskv_ray.teacher_cache import IN_MEMORY, TeacherCache
from vlskv_ray.train_loop import Run, StoppedRun, Worker, train_worker

CACHE_SAMPLES = 16
"""From which the size of a teacher cache is estimated."""
REMEDY = "use --resume never to start anew, or another output.name"


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
        print(f"error: {error}", file=sys.stderr)
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


# ------------------------------------------------------------------------------------------------- before the workers
def prepare(config: Config, saved: SavedState | None = None, num_samples: int | None = None) -> tuple[Run, Loader]:
    """Checks model, processor and data of a run and lays out its plan; loads no weights and writes nothing.

    Args:
        config: of the run.
        saved: the checkpoint it goes on from; that fixes how many micro-batches a step has.
        num_samples: use only the first so many samples of the mixture.

    Raises:
        ValueError: something in the config cannot work; says which key and what to do.
    """
    files = find_model(config.model.name_or_path, config.model.revision)
    model, text_config = config.model.model_copy(update={"revision": files.revision}), load_config(files).text_config
    if config.objective == "sft":
        refuse_student(files, load_config(files))
        check_growth(files, text_config.num_hidden_layers, model.num_hidden_layers)
        layers = model.num_hidden_layers or text_config.num_hidden_layers
        text_config = with_layers(load_config(files), layers).text_config
    else:
        wanted = (model.num_key_value_layers, model.key_value_group_size)
        text_config = swiftkv_config(load_config(files), *wanted).text_config
        resolved = {name: getattr(text_config, name) for name in ("num_key_value_layers", "key_value_group_size")}
        model = model.model_copy(update=resolved)
    if model.dtype == "auto":
        model = model.model_copy(update={"dtype": dtype_of(config, saved, text_config)})
    check_template(load_processor(files))
    positions = text_config.max_position_embeddings
    max_length = config.data.max_length or positions
    if max_length > positions:
        raise ValueError(f"data.max_length: {max_length}, but the model has positions up to {positions} only")
    data = config.data.model_copy(update={"max_length": max_length})
    config = config.model_copy(update={"model": model, "data": data})

    sources = tuple(open_sources(data.sources, cache_dir=data.cache_dir))
    tables = [Table(source.num_images, source.text_bytes, source.weight) for source in sources]
    if num_samples is not None:
        tables = first_of_mixture(tables, num_samples)
    micro_batches_per_step = check_resumable(config, saved)
    if config.micro_batch_size * micro_batches_per_step > 2**24:
        raise ValueError(
            f"micro_batch_size: {config.micro_batch_size} x {micro_batches_per_step} micro-batches is a step of more "
            f"than {2**24} samples; lower it or gradient_accumulation_steps"
        )
    plan = Plan(
        tables,
        seed=config.seed,
        micro_batch_size=config.micro_batch_size,
        micro_batches_per_step=micro_batches_per_step,
        group_by_length=data.group_by_length,
    )
    data_fingerprint = "-".join([plan.fingerprint(), *(source.fingerprint for source in sources)])
    total_steps = min(config.epochs * plan.steps_per_epoch, config.max_steps or sys.maxsize)
    every_steps = config.checkpoint.every_steps or math.ceil(total_steps / 10)
    checkpoint = config.checkpoint.model_copy(update={"every_steps": every_steps})
    run = Run(
        config=config.model_copy(update={"checkpoint": checkpoint}),
        folder=run_folder(config),
        micro_batches_per_step=micro_batches_per_step,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=total_steps,
        fingerprints={"model": fingerprint_of(files), "data": data_fingerprint},
    )
    for what, now in run.fingerprints.items():
        if saved and saved.state["fingerprints"][what] != now:
            raise ValueError(f"{saved.path}: cannot go on from here: the {what} changed since; {REMEDY}")
    limits = Limits(max_length, data.max_images_per_sample, data.image_processing_batch_size)
    run = replace(run, held_out=held_out_of(config, limits))
    say(config, start_block(run, plan, text_config))
    loader = Loader(sources, plan, model.name_or_path, model.revision, limits)
    if config.model.teacher_cache != "off":
        run = replace(run, cache=teacher_cache_of(run, text_config))
        loader = replace(loader, cache=run.cache)
    trained_on = {(source.name, source.fingerprint) for source in sources}
    for source in run.held_out.sources if run.held_out else ():
        if (source.name, source.fingerprint) in trained_on:
            say(config, f"warning: {source.name} of evaluation.sources is trained on, so it measures nothing held out")
    return run, loader


def dtype_of(config: Config, saved: SavedState | None, text: Any) -> str:
    """What model.dtype=auto stands for, the same on all workers: as the checkpoint has it, else measured here."""
    if saved:
        before = saved.state["config"].get("model", {}).get("dtype")
        return str(before) if before in ("float32", "bfloat16") else "float32"
    threads = threads_of(config.cluster, os.cpu_count() or 1)
    seconds = matmul_seconds(512, text.hidden_size, text.intermediate_size, threads)
    chosen = min(seconds, key=lambda name: seconds[name])
    other = max(seconds.values()) / min(seconds.values())
    say(config, f"precision     {chosen}: {other:.1f} times as fast here as the other of float32 and bfloat16")
    return chosen


def teacher_cache_of(run: Run, text: Any) -> TeacherCache:
    """The teacher cache of a run, named by all that the states of a sample depend on."""
    options, data = run.config.model, run.config.data
    files = find_model(options.name_or_path, options.revision)
    stats = [path.stat() for path in sorted(files.folder.glob("*.safetensors"))] if files.folder else []
    depends_on = {
        "model": run.fingerprints["model"],
        "written": [stat.st_mtime_ns for stat in stats],  # the fingerprint does not look at all of a large file
        "num_key_value_layers": text.num_key_value_layers,
        "dtype": options.dtype,
        "limits": [data.max_length, data.max_images_per_sample],
        "transformers": version("transformers"),
    }
    if options.teacher_cache == "memory":
        return TeacherCache(IN_MEMORY, depends_on, temporary=True)
    return TeacherCache(Path(options.teacher_cache_dir or f"{run.config.output.dir}/.teacher-cache"), depends_on)


def check_cache(run: Run, loader: Loader) -> None:
    """Says what a run's teacher cache will take. ValueError where it does not fit.

    The size is estimated from a few samples; as many as are there already count as this run's.
    """
    assert run.cache is not None
    text = load_config(find_model(run.config.model.name_or_path, run.config.model.revision)).text_config
    rows = sum(map(len, loader.plan.tables))
    numbers = np.linspace(0, rows - 1, min(rows, CACHE_SAMPLES), dtype=np.int64).tolist()
    tried, _ = replace(loader, cache=None).samples(numbers)
    lengths = [len(sample.input_ids) + 2 * int((sample.labels != IGNORE_INDEX).sum()) for sample in tried] or [0]
    states = float(np.mean(lengths)) * text.hidden_size * (2 if run.config.model.dtype == "bfloat16" else 4)
    there, seen = run.cache.count(), run.total_steps * run.micro_batches_per_step * run.config.micro_batch_size
    wanted = max(0, min(rows, seen) - there) * states
    say(
        run.config,
        f"teacher cache {there} samples are in {shown(run.cache.folder)}; up to {size(wanted)} more will be written",
    )
    run.cache.check_room(wanted)


def held_out_of(config: Config, limits: Limits) -> HeldOut | None:
    """What answers are to be measured on, if anything."""
    options = config.evaluation
    if not options.sources:
        return None
    sources = tuple(open_sources(options.sources, cache_dir=config.data.cache_dir))
    return HeldOut(sources, options.num_samples, limits, options.batch_size, options.max_new_tokens)


def check_resumable(config: Config, saved: SavedState | None) -> int:
    """Micro-batches of a step, all workers together: fixed when a run starts, however many workers it goes on with.

    Raises:
        ValueError: it would not be the same run, or the workers cannot share its micro-batches.
    """
    workers = max(config.cluster.num_workers, 1)
    wanted = config.gradient_accumulation_steps * workers
    if saved is None:
        return wanted
    try:
        before = Config.model_validate(saved.state["config"])
    except ValidationError:
        raise ValueError(f"{saved.path}: cannot go on from here: written by another version; {REMEDY}") from None
    changed = changed_keys(before, config)
    if max(before.cluster.num_workers, 1) != workers:  # then another accumulation makes up for it
        changed.pop("gradient_accumulation_steps", None)
    if changed:
        what = ", ".join(f"{key} was {was} and is {now}" for key, (was, now) in changed.items())
        raise ValueError(f"{saved.path}: cannot go on from here: {what}; {REMEDY}")
    count: int = saved.state["micro_batches_per_step"]
    if count % workers:
        fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise ValueError(
            f"cluster.num_workers: {workers} workers cannot share the {count} micro-batches of a step equally, which "
            f"were fixed when this run started; wanted one of {fitting}"
        )
    return count


def run_folder(config: Config) -> Path:
    return Path(config.output.dir) / str(config.output.name)


def start_block(run: Run, plan: Plan, text: Any) -> str:
    """What is about to happen, for the reader of a log."""
    config, workers = run.config, max(run.config.cluster.num_workers, 1)
    versions = "  ".join(f"{name} {version(name)}" for name in ("ray", "torch", "transformers"))
    accumulation = run.micro_batches_per_step // workers
    model = config.model
    revision = f" at {model.revision}" if model.revision else ""
    rows = " + ".join(str(len(table)) for table in plan.tables)
    held_out = f", {len(run.held_out.rows())} held out to measure on" if run.held_out else ""
    what = "all weights train on the answers"
    if config.objective == "distill":
        what = f"SwiftKV from layer {text.num_key_value_layers} in groups of {text.key_value_group_size}"
    return (
        f"vlskv_ray {vlskv_ray.__version__}  {versions}  python {platform.python_version()}\n"
        f"model         {model.name_or_path}{revision}: {text.num_hidden_layers} text layers, {what}, "
        f"weights {model.dtype}\n"
        f"data          {plan.samples_per_epoch} samples an epoch, of {rows} rows{held_out}\n"
        f"global batch  {config.micro_batch_size * run.micro_batches_per_step} = {config.micro_batch_size} samples x "
        f"{accumulation} accumulation x {workers} worker{'s' * (workers > 1)}\n"
        f"run           {run.total_steps} steps, {run.steps_per_epoch} an epoch, into {shown(run.folder)}"
    )


def say(config: Config, text: str) -> None:
    if config.output.level in ("debug", "info"):
        print(text, flush=True)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Makes the run folder this process's own while it lives, so that two commands never write one run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ValueError(f"output.dir: {folder} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process runs this run; wait, or use another output.name") from None
        try:
            yield
        finally:
            if folder.exists() and os.listdir(folder) == [".lock"]:
                shutil.rmtree(folder)  # nothing came of it


# ------------------------------------------------------------------------------------------------------------ the run
def train(config: Config, *, num_samples: int | None = None, resume: str = "auto") -> int:
    """A whole run, from config to `final/` and summary.json; the exit status. ValueError for what the user can mend."""
    began = time.monotonic()
    folder = run_folder(config)
    if resume == "never" and folder.exists():
        with owned(folder):  # not one that is running
            older = folder.with_name(f"{folder.name}-until-{time.strftime('%Y%m%d-%H%M%S')}")
            while older.exists():
                older = older.with_name(f"{older.name}-")
            folder.rename(older)  # nothing is deleted
        say(config, f"moved the older run to {shown(older)}")
    with owned(folder):
        saved = newest_checkpoint(folder / "checkpoints", warn=lambda text: print(f"warning: {text}", file=sys.stderr))
        if saved is None and resume == "must":
            raise ValueError(f"{folder}: --resume must was given, but there is no checkpoint to go on from")
        if saved is None and ((folder / "summary.json").exists() or has_checkpoints(folder / "checkpoints")):
            raise ValueError(f"{folder}: holds a run, but no checkpoint of it that is whole; {REMEDY}")
        run, loader = prepare(config, saved, num_samples)
        if saved and saved.step >= run.total_steps and is_finished(folder):
            print(f"this run is already finished; `--resume never` starts it anew\n{closing(folder)}")
            return DONE
        if run.cache is not None:
            check_cache(run, loader)
        sweep(run.checkpoints, saved.step if saved else 0)
        take_back(run.folder, saved.step if saved else 0)
        if saved:
            say(config, f"resume        from step {saved.step}")
        start = run_here if config.cluster.num_workers == 0 else run_on_ray
        try:
            outcome, asked_by = start(run, loader)
        except RunFailed as error:
            cause = error.__cause__
            with suppress(OSError):  # a full disk may be what it is about
                write_text(folder / "error.log", "".join(traceback.format_exception(cause)))
            reason = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[-1]}"
            print(f"error: {reason}; all of it is in {shown(folder / 'error.log')}", file=sys.stderr)
            return FAILED
        if outcome["status"] == "refused":
            raise ValueError(outcome["message"])
        if outcome["status"] == "failed":
            print(f"error: {outcome['message']}", file=sys.stderr)
            return FAILED
        if outcome["status"] == "interrupted":
            print("ended at once; the same command goes on from the newest checkpoint, if there is one yet")
            return 128 + (asked_by or signal.SIGINT)
        if outcome["status"] == "stopped":
            print(f"saved at step {outcome['step']} of {run.total_steps}; the same command goes on from there")
            return 128 + (asked_by or signal.SIGINT)
        write_summary(run, outcome, time.monotonic() - began)
        write_report(folder)
        write_model_card(folder)
        say(config, closing(folder))
        return DONE


def is_finished(folder: Path) -> bool:
    """Whether a run came to its end and what it left is there and whole."""
    try:
        written = (folder / "report.html").exists() and any(folder.glob("final/*.safetensors"))
        return written and "steps" in json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def run_here(run: Run, loader: Loader) -> tuple[dict[str, Any], int | None]:
    """Everything in this process, without Ray: `cluster.num_workers: 0`."""
    run = with_threads(run, run.config.cluster.threads_per_worker or os.cpu_count() or 1)
    return watch(
        run, lambda: train_worker(run, Worker(), lambda step: local_batches(loader, step, run.total_steps)), apart=False
    )


def run_on_ray(run: Run, loader: Loader) -> tuple[dict[str, Any], int | None]:
    """A TorchTrainer with gloo on the cluster there is, or on this machine."""
    config = run.config
    with ray_cluster(config.cluster.address, quiet=config.output.level != "debug") as cluster:
        reserved = reserve(config.cluster, config.data, cluster.cpus)
        run = with_threads(run, reserved.threads_per_worker)
        say(config, f"cluster       {describe(config, reserved, cluster)}")
        say(config, "starting      the workers, which takes Ray a while: up to a minute on two cores")
        try:
            return watch(run, lambda: fit(run, loader, reserved), apart=True)
        finally:
            shutil.rmtree(run.folder / "ray", ignore_errors=True)  # Ray's own notes; ours are all that is resumed from


def fit(run: Run, loader: Loader, reserved: Reserved) -> dict[str, Any]:
    """Runs the workers; Ray starts all of them again when one dies, and they go on from the newest checkpoint."""
    from ray.data import ExecutionOptions
    from ray.train import DataConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = run.config

    def dataset() -> Any:  # called at every start of the workers, when it is known which step comes next
        return ray_dataset(
            loader,
            newest_step(run.checkpoints),
            run.total_steps,
            cpus_per_task=reserved.cpus_per_task,
            num_tasks=reserved.num_tasks,
        )

    interface = config.cluster.network_interface
    trainer = TorchTrainer(
        ray_worker,
        train_loop_config={"run": run},
        torch_config=TorchConfig(backend="gloo", timeout_s=int(config.cluster.timeout_seconds)),
        scaling_config=ScalingConfig(
            num_workers=config.cluster.num_workers,
            resources_per_worker={"CPU": reserved.cpus_per_worker},
            placement_strategy="SPREAD",
        ),
        datasets={"train": dataset},
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
        run_config=RunConfig(
            name=f"attempt-{time.time_ns()}",  # a new one each time: Ray's own records are never resumed from
            storage_path=str(run.folder / "ray"),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            logging_config=LoggingConfig(log_level="INFO" if config.output.level == "debug" else "ERROR"),
            worker_runtime_env={"env_vars": {"GLOO_SOCKET_IFNAME": interface}} if interface else None,
        ),
    )
    outcome: dict[str, Any] = trainer.fit().return_value
    return outcome


def ray_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What Ray runs on each worker: where `train_worker` meets Ray Train."""
    import ray.train

    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size())

    def batches_from(step: int) -> Iterator[Batch]:
        return ray_batches(ray.train.get_dataset_shard("train"))  # `fit` has it begin at the same step

    return train_worker(settings["run"], worker, batches_from)


def watch(run: Run, work: Callable[[], dict[str, Any]], apart: bool) -> tuple[dict[str, Any], int | None]:
    """Runs `work` in a thread while this one shows progress and takes signals.

    Args:
        run: whose folder to watch.
        work: returns the outcome.
        apart: the work itself is done by other processes, so that it can be left before it has ended.

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
            os._exit(128 + signum)
        run.stop_file.touch()
        if progress.latest or not apart:
            print("\nstopping, with all that is done saved (once more to end at once)", flush=True)

    run.checkpoints.mkdir(exist_ok=True)
    run.stop_file.unlink(missing_ok=True)
    write_text(run.folder / "config.yaml", dump_config(run.config))
    shown_at = run.config.output.level in ("debug", "info")
    progress = ProgressLine(run.folder / "metrics.jsonl", run.total_steps, shown_at, afterwards=measuring(run))
    before = {}
    if threading.current_thread() is threading.main_thread():  # others, as in a sweep, take no signals
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
            progress.update()
            if apart and asked and (len(asked) > 1 or not progress.latest):  # asked twice, or nothing to save yet
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
