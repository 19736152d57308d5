"""A trial of a sweep: its name, its values, and how it ended. It knows neither Ray nor a model."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlskv_ray.files import write_json

SHORT = {"model.num_key_value_layers": "N", "model.key_value_group_size": "g"}
"""What options are called in the names of trials; others by their last word."""
OUTCOME_FILE = "trial.json"
"""In the folder of a trial that has come to its end: its values, its status and, where it failed, why."""
TRIAL_DONE, TRIAL_STOPPED, TRIAL_FAILED = "done", "stopped early", "failed"


@dataclass(frozen=True)
class Trial:
    """One setting: a value for each option of the space. Its name is that of its run folder."""

    name: str
    values: dict[str, Any]

    @property
    def overrides(self) -> list[str]:
        """The values as a command line has them."""
        return [f"{key}={as_yaml(value)}" for key, value in self.values.items()]


def as_yaml(value: Any) -> str:
    """A value in one word, where it is one."""
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) else json.dumps(value)


def trial_of(values: dict[str, Any]) -> Trial:
    """Named by its values, so that the same ones are found again whatever order they come in."""
    parts = []
    for key, value in values.items():
        text = as_yaml(value)
        if not re.fullmatch(r"[\w.+-]{1,24}", text):  # long, or no name for a folder
            text = hashlib.sha256(text.encode()).hexdigest()[:8]
        parts.append(f"{SHORT.get(key, key.rpartition('.')[2])}{'' if key in SHORT else '-'}{text}")
    name = "_".join(parts)
    return Trial(name if len(name) <= 120 else hashlib.sha256(name.encode()).hexdigest()[:16], values)


def write_outcome(folder: Path, trial: Trial, status: str, reason: str = "", num_samples: int | None = None) -> None:
    """Writes down that a trial has come to its end, and how many samples it was given where these were bounded."""
    more = {"reason": reason, "num_samples": num_samples}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / OUTCOME_FILE, {"status": status, "values": trial.values} | {k: v for k, v in more.items() if v})


def outcome_of(folder: Path) -> dict[str, Any] | None:
    """How a trial ended; None for one that has not, or of which nothing readable is left."""
    try:
        outcome = json.loads((folder / OUTCOME_FILE).read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(outcome, dict) and isinstance(outcome.get("values"), dict)
    return outcome if whole and outcome.get("status") in (TRIAL_DONE, TRIAL_STOPPED, TRIAL_FAILED) else None
