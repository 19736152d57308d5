"""The command `python -m vlskv_ray.compare`: the figures of finished runs as Markdown, also straight into a page."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlskv_ray.command import DONE, exit_status
from vlskv_ray.report.figures import (
    DASH,
    RunFiles,
    as_written,
    at,
    decimal,
    is_number,
    kept,
    percent,
    read_run,
    seconds,
    whole,
)
from vlskv_ray.report.model_card import table
from vlskv_ray.report.summary import closing_lines
from vlskv_ray.storage.checkpoint import write_text

COLUMNS = (
    *("layers with their own cache", "group", "accuracy before", "accuracy after"),
    *("kept", "kept with images", "kept text only", "KL", "top-1"),
    *("prefill operations", "prefill time", "cache bytes", "trained weights", "training"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    return exit_status(lambda: compare(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m vlskv_ray.compare",
        description="Shows the figures of finished runs side by side, as a Markdown table.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument("--result", action="store_true", help="what each run said at its end instead")
    parser.add_argument("--into", metavar="FILE", help="write it into this page instead of printing it")
    parser.add_argument(
        "--block",
        default="figures",
        metavar="NAME",
        help="between its lines <!-- NAME: begin --> and <!-- NAME: end --> (default %(default)s)",
    )
    return parser.parse_args(arguments)


def compare(options: argparse.Namespace) -> int:
    """Shows or writes what was asked for. ValueError for what the user can mend."""
    runs = [finished(Path(folder)) for folder in options.runs]
    text = results(runs) if options.result else comparison(runs)
    if options.into:
        write_block(Path(options.into), options.block, text)
    else:
        print(text)
    return DONE


def finished(folder: Path) -> RunFiles:
    """A run's files. ValueError where it is no run, or one that has not come to its end."""
    run = read_run(folder)
    if not run.summary or not run.evaluation:
        raise ValueError(f"{folder}: holds no finished run (summary.json and evaluation.json); give folders of runs")
    return run


def comparison(runs: Sequence[RunFiles]) -> str:
    """A Markdown table, a line for each run. ValueError for one that distils nothing."""
    for run in runs:
        if run.is_sft:
            raise ValueError(f"{run.folder}: distils nothing, so it has no student to compare; --result shows a run")
    return table(COLUMNS, [(run.name, _of(run, row)) for run in runs], corner="run")


def results(runs: Sequence[RunFiles]) -> str:
    """What each run said at its end, as Markdown."""
    return "\n\n".join("```text\n" + "\n".join(_of(run, closing_lines)) + "\n```" for run in runs)


def _of(run: RunFiles, lines: Callable[[RunFiles], list[str]]) -> list[str]:
    with as_written(run.folder):
        return lines(run)


def row(run: RunFiles) -> list[str]:
    """A run's figures under `COLUMNS`."""
    evaluation = run.evaluation
    layers, first, group = (
        whole(at(evaluation, "model", key))
        for key in ("num_hidden_layers", "num_key_value_layers", "key_value_group_size")
    )
    before, after = (at(evaluation, side, "accuracy") for side in ("student_before", "student"))
    return [
        f"{first} of {layers}",
        group,
        percent(before),
        percent(after),
        *(kept(evaluation, measure) for measure in ("accuracy", "accuracy_vision", "accuracy_text")),
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
    page = page.resolve()  # a link stays one
    try:
        old = page.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--into: {page} cannot be read: {error}") from error
    before, _, rest = old.partition(begin)
    after = rest.partition(end)[2]
    if (old.count(begin), old.count(end), rest.count(end)) != (1, 1, 1):  # else what stands between would be lost
        raise ValueError(f"--into: {page} has no place for it; wanted the lines {begin} and {end}, once each")
    line_end = "\r\n" if "\r\n" in old else "\n"
    mode = page.stat().st_mode
    write_text(page, before + line_end.join([begin, *text.split("\n"), end]) + after)
    page.chmod(mode)


if __name__ == "__main__":
    sys.exit(main())
