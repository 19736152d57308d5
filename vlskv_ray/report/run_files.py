"""The files of a run folder, read for whoever shows them: nothing here decides how a figure looks.

What is missing is empty; what is damaged is a ValueError that names the file and the remedy.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlskv_ray.training.objective import OBJECTIVES, Objective, objective_named

DASH = "–"


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds; empty where a file is missing."""

    folder: Path
    config: dict[str, Any]
    config_text: str
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    evaluation: dict[str, Any]

    @property
    def name(self) -> str:
        return str(at(self.config, "output", "name") or self.folder.name)

    @property
    def model(self) -> str:
        return base_name(str(at(self.summary, "model") or at(self.config, "model", "name_or_path") or DASH))

    @property
    def objective(self) -> Objective:
        name, trainable = str(at(self.config, "objective")), at(self.config, "model", "trainable")
        name = name if name in OBJECTIVES else "distill"  # a file from elsewhere may hold anything
        return objective_named(name, trainable if isinstance(trainable, list) else ())


def read_run(folder: Path) -> RunFiles:
    """Reads a run folder; ValueError where a file is not what a run writes."""
    folder = folder.resolve()
    metrics = folder / "metrics.jsonl"
    return RunFiles(
        folder,
        config=_mapping(folder / "config.yaml", yaml.safe_load),
        config_text=_text(folder / "config.yaml"),
        metrics=[_parsed(metrics, line) for line in _text(metrics).splitlines()],
        summary=_mapping(folder / "summary.json"),
        evaluation=_mapping(folder / "evaluation.json"),
    )


@contextmanager
def as_written(folder: Path) -> Iterator[None]:
    """ValueError where what is made of a run's files shows that they hold something else than a run writes."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{folder}: evaluation.json or summary.json holds something else than a run writes ({error!r}); "
            f"`python -m vlskv_ray.evaluate` writes the first anew, the training command both"
        ) from error


def _text(path: Path) -> str:
    if not path.exists():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {_remedy(path)}") from error


def _mapping(path: Path, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    return _parsed(path, _text(path), parse) if path.exists() else {}


def _parsed(path: Path, text: str, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    try:
        value = parse(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read ({problem}); {_remedy(path)}") from error
    if not isinstance(value, dict):
        problem = f"wanted a mapping of names to values, got {text[:40]!r}"
        raise ValueError(f"{path}: {problem}; {_remedy(path)}")
    return value


def _remedy(path: Path) -> str:
    """A run without its config or summary is none; without its other files it has less to show."""
    needed = path.name in ("config.yaml", "summary.json")
    return "restore it, or train again" if needed else "remove the file to go without it"


def at(values: Any, *keys: str) -> Any:
    """What lies at a path of keys; None where any of them leads nowhere."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def base_name(name_or_path: str) -> str:
    """A hub id or preset as it is, a path without the folders that only one machine has; RUN/final keeps its run."""
    if not name_or_path.startswith("/"):
        return name_or_path
    path = Path(name_or_path)
    return "/".join(path.parts[-2:]) if path.name == "final" else path.name or name_or_path
