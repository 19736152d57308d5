"""What a run is, settled before any worker starts: model, data, plan and precision checked, no weights loaded."""

import math
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

import vlskv_ray
from vlskv_ray.cluster.shares import threads_of
from vlskv_ray.command import print_info
from vlskv_ray.config import Config, changed_keys
from vlskv_ray.data.chat import Limits
from vlskv_ray.data.check import check_processor
from vlskv_ray.data.collate import IGNORE_INDEX, Encoded
from vlskv_ray.data.pipeline import Loader
from vlskv_ray.data.plan import Plan, Table, Tokens, first_of_mixture
from vlskv_ray.data.questions import HeldOut
from vlskv_ray.data.sources import Source, open_sources
from vlskv_ray.data.teacher_cache import IN_MEMORY, TeacherCache
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
from vlskv_ray.report.figures import at
from vlskv_ray.storage.checkpoint import SavedState
from vlskv_ray.storage.run_folder import run_folder
from vlskv_ray.training.counting import matmul_seconds
from vlskv_ray.training.run import Run
from vlskv_ray.words import format_bytes, short_path

FEW_STEPS = 20
SAMPLES_TRIED = 32
"""From which the length of samples and the size of a teacher cache are estimated."""
FIXED = {"objective", "micro_batch_size", "gradient_accumulation_steps"} | {
    f"model.{name}" for name in ("num_key_value_layers", "key_value_group_size", "num_hidden_layers")
}
"""What a checkpoint cannot go on with another value of: it decides which weights train, and what a step is."""
REMEDY = "use --resume never to start anew, or another output.name"


def prepare(
    config: Config, saved: SavedState | None = None, num_samples: int | None = None, owner: str = ""
) -> tuple[Run, Loader]:
    """Checks model, processor and data of a run and lays out its plan; loads no weights and writes nothing.

    Args:
        config: of the run.
        saved: the checkpoint it goes on from; that fixes how many micro-batches a step has.
        num_samples: use only the first so many samples of the mixture.
        owner: whose the run folder is.

    Raises:
        ValueError: something in the config cannot work; says which key and what to do.
    """
    if saved and config.cluster.threads_per_worker is None:  # they decide the last bits: as the run began
        cluster = config.cluster.model_copy(update={"threads_per_worker": saved.state["threads"]})
        config = config.model_copy(update={"cluster": cluster})
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
    notices = check_processor(files, load_processor(files))
    positions = text_config.max_position_embeddings
    max_length = config.data.max_length or positions
    if max_length > positions:
        raise ValueError(f"data.max_length: {max_length}, but the model has positions up to {positions} only")
    data = config.data.model_copy(update={"max_length": max_length})
    config = config.model_copy(update={"model": model, "data": data})

    sources = tuple(open_sources(data.sources, cache_dir=data.cache_dir))
    tables = [Table(source.num_rows, source.weight) for source in sources]
    if num_samples is not None:
        tables = first_of_mixture(tables, num_samples)
    micro_batches_per_step = check_resumable(config, saved)
    if config.micro_batch_size * micro_batches_per_step > 2**24:
        raise ValueError(
            f"micro_batch_size: {config.micro_batch_size} x {micro_batches_per_step} micro-batches is a step of more "
            f"than {2**24} samples; lower it or gradient_accumulation_steps"
        )
    limits = Limits(max_length, data.max_images_per_sample, data.image_processing_batch_size)

    shares = micro_batches_per_step if config.cluster.bit_identical else max(1, config.cluster.most_workers)

    def loader_of(lengths: NDArray[np.uint16]) -> Loader:
        plan = Plan(
            tables,
            lengths,
            seed=config.seed,
            micro_batch_size=config.micro_batch_size,
            micro_batches_per_step=micro_batches_per_step,
            group_by_length=config.objective == "sft",  # the model that it trains is a stock one, which pads
            shares_per_step=saved.state["shares_per_step"] if saved else shares,
        )
        return Loader(sources, plan, model.name_or_path, model.revision, limits)

    unknown = np.broadcast_to(np.uint16(0), sum(table.rows for table in tables))
    tokens = Tokens(**saved.state["tokens"]) if saved else tokens_of(loader_of(unknown))
    loader = loader_of(lengths_of(sources, tables, tokens))
    plan = loader.plan
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
        shares_per_step=plan.shares_per_step,
        tokens=tokens,
        fingerprints={"model": fingerprint_of(files), "data": data_fingerprint, "versions": versions()},
        owner=owner,
    )
    if saved:
        changed = {
            what: f"the {what} changed since" + (f", {before.get(what)} to {now}" if what == "versions" else "")
            for before in [saved.state["fingerprints"]]
            for what, now in run.fingerprints.items()
            if before.get(what) != now
        }
        threads = (saved.state["threads"], config.cluster.threads_per_worker)
        if threads[0] != threads[1]:
            changed["threads"] = f"cluster.threads_per_worker was {threads[0]} and is {threads[1]}"
        if saved.state.get("use_gpu", False) != config.cluster.use_gpu:  # not there: of an earlier version, on CPUs
            before, now = ("CPUs", "GPUs") if config.cluster.use_gpu else ("GPUs", "CPUs")
            changed["device"] = f"the run was on {before} and is on {now} (cluster.use_gpu)"
        refuse_changes(config, saved, changed)
        if saved.step > total_steps:
            raise ValueError(f"{saved.path}: is beyond the {total_steps} steps that the run would have; {REMEDY}")
    run = replace(run, held_out=held_out_of(config, limits))
    print_info(config, start_block(run, plan, text_config))
    for notice in notices:
        print_info(config, f"warning: {notice}")
    if run.total_steps < FEW_STEPS and config.objective == "distill":
        print_info(
            config,
            f"warning: {run.total_steps} steps with optimizer.lr={config.optimizer.lr} may leave the student worse "
            f"than it starts; raise epochs or lower the learning rate",
        )
    if config.model.teacher_cache != "off":
        run = replace(run, cache=teacher_cache_of(run, text_config.num_key_value_layers))
        loader = replace(loader, cache=run.cache)
    trained_on = {(source.name, source.fingerprint) for source in sources}
    for source in run.held_out.sources if run.held_out else ():
        if (source.name, source.fingerprint) in trained_on:
            print_info(
                config, f"warning: {source.name} of evaluation.sources is trained on, so it measures nothing held out"
            )
    return run, loader


def tokens_of(loader: Loader) -> Tokens:
    """How many tokens the images and the text of a run's samples come to, by some of them."""
    samples = some_samples(loader)
    if not samples:
        return Tokens()
    estimates = [(source.num_images, source.text_bytes) for source in loader.sources]
    about = [(*(of[row] for of in estimates[table]), len(sample.input_ids)) for sample, (table, row) in samples]
    return Tokens.fitted(*zip(*about, strict=True))


def lengths_of(sources: Sequence[Source], tables: Sequence[Table], tokens: Tokens) -> NDArray[np.uint16]:
    """About how many tokens each sample of a plan has."""
    parts = [
        tokens.of(source.num_images[: table.rows], source.text_bytes[: table.rows])
        for source, table in zip(sources, tables, strict=True)
    ]
    return np.concatenate(parts)


def some_samples(loader: Loader) -> list[tuple[Encoded, tuple[int, int]]]:
    """Samples from all over the data that can be used, and the table and row of each."""
    rows = len(loader.plan.lengths)
    numbers = np.linspace(0, rows - 1, min(rows, SAMPLES_TRIED), dtype=np.int64).tolist()
    loader = replace(loader, cache=None)
    return [(sample, loader.plan.locate(number)) for number in numbers for sample in loader.samples([number])[0]]


def dtype_of(config: Config, saved: SavedState | None, text: Any) -> str:
    """What model.dtype=auto stands for, the same on all workers: as the checkpoint has it, else the type that GPUs are
    made for, or what is measured here."""
    if saved:
        before = at(saved.state["config"], "model", "dtype")
        return str(before) if before in ("float32", "bfloat16") else "float32"
    if config.cluster.use_gpu:
        return "bfloat16"
    threads = threads_of(config.cluster, os.cpu_count() or 1)
    seconds = matmul_seconds(512, text.hidden_size, text.intermediate_size, threads)
    chosen = min(seconds, key=lambda name: seconds[name])
    other = max(seconds.values()) / min(seconds.values())
    print_info(config, f"precision     {chosen}: {other:.1f} times as fast here as the other of float32 and bfloat16")
    return chosen


def teacher_cache_of(run: Run, num_key_value_layers: int) -> TeacherCache:
    """The teacher cache of a run with that N, named by all that the states of a sample depend on."""
    options, data = run.config.model, run.config.data
    files = find_model(options.name_or_path, options.revision)
    stats = [path.stat() for path in sorted(files.folder.glob("*.safetensors"))] if files.folder else []
    depends_on = {
        "model": run.fingerprints["model"],
        "written": [stat.st_mtime_ns for stat in stats],  # the fingerprint does not look at all of a large file
        "num_key_value_layers": num_key_value_layers,
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
    rows = len(loader.plan.lengths)
    tried = some_samples(loader)
    lengths = [len(sample.input_ids) + 2 * int((sample.labels != IGNORE_INDEX).sum()) for sample, _ in tried] or [0]
    states = float(np.mean(lengths)) * text.hidden_size * (2 if run.config.model.dtype == "bfloat16" else 4)
    there, seen = run.cache.count(), run.total_steps * run.micro_batches_per_step * run.config.micro_batch_size
    wanted = max(0, min(rows, seen) - there) * states
    print_info(
        run.config,
        f"teacher cache {there} samples are in {short_path(run.cache.folder)}; up to {format_bytes(wanted)} more "
        f"will be written",
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
    fewest, most = max(config.cluster.fewest_workers, 1), max(config.cluster.most_workers, 1)
    count: int = config.gradient_accumulation_steps * most
    if saved:
        try:
            before = Config.model_validate(saved.state["config"])
        except (ValidationError, RecursionError):
            raise ValueError(f"{saved.path}: cannot go on from here: written by another version; {REMEDY}") from None
        changed = changed_keys(before, config)
        if before.cluster.num_workers != config.cluster.num_workers:  # then another accumulation makes up for it
            changed.pop("gradient_accumulation_steps", None)
        refuse_changes(config, saved, {key: f"{key} was {was} and is {now}" for key, (was, now) in changed.items()})
        count = saved.state["micro_batches_per_step"]
    uneven = next((workers for workers in range(fewest, most + 1) if count % workers), None)
    if uneven:
        of_a_step = f"{uneven} workers cannot share the {count} micro-batches of a step equally"
        if saved:
            fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            remedy = f"which were fixed when this run started; wanted one of {fitting}"
        else:
            all_of_them = math.lcm(*range(fewest, min(most, 64) + 1))
            remedy = f"gradient_accumulation_steps={all_of_them // math.gcd(all_of_them, most)} would let all of them"
        raise ValueError(f"cluster.num_workers: {of_a_step}, {remedy}")
    return count


def refuse_changes(config: Config, saved: SavedState, changed: dict[str, str]) -> None:
    """ValueError for what is not as it was at this checkpoint and not in `checkpoint.allow_changed`, by its name."""
    allowed = set(config.checkpoint.allow_changed) - FIXED
    refused = {name: text for name, text in changed.items() if name not in allowed}
    if refused:
        possible = [] if refused.keys() & FIXED else list(refused)
        raise ValueError(
            f"{saved.path}: cannot go on from here: {', '.join(refused.values())}; {REMEDY}"
            + (f", or allow it with checkpoint.allow_changed=[{','.join(possible)}]" if possible else "")
        )


def versions() -> str:
    """Of all that decides the bits of a result."""
    names = ("torch", "transformers", "pillow")
    return " ".join([f"vlskv_ray {vlskv_ray.__version__}", *(f"{name} {version(name)}" for name in names)])


def start_block(run: Run, plan: Plan, text: Any) -> str:
    """What is about to happen, for the reader of a log."""
    config, workers = run.config, max(run.config.cluster.most_workers, 1)
    versions = "  ".join(f"{name} {version(name)}" for name in ("ray", "torch", "transformers"))
    accumulation = run.micro_batches_per_step // workers
    model = config.model
    revision = f" at {model.revision}" if model.revision else ""
    rows = " + ".join(str(table.rows) for table in plan.tables)
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
        f"run           {run.total_steps} steps, {run.steps_per_epoch} an epoch, into {short_path(run.folder)}"
    )
