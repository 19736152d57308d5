"""The command `python -m vlskv_ray.evaluate`: a student against its teacher, on held-out samples."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from vlskv_ray.command import DONE, exit_status, shown, told_of, up_to
from vlskv_ray.config import SourceConfig, load_config, source_from_text
from vlskv_ray.data.chat import Limits
from vlskv_ray.data.check import check_processor
from vlskv_ray.data.questions import HeldOut
from vlskv_ray.data.sample import refused_message
from vlskv_ray.data.sources import open_sources
from vlskv_ray.evaluation.evaluator import SIDES, Evaluator, evaluation_of
from vlskv_ray.evaluation.savings import layers_of, measure_savings
from vlskv_ray.generate import add_where_to_compute, check_generation, device_asked_for
from vlskv_ray.model.build import build_student, build_whole, find_model, load_processor
from vlskv_ray.model.build import load_config as load_model_config
from vlskv_ray.model.swiftkv import has_swiftkv, swiftkv_backbone
from vlskv_ray.report.figures import as_written, read_run
from vlskv_ray.report.finished import write_pages
from vlskv_ray.report.model_card import card
from vlskv_ray.report.summary import evaluation_table
from vlskv_ray.storage.checkpoint import write_json
from vlskv_ray.training.run import StoppedRun


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    return exit_status(lambda: evaluate(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m vlskv_ray.evaluate",
        description="Measures what a SwiftKV student kept of its teacher on held-out samples, and what it saves.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="a student: a folder such as RUN/final, or a hub id")
    parser.add_argument("--teacher", metavar="MODEL", help="another teacher than the student with SwiftKV off")
    parser.add_argument(
        "--data",
        action="append",
        metavar="SOURCE",
        help="a file, a pattern, a hub data set or `shapes`; may be repeated (default: the run's evaluation.sources, "
        "else shapes)",
    )
    parser.add_argument("--split", help="of a named data set (default test)")
    parser.add_argument("--image-root", metavar="DIR", help="what image paths in files are relative to")
    parser.add_argument(
        "--on-refused",
        choices=("stop", "skip"),
        default="stop",
        help="what to do with a row that asks for a file outside the folder of images, or a URL (default %(default)s)",
    )
    parser.add_argument(
        "--num-samples", type=up_to(10**7), default=2000, metavar="N", help="the first N samples (default %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=up_to(10**6), default=32, metavar="N", help="samples at once (default %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=up_to(2**20), default=64, metavar="N", help="of an answer (default %(default)s)"
    )
    add_where_to_compute(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where the figures go (default: evaluation.json of the run that the model lies in, whose report and model "
        "card are written anew; with --teacher and elsewhere, of the current folder)",
    )
    options = parser.parse_args(arguments)
    if options.image_root and not options.data:
        parser.error("--image-root goes with --data")
    if options.split and not any("name" in source_from_text(text) for text in options.data or ["shapes"]):
        parser.error("--split goes with a named data set of --data, files have none")
    return options


def evaluate(options: argparse.Namespace) -> int:
    """Measures, writes and shows. ValueError for what the user can mend."""
    if options.threads:
        torch.set_num_threads(options.threads)
    target, run = output_of(options)  # first: what takes long must not end in a file that cannot be written
    if run and (before := samples_of(target)) > options.num_samples:
        raise ValueError(
            f"--num-samples: {options.num_samples}, but {target}, which goes into the run's report and card, was "
            f"measured on {before}; ask for as many, or write another file with --output"
        )
    evaluation = measured(options)
    write_json(target, evaluation)
    print("\n".join(evaluation_table(evaluation)))
    written = [target]
    if run:
        written += write_pages(run)
    print(f"written: {', '.join(str(shown(path)) for path in written)}")
    return DONE


def samples_of(file: Path) -> int:
    """How many samples the figures in a file are of; 0 where there are none."""
    try:
        return int(json.loads(file.read_text())["samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """What evaluation.json holds. StoppedRun where a row is refused."""
    device = device_asked_for(options.device)
    specs = sources_of(options)
    with told_of("--data", "data.sources"):
        sources = tuple(open_sources(specs))
    model, processor = student(options.model)
    model.to(device)
    teacher = other_teacher(options.teacher, model.config, processor).to(device) if options.teacher else None
    limits = Limits(swiftkv_backbone(model).config.max_position_embeddings, max_images_per_sample=2**30)
    held_out = HeldOut(sources, options.num_samples, limits, options.batch_size, options.max_new_tokens)
    evaluator = Evaluator(model, processor, held_out, teacher=teacher)
    names = ", ".join(source.name for source in sources)
    sample = evaluator.typical_sample()
    stop_if_refused(evaluator, options.on_refused)
    if sample is None:
        left_out = ", ".join(f"{count} x {reason}" for reason, count in evaluator.left_out.most_common(5)) or "none"
        if sum(evaluator.left_out.values()) == len(evaluator.places):
            assert evaluator.example is not None
            for_one = f"{evaluator.example['id']}: {evaluator.example['detail']}"
            raise ValueError(
                f"--data: none of the samples of {names} can be used (left out: {left_out}). For one, {for_one}"
            )
        raise ValueError(
            f"--data: no sample of {names} has an image (left out: {left_out}), so nothing could be said of what the "
            f"student sees; add a source with images, such as --data shapes"
        )

    def tell(done: int, of: int) -> None:
        stop_if_refused(evaluator, options.on_refused)
        print(f"answered {done} of {of}", flush=True)

    results = evaluator.results(*SIDES, on_progress=tell)
    evaluation = evaluation_of([(results, evaluator.left_out)], SIDES, held_out)
    print("measuring what the student saves", flush=True)
    evaluation["model"] = layers_of(model)
    evaluation["savings"] = measure_savings(model, sample)
    return evaluation


def stop_if_refused(evaluator: Evaluator, on_refused: str) -> None:
    """StoppedRun where a row asked for what data may not open."""
    if message := refused_message(evaluator.refused, on_refused, "--on-refused skip"):
        raise StoppedRun(message)


def student(name_or_path: str) -> tuple[Any, Any]:
    """A student and its processor. ValueError if there is no such model, or it has no SwiftKV weights."""
    with told_of("--model"):
        files = find_model(name_or_path)
        if not has_swiftkv(load_model_config(files)):
            raise ValueError(
                f"{name_or_path} holds no SwiftKV weights; wanted a student, such as the folder final/ of a run"
            )
        processor = load_processor(files)
        for notice in check_processor(files, processor):
            print(f"warning: {notice}")
        model = build_student(files)
        check_generation(model, name_or_path)
        return model, processor


def other_teacher(name_or_path: str, student_config: Any, student_processor: Any) -> Any:
    """Another teacher. ValueError if there is no such model, or it reads other tokens or pixels than the student."""
    with told_of("--teacher"):
        files = find_model(name_or_path)
        config = load_model_config(files)
        mine, its = what_is_read(student_config, student_processor), what_is_read(config, load_processor(files))
        if different := [name for name in mine if mine[name] != its[name]]:
            raise ValueError(
                f"{name_or_path} has another {', another '.join(different)} than the student, so that they cannot be "
                f"compared token by token"
            )
        is_student = has_swiftkv(config)
        return build_student(files) if is_student else build_whole(files)


def what_is_read(config: Any, processor: Any) -> dict[str, Any]:
    """What decides which tokens and pixels a model is made for, in words for a reader."""
    vision, images = config.vision_config, processor.image_processor
    return {
        "vocabulary": (processor.tokenizer.get_vocab(), config.text_config.vocab_size, config.image_token_id),
        "image size": (vision.image_size, vision.patch_size),
        "grid of image tiles": [tuple(point) for point in config.image_grid_pinpoints],
        "choice of image features": config.vision_feature_select_strategy,
        "scale of pixels": (list(images.image_mean), list(images.image_std)),
    }


def sources_of(options: argparse.Namespace) -> Sequence[SourceConfig]:
    """What to measure on: as asked, else as the run says, else the built-in world."""
    run = run_of(options.model)
    if options.data is None and options.split is None and run is not None:
        sources = load_config(run / "config.yaml").evaluation.sources
        if sources:
            return sources
    specs = []
    for text in options.data or ["shapes"]:
        fields: dict[str, Any] = source_from_text(text)
        if "name" in fields:
            fields["split"] = options.split or "test"
        if fields.get("name") == "shapes":
            fields["num_samples"] = options.num_samples
        if "path" in fields and options.image_root:
            fields["image_root"] = options.image_root
        try:
            specs.append(SourceConfig(**fields))
        except ValidationError as error:
            raise ValueError(f"--data: {text}: {error.errors()[0]['msg']}") from error
    return specs


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


if __name__ == "__main__":
    sys.exit(main())
