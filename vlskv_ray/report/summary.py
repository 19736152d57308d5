"""What a run leaves to read: its summary, and the table at its end."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlskv_ray.files import write_json
from vlskv_ray.report.figures import (
    SAVINGS_COLUMNS,
    Rows,
    answer_pairs,
    answers_note,
    columns,
    kind_rows,
    result_rows,
    savings_note,
    savings_rows,
    savings_warning,
)
from vlskv_ray.report.run_files import RunFiles, read_run
from vlskv_ray.training.outcome import Outcome
from vlskv_ray.training.run import Run
from vlskv_ray.words import format_duration, printable, short_path

AVERAGED = {
    "loss": "loss",
    "kl_vision": "KL per token, samples with images",
    "kl_text": "KL per token, text only",
    "top1_agreement": "top-1 agreement with the teacher",
    "ce_vision": "cross-entropy, samples with images",
    "ce_text": "cross-entropy, text only",
    "token_accuracy": "likeliest token is right",
}
NUM_PAIRS = 3
MOST_CHARACTERS = 240
"""How many answers to read are printed, and what of each: two or three lines of a terminal."""
PACKAGES = ("vlskv_ray", "ray", "torch", "transformers", "datasets", "pillow", "matplotlib")


def write_summary(run: Run, outcome: Outcome, seconds: float, final: dict[str, str]) -> None:
    """Writes summary.json: means of the first and last logged steps, and the seals of the model, by which it is known
    as what this run wrote."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    seen = outcome.counts
    count = max(1, min(5, len(lines) // 2))  # one step is noisy; half at most, so that the two do not overlap

    def mean(key: str, part: list[dict[str, float]]) -> float | None:
        values = [line[key] for line in part if key in line]
        return sum(values) / len(values) if values else None

    summary = {
        "steps": outcome.step,
        "training_seconds": round(seen["seconds"], 1),
        "command_seconds": round(seconds, 1),
        "averaged_steps": count,
        "first": {name: mean(name, lines[:count]) for name in AVERAGED},
        "last": {name: mean(name, lines[-count:]) for name in AVERAGED},
        "rejected": seen["rejected"],
        "notices": seen["notices"],
        "empty_steps": seen["empty_steps"],
        "data": {name: seen[name] for name in ("lengths", "images")} | {"samples": seen["seen"]},
        "model": run.config.model.name_or_path,
        "revision": run.config.model.revision,
        "parameters": {"trained": run.trained_parameters, "frozen": run.frozen_parameters},
        "versions": {name: version(name) for name in PACKAGES},
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": run.config.cluster.threads_per_worker,
            "workers": max(run.config.cluster.most_workers, 1),
            **({"device": "a GPU for each worker"} if run.config.cluster.use_gpu else {}),
        },
        "final": final,
    }
    write_json(run.folder / "summary.json", summary)


def closing_lines(run: RunFiles) -> list[str]:
    """The end of a run for the eye: where the loss began and ended, what the model answers, what it saves."""
    summary = run.summary
    count = summary["averaged_steps"]
    lines = [f"{f'mean of {count} steps' if count > 1 else 'step':36}{'first':>12}{'last':>12}"] if run.metrics else []
    for name, label in AVERAGED.items():
        values = (summary["first"][name], summary["last"][name])
        if values != (None, None):  # another objective has other metrics, and a run may have one modality only
            lines.append(f"{label:36}" + "".join("           -" if v is None else f"{v:12.4g}" for v in values))
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(summary["rejected"].items()))
    left_out = f"{sum(summary['rejected'].values())} samples left out" + (f": {reasons}" if reasons else "")
    if notices := summary.get("notices"):
        changed = ", ".join(f"{count} {reason}" for reason, count in sorted(notices.items()))
        left_out += f"; {sum(notices.values())} samples changed: {changed}"
    times = (
        f"{format_duration(summary['training_seconds'])}, the command in {format_duration(summary['command_seconds'])}"
    )
    lines.append(f"{summary['steps']} steps in {times}; {left_out}")
    if empty := summary.get("empty_steps"):
        lines.append(f"warning: {empty} of the {summary['steps']} steps had no sample to learn from")
    return [*lines, "", *evaluation_table(run.evaluation)]


def closing(folder: Path) -> str:
    """What a finished run says at its end: `closing_lines`, and where things are."""
    run = read_run(folder)
    final = f"{'student' if run.objective.has_student else 'model'}: {short_path(folder / 'final')}"
    return "\n".join([*closing_lines(run), "", final, f"report: {short_path(folder / 'report.html')}"])


def evaluation_table(evaluation: dict[str, Any]) -> list[str]:
    """Lines for a terminal: how close the student is to its teacher, some answers to read, and what it saves."""
    lines: list[str] = []

    def table(columns: list[str], rows: Rows) -> None:
        lines.append(" " * 36 + "".join(f"{title:>18}" for title in columns))
        lines.extend((f"{label:36}" + "".join(f"{value:>18}" for value in values)).rstrip() for label, values in rows)

    if evaluation.get("questions"):
        lines.append(f"{evaluation['questions']} questions of {evaluation['samples']} held-out samples")
        table(columns(evaluation), [*result_rows(evaluation), *kind_rows(evaluation)])
        lines += [note] if (note := answers_note(evaluation)) else []
    if left_out := evaluation.get("left_out"):
        lines.append(f"held-out samples left out: {', '.join(f'{n} x {reason}' for reason, n in left_out.items())}")
    for rows in answer_pairs(evaluation, NUM_PAIRS, MOST_CHARACTERS):
        lines += ["", *(f"{label:20}{printable(' '.join(text.split()))}".rstrip() for label, [text] in rows)]
    if "savings" in evaluation:
        lines += [""] if lines else []
        table(list(SAVINGS_COLUMNS), savings_rows(evaluation))
        lines.append(savings_note(evaluation))
        lines += [warning] if (warning := savings_warning(evaluation)) else []
    return lines
