"""Finished runs side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlskv_ray.report.figures import (
    ACCURACIES,
    MEASURES,
    STUDENTS,
    decimal,
    held_out,
    is_number,
    kept,
    percent,
    savings_note,
    savings_rows,
    savings_warning,
    scores,
    seconds,
    sides,
    title,
    whole,
)
from vlskv_ray.report.markdown import escape_markdown, markdown_table
from vlskv_ray.report.run_files import DASH, RunFiles, as_written, at, read_run
from vlskv_ray.report.summary import closing_lines

COLUMNS = (
    *("layers with their own cache", "group", "KL copied", "KL fitted", "KL", "top-1"),
    *("perplexity", "the teacher's perplexity", "agreed prefix"),
    *("accuracy copied", "accuracy fitted", "accuracy", "kept", "kept with images", "kept text only"),
    *("prefill operations", "prefill CPU time", "prefill time", "cache bytes", "trained weights", "training"),
)
SUMMARISED = ("kl_mean", "top1_agreement", "perplexity", "agreed_prefix_share", "accuracy")


def finished(folder: Path) -> RunFiles:
    """A run's files. ValueError where it is no run, or one that has not come to its end."""
    run = read_run(folder)
    if not run.summary or not run.evaluation:
        raise ValueError(f"{folder}: holds no finished run (summary.json and evaluation.json); give folders of runs")
    return run


def comparison(runs: Sequence[RunFiles]) -> str:
    """A Markdown table, a line for each run. ValueError for one that distils nothing."""
    return markdown_table(COLUMNS, [(run.name, _of(_with_student(run), row)) for run in runs], corner="run")


def closing_texts(runs: Sequence[RunFiles]) -> str:
    """What each run said at its end, as Markdown."""
    return "\n\n".join("```text\n" + "\n".join(_of(run, closing_lines)) + "\n```" for run in runs)


def summaries(runs: Sequence[RunFiles]) -> str:
    """The rows that matter most of each run's result, as Markdown. ValueError for one that distils nothing."""
    return "\n\n".join("\n".join(_of(_with_student(run), _summary_lines)) for run in runs)


def _summary_lines(run: RunFiles) -> list[str]:
    evaluation, who = run.evaluation, sides(run.evaluation)
    has_accuracy = scores(evaluation, "accuracy")
    rows = [
        (label, [form(at(evaluation, side, key)) for side in who])
        for key, label, form in MEASURES
        if key in SUMMARISED and (key != "accuracy" or has_accuracy)
    ]
    if has_accuracy:
        rows.append(("accuracy kept", [*[""] * (len(who) - 1), kept(evaluation, "accuracy")]))
    savings = dict(savings_rows(evaluation))
    if "prefill CPU time" in savings:
        savings.pop("prefill time", None)
    for label, (its, mine, share) in savings.items():
        if label.startswith("prefill"):
            rows.append((label, [its, *[""] * (len(who) - 2), f"{mine} ({share} of the teacher's)"]))
    table = markdown_table([title(side, evaluation) for side in who], rows)
    notes = (held_out(run), savings_note(evaluation, briefly=True), savings_warning(evaluation))
    return [table, "", escape_markdown(" ".join(filter(None, notes)))]


def _with_student(run: RunFiles) -> RunFiles:
    """The run itself. ValueError for one that distils nothing."""
    if not run.objective.has_student:
        raise ValueError(f"{run.folder}: distils nothing, so it has no student to compare; --result shows a run")
    return run


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
    students = [at(evaluation, side) or {} for side in STUDENTS]
    has_accuracy = scores(evaluation, "accuracy")
    return [
        f"{first} of {layers}",
        group,
        *(decimal(student.get("kl_mean")) for student in students),
        percent(at(evaluation, "student", "top1_agreement")),
        decimal(at(evaluation, "student", "perplexity")),
        decimal(at(evaluation, "teacher", "perplexity")),
        percent(at(evaluation, "student", "agreed_prefix_share")),
        *(percent(student.get("accuracy")) if has_accuracy else DASH for student in students),
        *(kept(evaluation, measure) for measure in ACCURACIES),
        *(
            ratio(at(evaluation, "savings", f"{what}_ratio"))
            for what in ("prefill_flops", "prefill_cpu_time", "prefill_time", "cache_bytes")
        ),
        whole(at(evaluation, "savings", "trainable_parameters")),
        seconds(at(run.summary, "training_seconds")),
    ]


def ratio(value: Any) -> str:
    return f"{value:.2f}" if is_number(value) else DASH
