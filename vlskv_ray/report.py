"""What a run leaves to read: its summary, and the table at its end."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlskv_ray.checkpoint import write_json
from vlskv_ray.cluster import duration
from vlskv_ray.train_loop import Run

AVERAGED = {
    "loss": "loss",
    "kl_vision": "KL per token, samples with images",
    "kl_text": "KL per token, text only",
    "top1_agreement": "top-1 agreement with the teacher",
}
PACKAGES = ("vlskv_ray", "ray", "torch", "transformers", "datasets", "pillow")


def shown(path: Path) -> Path:
    """A path as a person here would write it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def write_summary(run: Run, outcome: dict[str, Any], seconds: float) -> None:
    """Writes summary.json, which also marks the run as finished: means of the first and last logged steps."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    count = max(1, min(5, len(lines) // 2))

    def mean(key: str, part: list[dict[str, float]]) -> float | None:
        values = [line[key] for line in part if key in line]
        return sum(values) / len(values) if values else None

    summary = {
        "steps": outcome["step"],
        "training_seconds": round(outcome["seconds"], 1),
        "command_seconds": round(seconds, 1),
        "averaged_steps": count,
        "first": {name: mean(name, lines[:count]) for name in AVERAGED},
        "last": {name: mean(name, lines[-count:]) for name in AVERAGED},
        "rejected": outcome["rejected"],
        "model": run.config.model.name_or_path,
        "revision": run.config.model.revision,
        "versions": {name: version(name) for name in PACKAGES},
    }
    write_json(run.folder / "summary.json", summary)


def result_table(run: Run) -> str:
    """The end of a run for the eye: where the loss began, where it ended, where things are."""
    summary = json.loads((run.folder / "summary.json").read_text())
    count = summary["averaged_steps"]
    lines = [f"{f'mean of {count} steps' if count > 1 else 'step':36}{'first':>12}{'last':>12}"]
    for name, label in AVERAGED.items():
        values = (summary["first"][name], summary["last"][name])
        if values != (None, None):
            lines.append(f"{label:36}" + "".join("           -" if v is None else f"{v:12.4g}" for v in values))
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(summary["rejected"].items()))
    left_out = f"{sum(summary['rejected'].values())} samples left out" + (f": {reasons}" if reasons else "")
    times = f"{duration(summary['training_seconds'])}, the command in {duration(summary['command_seconds'])}"
    lines.append(f"{summary['steps']} steps in {times}; {left_out}")
    lines.append(f"student: {shown(run.folder / 'final')}")
    return "\n".join(lines)
