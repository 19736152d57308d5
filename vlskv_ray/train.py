"""The command `python -m vlskv_ray.train`: config -> checks -> Ray -> TorchTrainer -> summary."""

import argparse
import fcntl
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import vlskv_ray
from vlskv_ray.checkpoint import SavedState, newest_checkpoint, newest_step, write_json, write_text
from vlskv_ray.cluster import ProgressLine, Reserved, describe, duration, reserve, start_ray
from vlskv_ray.config import Config, changed_keys, dump_config, load_config_and_notices
from vlskv_ray.data.chat import Limits, check_template
from vlskv_ray.data.collate import Batch
from vlskv_ray.data.pipeline import Loader, local_batches, ray_batches, ray_dataset
from vlskv_ray.data.plan import Plan, Table, first_of_mixture
from vlskv_ray.data.sources import open_sources
from vlskv_ray.model.build import (
    build_student,
    find_checkpoint,
    load_config,
    load_processor,
    swiftkv_config,
    trainable_parameters,
)
from vlskv_ray.train_loop import GradientBuffer, Run, Worker, build_optimizer, objective_of, train_step, train_worker

DONE, FAILED, WRONG_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options, overrides = parse(arguments)
    try:
        config, notices = load_config_and_notices(options.config, overrides)
        if options.print_config:
            print(dump_config(config), end="")
            return DONE
        for notice in notices:
            print(notice)
        if options.dry_run:
            return dry_run(*prepare(config, options.num_samples))
        return train(config, num_samples=options.num_samples, resume=options.resume)
    except ValueError as error:  # every one of ours names the key or file, what was wanted and the remedy
        print(error, file=sys.stderr)
        return WRONG_INPUT


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m vlskv_ray.train",
        description="Distils a LLaVA-style vision-language model into its SwiftKV form.",
        epilog="Any option of the config can be given as section.key=value, for instance cluster.num_workers=4.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run, as YAML")
    parser.add_argument("--dry-run", action="store_true", help="check everything up to one step of one micro-batch")
    parser.add_argument("--num-samples", type=positive, metavar="N", help="use the first N samples of the mixture")
    parser.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="auto: go on from the newest checkpoint if there is one; never: start anew, an older run of this name is "
        "moved aside; must: fail where there is nothing to go on from",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and end")
    options, overrides = parser.parse_known_args(arguments)
    return options, overrides


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


# ------------------------------------------------------------------------------------------------- before the workers
def prepare(config: Config, num_samples: int | None = None) -> tuple[Run, Loader]:
    """Checks model, processor and data of a run and lays out its plan; loads no weights and writes nothing.

    Raises:
        ValueError: something in the config cannot work; says which key and what to do.
    """
    checkpoint = find_checkpoint(config.model.name_or_path, config.model.revision)
    if checkpoint.revision:
        config = config.model_copy(update={"model": config.model.model_copy(update={"revision": checkpoint.revision})})
    student = swiftkv_config(
        load_config(checkpoint), config.model.num_key_value_layers, config.model.key_value_group_size
    )
    processor = load_processor(checkpoint)
    check_template(processor)
    limit = student.text_config.max_position_embeddings
    if config.data.max_length > limit:
        raise ValueError(f"data.max_length: {config.data.max_length}, but the model has positions up to {limit} only")

    sources = tuple(open_sources(config.data.sources, cache_dir=config.data.cache_dir))
    tables = [Table(source.num_images, source.text_bytes, source.weight) for source in sources]
    if num_samples is not None:
        tables = first_of_mixture(tables, num_samples)
    micro_batches_per_step = config.gradient_accumulation_steps * max(config.cluster.num_workers, 1)
    plan = Plan(
        tables,
        seed=config.seed,
        micro_batch_size=config.micro_batch_size,
        micro_batches_per_step=micro_batches_per_step,
        group_by_length=config.data.group_by_length,
    )
    total_steps = min(config.epochs * plan.steps_per_epoch, config.max_steps or sys.maxsize)
    limits = Limits(config.data.max_length, config.data.max_images_per_sample, config.data.image_processing_batch_size)
    run = Run(
        config=config,
        folder=Path(config.output.dir) / str(config.output.name),
        checkpoint=checkpoint,
        micro_batches_per_step=micro_batches_per_step,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=total_steps,
        plan_fingerprint=plan.fingerprint(),
    )
    print(start_block(run, plan, student.text_config))
    return run, Loader(sources, plan, checkpoint, limits)


def start_block(run: Run, plan: Plan, text_config: Any) -> str:
    """What is about to happen, for the reader of a log."""
    config = run.config
    versions = " ".join(f"{name} {version(name)}" for name in ("ray", "torch", "transformers"))
    workers = max(config.cluster.num_workers, 1)
    global_batch = config.micro_batch_size * config.gradient_accumulation_steps * workers
    layers, kept = text_config.num_hidden_layers, text_config.num_key_value_layers
    revision = f" at {run.checkpoint.revision}" if run.checkpoint.revision else ""
    sources = ", ".join(f"{len(table)}" for table in plan.tables)
    return "\n".join(
        [
            f"vlskv_ray {vlskv_ray.__version__}  {versions}  python {platform.python_version()}",
            f"model         {run.checkpoint.name_or_path}{revision}: {layers} text layers, SwiftKV from layer {kept}, "
            f"groups of {text_config.key_value_group_size}, frozen weights {config.model.dtype}",
            f"data          {plan.samples_per_epoch} samples an epoch of sources with {sources} rows",
            f"global batch  {global_batch} = {config.micro_batch_size} samples x "
            f"{config.gradient_accumulation_steps} accumulation x {workers} workers",
            f"run           {run.total_steps} steps, {config.epochs} epochs of {run.steps_per_epoch}, "
            f"into {os.path.relpath(run.folder)}",
        ]
    )


def check_resumable(run: Run, saved: SavedState) -> Run:
    """A run that goes on from a checkpoint keeps its global batch, however many workers there are now.

    Raises:
        ValueError: it would not be the same run.
    """
    before = Config.model_validate(saved.state["config"], strict=False)
    changed = [key for key in changed_keys(before, run.config) if key != "gradient_accumulation_steps"]
    remedy = "use --resume never to start anew, or another output.name"
    if changed:
        raise ValueError(
            f"{run.folder}: cannot go on from step {saved.step}: {', '.join(changed)} changed since; {remedy}"
        )
    if saved.state["plan"] != run.plan_fingerprint:
        raise ValueError(f"{run.folder}: cannot go on from step {saved.step}: the data changed since; {remedy}")
    return run


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Makes the run folder this process's own while it lives, so that two commands never write one run."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process is running this run; wait, or use another output.name"
            ) from None
        yield


# ------------------------------------------------------------------------------------------------------------- the run
def train(config: Config, *, num_samples: int | None = None, resume: str = "auto") -> int:
    """A whole run, from config to `final/` and summary.json; the exit status. ValueError for what the user can mend."""
    began = time.time()
    run, loader = prepare(config, num_samples)
    if resume == "never":
        move_aside(run.folder)
    with owned(run.folder):
        saved = newest_checkpoint(run.checkpoints, warn=lambda message: print(f"warning: {message}"))
        if saved is None and resume == "must":
            raise ValueError(f"{run.folder}: there is no checkpoint to go on from, and --resume must was given")
        if saved is not None:
            run = check_resumable(run, saved)
            if saved.step == run.total_steps and (run.folder / "summary.json").exists():
                print(f"{run.folder}: this run is already finished; --resume never starts it anew\n")
                print(result_table(run.folder))
                return DONE
            print(f"resuming from step {saved.step}")
        run.stop_file.unlink(missing_ok=True)
        outcome, asked_by = (run_local if config.cluster.num_workers == 0 else run_on_ray)(run, loader)
        if outcome["status"] == "failed":
            print(f"error: {outcome['message']}", file=sys.stderr)
            return FAILED
        if outcome["status"] == "stopped":
            print(
                f"stopped and saved at step {outcome['step']} of {run.total_steps}; the same command goes on from there"
            )
            return TERMINATED if asked_by == signal.SIGTERM else INTERRUPTED
        write_summary(run, outcome, time.time() - began)
        print(result_table(run.folder))
        return DONE


def run_local(run: Run, loader: Loader) -> tuple[dict[str, Any], int | None]:
    """Everything in this process, without Ray: `cluster.num_workers: 0`."""
    threads = run.config.cluster.threads_per_worker or os.cpu_count() or 1
    run = with_threads(run, threads)
    start_folder(run)
    outcome: dict[str, Any] = {}

    def work() -> None:
        outcome.update(train_worker(run, Worker(), lambda step: local_batches(loader, step, run.total_steps)))

    return watch(run, work, outcome)


def run_on_ray(run: Run, loader: Loader) -> tuple[dict[str, Any], int | None]:
    """A TorchTrainer with gloo on the cluster there is, or on this machine."""
    config = run.config
    cpus, joined = start_ray(config.cluster.address)
    reserved = reserve(config.cluster, config.data, cpus)
    run = with_threads(run, reserved.threads_per_worker)
    start_folder(run)
    print(describe(config, reserved, cpus, joined), flush=True)
    outcome: dict[str, Any] = {}

    def work() -> None:
        outcome.update(fit(run, loader, reserved))

    import ray

    try:
        return watch(run, work, outcome)
    finally:
        ray.shutdown()
        shutil.rmtree(
            run.folder / "ray", ignore_errors=True
        )  # Ray's notes on this attempt; ours are all we resume from


def fit(run: Run, loader: Loader, reserved: Reserved) -> dict[str, Any]:
    """Runs the workers; Ray starts all of them again when one dies, and they go on from the newest checkpoint."""
    from ray.data import ExecutionOptions
    from ray.train import DataConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = run.config

    def dataset() -> Any:  # called at every start of the workers, where the step to begin with is known
        return ray_dataset(
            loader,
            newest_step(run.checkpoints),
            run.total_steps,
            cpus_per_task=reserved.cpus_per_task,
            num_tasks=config.data.num_proc,
        )

    interface = config.cluster.network_interface
    trainer = TorchTrainer(
        ray_worker,
        train_loop_config={"run": run},
        torch_config=TorchConfig(backend="gloo", timeout_s=config.cluster.timeout_seconds),
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
            logging_config=LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": {"GLOO_SOCKET_IFNAME": interface}} if interface else None,
        ),
    )
    result: dict[str, Any] = trainer.fit().return_value
    return result


def ray_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What Ray runs on each worker: where `train_worker` meets Ray Train."""
    import ray.train

    context = ray.train.get_context()
    run: Run = settings["run"]

    def batches_from(step: int) -> Iterator[Batch]:
        return ray_batches(ray.train.get_dataset_shard("train"))

    return train_worker(run, Worker(context.get_world_rank(), context.get_world_size()), batches_from)


def watch(run: Run, work: Any, outcome: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Runs `work` in a thread while this one shows progress and takes signals; what ended it, and who asked."""
    failure: list[BaseException] = []
    asked: list[int] = []

    def target() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that can report it
            failure.append(error)

    def stop(signum: int, frame: Any) -> None:
        if asked:
            os._exit(128 + signum)  # a second time means at once
        asked.append(signum)
        run.stop_file.touch()
        print("\nstopping: saving at the end of this step (once more to end at once)", flush=True)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    progress = ProgressLine(run.folder / "metrics.jsonl", run.total_steps)
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
            progress.update()
    finally:
        progress.close()
        run.stop_file.unlink(missing_ok=True)
        for number, handler in before.items():
            signal.signal(number, handler)
    if failure:
        raise failure[0]
    return outcome, asked[0] if asked else None


def with_threads(run: Run, threads: int) -> Run:
    """The run with its thread count spelled out: it decides the last bits of every number."""
    cluster = run.config.cluster.model_copy(update={"threads_per_worker": threads})
    return replace(run, config=run.config.model_copy(update={"cluster": cluster}))


def start_folder(run: Run) -> None:
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    write_text(run.folder / "config.yaml", dump_config(run.config))


def move_aside(folder: Path) -> None:
    """Nothing is deleted: an older run of this name keeps its files under another."""
    if folder.exists():
        older = folder.with_name(f"{folder.name}-until-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(older)
        print(f"moved the older run to {older}")


# --------------------------------------------------------------------------------------------------------- the summary
def write_summary(run: Run, outcome: dict[str, Any], seconds: float) -> None:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]

    def mean(key: str, part: slice) -> float | None:
        values = [line[key] for line in lines if key in line][part]
        return sum(values) / len(values) if values else None

    names = ("loss", "kl_vision", "kl_text", "top1_agreement")
    write_json(
        run.folder / "summary.json",
        {
            "steps": outcome["step"],
            "seconds": round(seconds, 1),
            "first": {name: mean(name, slice(None, 5)) for name in names},
            "last": {name: mean(name, slice(-5, None)) for name in names},
            "rejected": outcome["rejected"],
            "model": run.checkpoint.name_or_path,
            "revision": run.checkpoint.revision,
            "versions": {n: version(n) for n in ("vlskv_ray", "ray", "torch", "transformers", "datasets", "pillow")},
        },
    )


def result_table(folder: Path) -> str:
    """The end of a run for the eye: where the loss began, where it ended, where things are."""
    summary = json.loads((folder / "summary.json").read_text())
    labels = {
        "loss": "loss",
        "kl_vision": "KL per token, samples with images",
        "kl_text": "KL per token, text only",
        "top1_agreement": "top-1 agreement with the teacher",
    }
    lines = [f"{'mean of five steps':36}{'first':>12}{'last':>12}"]
    for name, label in labels.items():
        first, last = summary["first"][name], summary["last"][name]
        if first is not None:
            lines.append(f"{label:36}{first:12.4g}{last:12.4g}")
    rejected = sum(summary["rejected"].values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(summary["rejected"].items()))
    lines.append(
        f"{summary['steps']} steps in {duration(summary['seconds'])}; {rejected} rows left out {reasons}".rstrip()
    )
    lines.append(f"student: {os.path.relpath(folder / 'final')}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- the dry run
def dry_run(run: Run, loader: Loader) -> int:
    """One step on one micro-batch in this process, and what it says of memory and time; writes nothing."""
    config = run.config
    threads = config.cluster.threads_per_worker or max(1, (os.cpu_count() or 1) // max(config.cluster.num_workers, 1))
    torch.set_num_threads(threads)
    began = time.perf_counter()
    batch = next((b for b in local_batches(loader, 0, run.total_steps) if b.sample_ids), None)
    if batch is None:
        raise ValueError("data.sources: not one row of them can be used; see data.max_length and the rows' reasons")
    data_seconds = time.perf_counter() - began
    for row in batch.rejected:
        print(f"left out {row['id']}: {row['reason']}: {row['detail']}")
    model = build_student(
        run.checkpoint,
        config.model.num_key_value_layers,
        config.model.key_value_group_size,
        attn_implementation=config.model.attn_implementation,
        dtype=getattr(torch, config.model.dtype),
    )
    trained = trainable_parameters(model)
    optimizer, gradients = build_optimizer(config, trained), GradientBuffer(trained.values())
    seconds = []
    for _ in range(2):  # the first one also warms up
        began = time.perf_counter()
        result = train_step(model, optimizer, gradients, [batch], objective_of(config))
        seconds.append(time.perf_counter() - began)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = sum(p.numel() * 4 * 3 for p in trained.values())  # gradient and two moments, float32
    per_step = seconds[-1] * run.micro_batches_per_step / max(config.cluster.num_workers, 1)
    peak = peak_memory_bytes()
    print(
        f"micro-batch   {len(batch.sample_ids)} samples, {batch.input_ids.shape[1]} tokens long, "
        f"{int(result.sums.supervised_tokens)} supervised: {', '.join(batch.sample_ids)}\n"
        f"loss          {result.sums.loss / max(result.sums.supervised_tokens, 1):.4g}, "
        f"gradient norm {result.grad_norm:.4g}\n"
        f"parameters    {sum(p.numel() for p in model.parameters()):,}, "
        f"{sum(p.numel() for p in trained.values()):,} trained\n"
        f"memory        {weights / 2**30:.2f} GiB weights + {state / 2**30:.2f} GiB gradients and moments a worker; "
        f"this process peaked at {peak / 2**30:.2f} GiB\n"
        f"time          {data_seconds:.2f} s to prepare the micro-batch, {seconds[-1]:.2f} s to train on it with "
        f"{threads} threads: about {duration(per_step * run.total_steps)} for {run.total_steps} steps like it\n"
        f"dry run: all is well; nothing was written"
    )
    return DONE


def peak_memory_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
