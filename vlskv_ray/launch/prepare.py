"""What a run is, settled before any worker starts: model, data, plan and precision checked, no weights loaded."""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

import vlskv_ray
from vlskv_ray.cluster.shares import threads_of
from vlskv_ray.command import print_info
from vlskv_ray.config import Config, changed
from vlskv_ray.data.chat import Limits
from vlskv_ray.data.check import check_processor
from vlskv_ray.data.pipeline import Loader
from vlskv_ray.data.plan import Plan, Table, Tokens, first_of_mixture
from vlskv_ray.data.questions import HeldOut
from vlskv_ray.data.sources import open_sources
from vlskv_ray.launch.cache_room import kept_fit, teacher_cache_of
from vlskv_ray.launch.resume import check_resumable, check_unchanged
from vlskv_ray.launch.start_block import start_block
from vlskv_ray.launch.token_estimate import lengths_of, tokens_of
from vlskv_ray.model.build import ModelFiles, find_model, load_config, parameter_counts
from vlskv_ray.model.fingerprint import fingerprint_of
from vlskv_ray.model.parts import PLAIN_PARTS
from vlskv_ray.model.processor import load_processor
from vlskv_ray.model.swiftkv import has_swiftkv
from vlskv_ray.report.run_files import at
from vlskv_ray.storage.checkpoint import SavedState
from vlskv_ray.storage.run_folder import run_folder
from vlskv_ray.training.objective import objective_of
from vlskv_ray.training.profiling import matmul_seconds
from vlskv_ray.training.run import FitPlan, Run

LARGEST_STEP = 2**24
"""Samples."""
FIT_TOKENS = 64
"""For each number of a hidden state, that a student is fitted to."""
LEAST_FIT_TOKENS = 100_000
"""That a student is fitted to where the model is small: of fewer, too few are left to choose by."""
FEW_STEPS = 20
"""With which a student may end worse than it begins."""
LEAST_WIDTH_OF_BFLOAT16 = 512
"""Hidden size from which model.dtype=auto may be bfloat16. Below it a run takes minutes in any case, and has the same
numbers on every machine."""
LEAST_GAIN_OF_BFLOAT16 = 1.5
"""How many times as fast its matrix products must be: the rest of a step gains nothing by it. CPUs with units for it
make two to four times as many, others fewer than of float32, so that chance decides nothing."""


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
        config = changed(config, {"cluster.threads_per_worker": saved.state["threads"]})
    files = find_model(config.model.name_or_path, config.model.revision)
    config, model_config = resolve_model(config, files, saved)
    text_config = model_config.text_config
    # before any data are opened: with a template that cannot be used no row could be either
    notices = check_processor(files, load_processor(files))
    config = changed(config, {"data.max_length": max_length_of(config, text_config)})
    loader, tokens = lay_out(config, saved, num_samples)
    plan = loader.plan
    most_steps = sys.maxsize if config.max_steps is None else config.max_steps
    total_steps = min(config.epochs * plan.steps_per_epoch, most_steps)
    data_fingerprint = "-".join([plan.fingerprint(), *(source.fingerprint for source in loader.sources)])
    every_steps = config.checkpoint.every_steps or max(1, math.ceil(total_steps / 10))
    run = Run(
        config=changed(config, {"checkpoint.every_steps": every_steps}),
        folder=run_folder(config),
        micro_batches_per_step=plan.micro_batches_per_step,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=total_steps,
        shares_per_step=plan.shares_per_step,
        tokens=tokens,
        fingerprints={"model": fingerprint_of(files), "data": data_fingerprint, "versions": versions()},
        owner=owner,
        parameters=parameter_counts(files, model_config),
    )
    if saved:
        check_unchanged(run, saved)
    run = replace(run, held_out=held_out_of(config, loader.limits))
    if config.model.start == "fit":
        run = replace(run, fit=fit_plan_of(run, loader, text_config))
    print_info(config, start_block(run, plan, text_config))
    for notice in [*notices, *warnings_of(run, loader)]:
        print_info(config, f"warning: {notice}")
    if config.model.teacher_cache != "off":
        run = replace(run, cache=teacher_cache_of(run, text_config.num_key_value_layers))
        loader = replace(loader, cache=run.cache)
    return run, loader


def resolve_model(config: Config, files: ModelFiles, saved: SavedState | None) -> tuple[Config, Any]:
    """The config with everything about the model that it leaves open settled, and that of the model that trains."""
    before = load_config(files)
    model_config = objective_of(config).configure(before, files, config)
    text_config = model_config.text_config
    settled = {"model.revision": files.revision}
    if objective_of(config).has_student:
        names = ("num_key_value_layers", "key_value_group_size")
        settled |= {f"model.{name}": getattr(text_config, name) for name in names}
        settled["model.start"] = start_of(config, saved, is_student=has_swiftkv(before))
    if config.model.dtype == "auto":
        settled["model.dtype"] = dtype_of(config, saved, text_config)
    return changed(config, settled), model_config


def start_of(config: Config, saved: SavedState | None, *, is_student: bool) -> str | None:
    """What model.start=null stands for; as the checkpoint has it, whose run copied if it does not say.

    Raises:
        ValueError: a student that is trained already is to begin anew.
    """
    if not is_student:
        return config.model.start or (at(saved.state["config"], "model", "start") or "copy" if saved else "fit")
    if config.model.start:
        raise ValueError(
            f"model.start: {config.model.start}, but {config.model.name_or_path} is a student already, and goes on "
            f"from its own weights; remove it, or give the teacher"
        )
    return None


def settle_dtype(config: Config) -> Config:
    """The config with model.dtype=auto settled on this machine, for runs that are to have the same on many."""
    files = find_model(config.model.name_or_path, config.model.revision)
    return changed(config, {"model.dtype": resolve_model(config, files, None)[0].model.dtype})


def fit_plan_of(run: Run, loader: Loader, text_config: Any) -> FitPlan:
    """The samples that a student is fitted to: the first of an epoch that is dealt into single micro-batches."""
    config, plan = run.config, loader.plan
    wanted, tokens, samples = (
        config.model.fit_tokens or max(FIT_TOKENS * text_config.hidden_size, LEAST_FIT_TOKENS),
        0,
        [],
    )
    for numbers in dealt_one_by_one(config, plan):
        if tokens >= wanted:
            break
        samples.append(numbers)
        tokens += int(plan.lengths[list(numbers)].sum(dtype=np.int64))
    return FitPlan(tuple(samples), kept_fit(run, loader, text_config, samples), tokens)


def dealt_one_by_one(config: Config, plan: Plan) -> Iterator[tuple[int, ...]]:
    """The numbers of the samples of each micro-batch of an epoch, dealt as if each were a step: so they are the same
    however many a step has."""
    dealt = Plan(
        plan.tables,
        plan.lengths,
        seed=config.seed,
        micro_batch_size=config.micro_batch_size,
        micro_batches_per_step=1,
    )
    return (tuple(row["samples"]) for row in dealt.rows(0, dealt.steps_per_epoch))


def max_length_of(config: Config, text_config: Any) -> int:
    """Tokens of a sample. ValueError where the model has not so many positions."""
    positions: int = text_config.max_position_embeddings
    max_length = config.data.max_length or positions
    if max_length > positions:
        raise ValueError(f"data.max_length: {max_length}, but the model has positions up to {positions} only")
    return max_length


def lay_out(config: Config, saved: SavedState | None, num_samples: int | None) -> tuple[Loader, Tokens]:
    """Opens the data and plans which samples make up which step, by about how many tokens each has."""
    data, model = config.data, config.model
    sources = tuple(open_sources(data.sources, cache_dir=data.cache_dir))
    tables = [Table(source.num_rows, source.weight) for source in sources]
    if num_samples is not None:
        tables = first_of_mixture(tables, num_samples)
    micro_batches_per_step = check_resumable(config, saved)
    if config.micro_batch_size * micro_batches_per_step > LARGEST_STEP:
        raise ValueError(
            f"micro_batch_size: {config.micro_batch_size} x {micro_batches_per_step} micro-batches is a step of more "
            f"than {LARGEST_STEP} samples; lower it or gradient_accumulation_steps"
        )
    limits = Limits(data.max_length or 0, data.max_images_per_sample, data.image_processing_batch_size)
    shares = micro_batches_per_step if config.cluster.bit_identical else max(1, config.cluster.most_workers)

    def loader_of(lengths: NDArray[np.uint16]) -> Loader:
        plan = Plan(
            tables,
            lengths,
            seed=config.seed,
            micro_batch_size=config.micro_batch_size,
            micro_batches_per_step=micro_batches_per_step,
            group_by_length=not objective_of(config).has_student,  # a stock model trains, which pads
            shares_per_step=saved.state["shares_per_step"] if saved else shares,
        )
        return Loader(sources, plan, model.name_or_path, model.revision, limits)

    # a first plan, for which lengths do not matter, finds the samples by which the lengths of all are estimated
    unknown = np.broadcast_to(np.uint16(0), sum(table.rows for table in tables))
    tokens = Tokens(**saved.state["tokens"]) if saved else tokens_of(loader_of(unknown))
    return loader_of(lengths_of(sources, tables, tokens)), tokens


def warnings_of(run: Run, loader: Loader) -> Iterator[str]:
    """What a reader should know before so many steps are made with these data."""
    config = run.config
    if 0 < run.total_steps < FEW_STEPS and objective_of(config).has_student:
        yield (
            f"{run.total_steps} steps with optimizer.lr={config.optimizer.lr} may leave the student worse than it "
            f"starts; raise epochs or lower the learning rate"
        )
    if not {"text", "swiftkv"} & {*config.trained_parts} and not any(
        source.num_images.any() for source in loader.sources
    ):
        yield (
            f"no row of data.sources seems to have an image, which {' and '.join(config.trained_parts)} would learn "
            f"from; where none has, the run ends with an error"
        )
    trained_on = {(source.name, source.fingerprint) for source in loader.sources}
    for source in run.held_out.sources if run.held_out else ():
        if (source.name, source.fingerprint) in trained_on:
            yield f"{source.name} of evaluation.sources is trained on, so it measures nothing held out"


def dtype_of(config: Config, saved: SavedState | None, text: Any) -> str:
    """What model.dtype=auto stands for, the same on all workers: as the checkpoint has it, else bfloat16 where weights
    are frozen and enough of them for it to pay, on GPUs or where products of it are faster as measured here.

    Args:
        config: of the run.
        saved: the checkpoint that it goes on from.
        text: config of the text model that trains.
    """
    if saved:
        before = at(saved.state["config"], "model", "dtype")
        return str(before) if before in ("float32", "bfloat16") else "float32"
    if config.trained_parts == PLAIN_PARTS or text.hidden_size < LEAST_WIDTH_OF_BFLOAT16:
        return "float32"
    if config.cluster.use_gpu:
        return "bfloat16"
    threads = threads_of(config.cluster, os.cpu_count() or 1)
    seconds = matmul_seconds(512, text.hidden_size, text.intermediate_size, threads)
    times = seconds["float32"] / seconds["bfloat16"]
    if times < LEAST_GAIN_OF_BFLOAT16:
        return "float32"
    print_info(config, f"precision     bfloat16 of frozen weights, its products {times:.1f} times as fast here")
    return "bfloat16"


def held_out_of(config: Config, limits: Limits) -> HeldOut | None:
    """What answers are to be measured on, if anything."""
    options = config.evaluation
    if not options.sources:
        return None
    sources = tuple(open_sources(options.sources, cache_dir=config.data.cache_dir))
    return HeldOut(sources, options.num_samples, limits, options.batch_size, options.max_new_tokens)


def versions() -> str:
    """Of all that decides the bits of a result."""
    names = ("torch", "transformers", "pillow")
    return " ".join([f"vlskv_ray {vlskv_ray.__version__}", *(f"{name} {version(name)}" for name in names)])
