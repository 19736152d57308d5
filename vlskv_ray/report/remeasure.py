"""A student measured once more, on what samples, and where the figures go."""

import argparse
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlskv_ray.command import name_option, sources_of_data
from vlskv_ray.config import SourceConfig, load_config
from vlskv_ray.data.chat import Limits
from vlskv_ray.data.questions import HeldOut
from vlskv_ray.data.sample import refused_message
from vlskv_ray.data.sources import open_sources
from vlskv_ray.errors import StoppedRun
from vlskv_ray.evaluation.evaluator import Evaluator, evaluation_of, sides_with
from vlskv_ray.evaluation.loading import device_asked_for, load
from vlskv_ray.evaluation.savings import layers_of, measure_savings
from vlskv_ray.model.swiftkv import swiftkv_backbone
from vlskv_ray.report.model_card import card
from vlskv_ray.report.run_files import as_written, read_run
from vlskv_ray.training.objective import SIDES, made_by
from vlskv_ray.training.run import START
from vlskv_ray.training.start import is_whole, read_weights


def num_samples_in(file: Path) -> int:
    """How many samples the figures in a file are of; 0 where there are none."""
    try:
        return int(json.loads(file.read_text())["samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What evaluation.json holds. StoppedRun where a row is refused."""
    device = device_asked_for(options.device)
    specs = sources_of(options)
    with name_option("--data", "data.sources"):
        sources = tuple(open_sources(specs))
    model, processor = load(options.model, for_samples=True)
    model.to(device)
    teacher = None
    if options.teacher:
        teacher = load(options.teacher, teacher=True, beside=(model.config, processor))[0].to(device)
    limits = Limits(
        swiftkv_backbone(model).config.max_position_embeddings, max_images_per_sample=2**30, is_of_model=True
    )
    held_out = HeldOut(sources, options.num_samples, limits, options.batch_size, options.max_new_tokens)
    run = None if options.teacher else run_of(options.model)
    made = made_by(load_config(run / "config.yaml")) if run else None
    fitted = run is not None and made in ("distilled", "fine-tuned") and is_whole(run / START)
    sides = sides_with(SIDES, fitted=fitted)
    evaluator = Evaluator(
        model,
        processor,
        held_out,
        teacher=teacher,
        fitted=functools.partial(read_weights, run / START) if run and fitted else dict,
    )
    names = ", ".join(source.name for source in sources)
    sample = evaluator.typical_sample()
    stop_if_refused(evaluator, options.on_refused)
    if sample is None:
        left_out = ", ".join(f"{count} x {reason}" for reason, count in evaluator.left_out.most_common(5)) or "none"
        assert evaluator.example is not None  # a source without rows is an error before
        for_one = f"{evaluator.example['id']}: {evaluator.example['detail']}"
        raise ValueError(
            f"--data: none of the samples of {names} can be used (left out: {left_out}). For one, {for_one}"
        )

    def tell(done: int, of: int) -> None:
        stop_if_refused(evaluator, options.on_refused)
        print(f"answered {done} of {of}", flush=True)

    results = evaluator.results(*sides, on_progress=tell)
    evaluation = evaluation_of([(results, evaluator.left_out)], sides, held_out)
    print("measuring what the student saves", flush=True)
    evaluation |= {"student_is": made} if made else {}
    evaluation["model"] = layers_of(model)
    evaluation["savings"] = measure_savings(model, sample)
    return evaluation


def stop_if_refused(evaluator: Evaluator, on_refused: str) -> None:
    """StoppedRun where a row asked for what data may not open."""
    if message := refused_message(evaluator.refused, on_refused, "--on-refused skip"):
        raise StoppedRun(message)


def sources_of(options: argparse.Namespace) -> Sequence[SourceConfig]:
    """What to measure on: as asked, else as the run says, else the built-in world."""
    run = run_of(options.model)
    if options.data is None and options.split is None and run is not None:
        sources = load_config(run / "config.yaml").evaluation.sources
        if sources:
            return sources
    return sources_of_data(options.data or ["shapes"], options, split="test")


def run_of(name_or_path: str) -> Path | None:
    """The run folder that a model lies in, if it does."""
    folder = Path(name_or_path).resolve().parent
    return folder if (folder / "config.yaml").is_file() and (folder / "summary.json").is_file() else None


def output_of(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """The file for the figures, and the run whose report and card they belong to. ValueError if there can be no such
    file."""
    run = run_of(options.model)
    if options.output is not None or options.teacher or run is None or Path(options.model).resolve() != run / "final":
        target, run = Path("evaluation.json" if options.output is None else options.output), None
    else:
        target = run / "evaluation.json"
        with as_written(run):
            card(read_run(run))  # it and the report are made of all of the run's files
    folder = target.absolute().parent
    if target.exists() and not target.is_file():
        raise ValueError(f"--output: {target} is no regular file; wanted a file")
    if target.exists() and not run and '"savings"' not in target.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(
            f"--output: {target} holds something else than figures, which would be lost; name another file"
        )
    for written in [folder, *([run / "final"] if run else [])]:
        if not written.is_dir() or not os.access(written, os.W_OK):
            problem = "nothing may be written into" if written.is_dir() else "there is no folder"
            raise ValueError(f"--output: {problem} {written}; wanted a file in a folder that can be written to")
    if options.output is None and run is None and (folder / "summary.json").exists():
        raise ValueError(f"--output: {target} here is another run's; say which file is to be written")
    return target, run
