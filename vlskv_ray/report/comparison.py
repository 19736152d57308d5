"""Finished runs side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from vlskv_ray.report.markdown import markdown_table
from vlskv_ray.report.summary import closing_lines

COLUMNS = (
    *("layers with their own cache", "group", "accuracy before", "accuracy after"),
    *("kept", "kept with images", "kept text only", "KL", "top-1"),
    *("prefill operations", "prefill time", "cache bytes", "trained weights", "training"),
)


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
    return markdown_table(COLUMNS, [(run.name, _of(run, row)) for run in runs], corner="run")


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
