"""A sweep: which trials a space of options gives, and what has become of each. It knows neither Ray nor a model."""

import hashlib
import itertools
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vlskv_ray.config import Config
from vlskv_ray.files import Follower, write_json
from vlskv_ray.report.figures import at, decimal, is_number, percent, read_run
from vlskv_ray.training.run import WAITING
from vlskv_ray.words import format_duration

SHORT = {"model.num_key_value_layers": "N", "model.key_value_group_size": "g"}
"""What options are called in the names of trials; others by their last word."""
OUTCOME = "trial.json"
"""In the folder of a trial that has come to its end: its values, its status and, where it failed, why."""
DONE, STOPPED, FAILED = "done", "stopped early", "failed"


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


def trials_of(config: Config) -> list[Trial]:
    """The trials of a space: every combination of its grids, `tune.draws` times with new draws of all else."""
    grids = {key: drawn["grid"] for key, drawn in config.tune.space.items() if "grid" in drawn}
    rng = np.random.default_rng([config.seed, 2])
    found: dict[str, Trial] = {}
    for _ in range(config.tune.draws):
        for combination in itertools.product(*grids.values()):
            chosen = dict(zip(grids, combination, strict=True))
            values = {
                key: chosen[key] if key in chosen else draw(drawn, rng) for key, drawn in config.tune.space.items()
            }
            trial = trial_of(values)
            found.setdefault(trial.name, trial)  # the same values again are no other trial
    return list(found.values())


def draw(distribution: dict[str, list[Any]], rng: np.random.Generator) -> Any:
    """A value; numbers are rounded to four digits, so that they can be read and typed."""
    [(how, values)] = distribution.items()
    if how == "choice":
        return values[int(rng.integers(len(values)))]
    least, most = values
    value = math.exp(rng.uniform(math.log(least), math.log(most))) if how == "loguniform" else rng.uniform(least, most)
    return float(f"{value:.4g}")


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


def end(folder: Path, trial: Trial, status: str, reason: str = "", num_samples: int | None = None) -> None:
    """Writes down that a trial has come to its end, and how many samples it was given where these were bounded."""
    more = {"reason": reason, "num_samples": num_samples}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / OUTCOME, {"status": status, "values": trial.values} | {k: v for k, v in more.items() if v})


def outcome_of(folder: Path) -> dict[str, Any] | None:
    """How a trial ended; None for one that has not, or of which nothing readable is left."""
    try:
        outcome = json.loads((folder / OUTCOME).read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(outcome, dict) and isinstance(outcome.get("values"), dict)
    return outcome if whole and outcome.get("status") in (DONE, STOPPED, FAILED) else None


# ----------------------------------------------------------------------------------------------------------- the table
@dataclass
class Progress:
    """How far a trial is, as its folder tells."""

    trial: Trial
    folder: Path
    metrics: Follower
    notes: Follower
    epochs: int
    latest: dict[str, Any] = field(default_factory=dict)
    outcome: dict[str, Any] | None = None
    answers: dict[str, Any] = field(default_factory=dict)
    """Its figures on held-out samples, once it is done."""
    began: float | None = None
    """Since when it runs, by the monotonic clock; None: it does not."""
    waits_for: str = ""
    """What it has told that its workers lack, if it has made no step since."""

    def update(self) -> None:
        for line in self.notes.new_lines():
            self.waits_for = line.removeprefix("waiting").strip()
        for line in self.metrics.new_lines():
            self.latest |= json.loads(line)
            self.waits_for = ""
        if self.outcome is None:
            self.outcome = outcome_of(self.folder)
            if self.status == DONE:  # read once: the table is drawn twice a second
                evaluation = read_run(self.folder).evaluation
                self.answers = at(evaluation, "student") or at(evaluation, "sft_model") or {}

    @property
    def status(self) -> str:
        if self.outcome is not None:
            return str(self.outcome["status"])
        if self.began is None or self.waits_for:
            return "waits"
        return "starts" if not self.latest else "measures" if self.latest.get("epoch", 0) >= self.epochs else "runs"


class SweepTable:
    """One table of all trials, redrawn on a terminal; elsewhere a line when a trial begins or ends, and now and then
    one on how far those are that run."""

    HEAD = ("trial", "status", "step", "loss", "KL", "accuracy", "time")

    def __init__(self, trials: Sequence[Trial], folder: Path, epochs: int, shown: bool, out: TextIO | None = None):
        self.out, self.shown, self.epochs = out or sys.stdout, shown, epochs
        self.live = self.out.isatty()
        self.folder = folder
        self.rows: dict[str, Progress] = {}
        self.told: set[tuple[str, str]] = set()
        self.drawn, self.began, self.told_at = 0, time.monotonic(), time.monotonic()
        for trial in trials:
            self.add(trial)

    def add(self, trial: Trial) -> None:
        """A trial that was not known from the start."""
        folder = self.folder / trial.name
        files = Follower(folder / "metrics.jsonl"), Follower(folder / WAITING)
        self.rows.setdefault(trial.name, Progress(trial, folder, *files, self.epochs))

    def begins(self, trial: Trial) -> None:
        self.add(trial)
        self.rows[trial.name].began = time.monotonic()

    def update(self) -> None:
        """Reads what is new, and shows it."""
        for row in self.rows.values():
            row.update()
        if not self.shown:
            return
        if self.live:
            self._redraw()
            return
        for name, row in self.rows.items():
            if (name, row.status) not in self.told and row.status not in ("waits", "runs", "measures"):
                self.told.add((name, row.status))
                self.out.write(f"{self._ended(row) if row.outcome else f'{name} starts'}\n")
            if row.waits_for and (name, row.waits_for) not in self.told:
                self.told.add((name, row.waits_for))
                self.out.write(f"{name} waits: {row.waits_for}\n")
        if time.monotonic() - self.told_at >= 30:
            self.told_at = time.monotonic()
            running = [
                f"  {name} {'measures' if row.status == 'measures' else f'{self._share(row):.0%}'}"
                for name, row in self.rows.items()
                if row.status in ("runs", "measures")
            ]
            done = sum(row.outcome is not None for row in self.rows.values())
            self.out.write(f"{done} of {len(self.rows)} trials{''.join(running)}\n")
        self.out.flush()

    def _share(self, row: Progress) -> float:
        """How much of its training a trial has done."""
        return min(1.0, float(row.latest.get("epoch", 0)) / self.epochs)

    def _ended(self, row: Progress) -> str:
        cells = [text for text in self._cells(row)[4:6] if text]
        took = f" in {format_duration(time.monotonic() - row.began)}" if row.began is not None else " before"
        reason = f": {row.outcome['reason']}" if row.outcome and row.outcome.get("reason") else ""
        figures = f"  KL {cells[0]}  accuracy {cells[1]}" if len(cells) == 2 else ""
        return f"{row.trial.name} {row.status}{took}{figures}{reason}"

    def _cells(self, row: Progress) -> list[str]:
        kl = row.answers.get("kl_mean", row.latest.get("eval_kl_mean"))
        accuracy = row.answers.get("accuracy", row.latest.get("eval_accuracy"))
        step = str(row.latest.get("step", ""))
        return [
            row.trial.name,
            row.status,
            f"{step} ({self._share(row):.0%})" if row.status == "runs" else step,
            decimal(row.latest["loss"]) if "loss" in row.latest else "",
            decimal(kl) if is_number(kl) else "",
            percent(accuracy) if is_number(accuracy) else "",
            format_duration(time.monotonic() - row.began) if row.began is not None and row.outcome is None else "",
        ]

    def _redraw(self) -> None:
        size = shutil.get_terminal_size()
        rows = sorted(self.rows.values(), key=lambda row: row.outcome is None and row.began is None)
        lines = list(aligned([list(self.HEAD), *map(self._cells, rows)]))
        done = sum(row.outcome is not None for row in rows)
        lines.append(f"{done} of {len(rows)} trials have ended, {format_duration(time.monotonic() - self.began)}")
        if len(lines) > size.lines - 1:
            lines = [*lines[: size.lines - 3], "...", lines[-1]]
        up = f"\x1b[{self.drawn}F" if self.drawn else ""
        self.out.write(up + "".join(f"\x1b[K{line[: size.columns - 1]}\n" for line in lines) + "\x1b[J")
        self.drawn = len(lines)
        self.out.flush()


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
