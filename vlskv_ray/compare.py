"""The command `python -m vlskv_ray.compare`: the figures of finished runs as Markdown, also straight into a page."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlskv_ray.checkpoint import write_text
from vlskv_ray.figures import DASH, RunFiles, at, decimal, is_number, percent, read_run, seconds, whole
from vlskv_ray.model_card import table
from vlskv_ray.report import closing_lines

DONE, WRONG_INPUT = 0, 2
COLUMNS = (
    *("layers with their own cache", "group", "accuracy before", "accuracy after", "kept", "KL", "top-1"),
    *("prefill operations", "prefill time", "cache bytes", "trained weights", "training"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vlskv_ray.compare",
        description="Shows the figures of finished runs side by side, as a Markdown table.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument("--result", action="store_true", help="the closing table of one run instead")
    parser.add_argument("--into", metavar="FILE", help="write it into this page instead of printing it")
    parser.add_argument(
        "--block",
        default="figures",
        metavar="NAME",
        help="between its lines <!-- NAME: begin --> and <!-- NAME: end --> (default %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        runs = [finished(Path(folder)) for folder in options.runs]
        text = comparison(runs)
        if options.result:
            text = "\n\n".join("```text\n" + "\n".join(closing_lines(run)) + "\n```" for run in runs)
        if options.into:
            write_block(Path(options.into), options.block, text)
        else:
            print(text)
        return DONE
    except ValueError as error:
        print(error, file=sys.stderr)
        return WRONG_INPUT


def finished(folder: Path) -> RunFiles:
    """A run's files. ValueError where it is no run, or one that has not come to its end."""
    run = read_run(folder)
    if not run.summary or not run.evaluation:
        raise ValueError(f"{folder}: holds no finished run (summary.json and evaluation.json); give folders of runs")
    return run


def comparison(runs: Sequence[RunFiles]) -> str:
    """A Markdown table, a line for each run."""
    return table(COLUMNS, [(run.name, row(run)) for run in runs], corner="run")


def row(run: RunFiles) -> list[str]:
    """A run's figures under `COLUMNS`."""
    evaluation = run.evaluation
    layers, first, group = (
        whole(at(evaluation, "model", key))
        for key in ("num_hidden_layers", "num_key_value_layers", "key_value_group_size")
    )
    teacher, before, after = (at(evaluation, side, "accuracy") for side in ("teacher", "student_before", "student"))
    return [
        f"{first} of {layers}",
        group,
        percent(before),
        percent(after),
        percent(after / teacher) if is_number(after) and is_number(teacher) and teacher else DASH,
        decimal(at(evaluation, "student", "kl_mean")),
        percent(at(evaluation, "student", "top1_agreement")),
        *(
            ratio(at(evaluation, "savings", f"{what}_ratio"))
            for what in ("prefill_flops", "prefill_time", "cache_bytes")
        ),
        whole(at(evaluation, "savings", "trainable_parameters")),
        seconds(at(run.summary, "training_seconds")),
    ]


def ratio(value: Any) -> str:
    return f"{value:.2f}" if is_number(value) else DASH


def write_block(page: Path, name: str, text: str) -> None:
    """Puts a text between the two lines that mark its place in a page. ValueError where they are not there."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    try:
        old = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--into: {page} cannot be read: {error.strerror}") from error
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(old)) != 1:
        raise ValueError(f"--into: {page} has no place for it; wanted the lines {begin} and {end}, once")
    write_text(page, pattern.sub(lambda _: f"{begin}\n{text}\n{end}", old))


if __name__ == "__main__":
    sys.exit(main())
