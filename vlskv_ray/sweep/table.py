"""How far each trial of a sweep is, as its folder tells, and the one table that shows it."""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from vlskv_ray.files import Follower
from vlskv_ray.report.figures import decimal, is_number, percent
from vlskv_ray.report.run_files import at, read_run
from vlskv_ray.sweep.frontier import kl_by_start
from vlskv_ray.sweep.trials import TRIAL_DONE, Trial, outcome_of
from vlskv_ray.training.run import WAITING
from vlskv_ray.words import format_duration, terminal_table


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
    kl_before: tuple[float | None, float | None] = (None, None)
    """Its KL as it began, copied and fitted, once it is done."""
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
            if self.status == TRIAL_DONE:  # read once: the table is drawn twice a second
                evaluation = read_run(self.folder).evaluation
                self.answers = at(evaluation, "student") or at(evaluation, "sft_model") or {}
                self.kl_before = kl_by_start(evaluation)[:2]

    @property
    def is_running(self) -> bool:
        """It has begun, here, and has not ended."""
        return self.began is not None and self.outcome is None

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

    HEAD = ("trial", "status", "step", "loss", "KL copied", "KL fitted", "KL", "accuracy", "time")

    def __init__(self, trials: Sequence[Trial], folder: Path, epochs: int, shown: bool, out: TextIO | None = None):
        self.out, self.shown, self.epochs = out or sys.stdout, shown, epochs
        self.live = self.out.isatty()
        self.folder = folder
        self.rows: dict[str, Progress] = {}
        self.written: set[tuple[str, str]] = set()
        self.drawn, self.began, self.written_at = 0, time.monotonic(), time.monotonic()
        for trial in trials:
            self.add(trial)

    def add(self, trial: Trial) -> None:
        """A trial that was not known from the start."""
        folder = self.folder / trial.name
        files = Follower(folder / "metrics.jsonl"), Follower(folder / WAITING)
        self.rows.setdefault(trial.name, Progress(trial, folder, *files, self.epochs))

    def begin(self, trial: Trial) -> None:
        """A trial runs from now on."""
        self.add(trial)
        self.rows[trial.name].began = time.monotonic()

    def draw_below(self) -> None:
        """Something was printed on the terminal, which is to stay: the next table comes below it."""
        self.drawn = 0

    def update(self) -> None:
        """Reads what is new, and shows it."""
        for row in self.rows.values():
            row.update()
        if self.shown:
            if self.live:
                self._redraw()
            else:
                self._write_news()
            self.out.flush()

    def _write_news(self) -> None:
        """Elsewhere than on a terminal: what began, ended or waits, each once, and now and then how far the rest is."""
        for name, row in self.rows.items():
            if row.status not in ("waits", "runs", "measures"):
                self._write_once(name, row.status, self._ended(row) if row.outcome else f"{name} starts")
            if row.waits_for:
                self._write_once(name, row.waits_for, f"{name} waits: {row.waits_for}")
        if time.monotonic() - self.written_at >= 30:
            self.written_at = time.monotonic()
            running = [
                f"  {name} {'measures' if row.status == 'measures' else f'{self._share(row):.0%}'}"
                for name, row in self.rows.items()
                if row.status in ("runs", "measures")
            ]
            done = sum(row.outcome is not None for row in self.rows.values())
            self.out.write(f"{done} of {len(self.rows)} trials{''.join(running)}\n")

    def _write_once(self, name: str, news: str, line: str) -> None:
        if (name, news) not in self.written:
            self.written.add((name, news))
            self.out.write(f"{line}\n")

    def _share(self, row: Progress) -> float:
        """How much of its training a trial has done."""
        return min(1.0, float(row.latest.get("epoch", 0)) / self.epochs)

    def _ended(self, row: Progress) -> str:
        names = ("KL copied", "KL fitted", "KL", "accuracy")
        cells = dict(zip(self.HEAD, self._cells(row), strict=True))
        figures = "".join(f"  {name} {cells[name]}" for name in names if cells[name])
        took = f" in {format_duration(time.monotonic() - row.began)}" if row.began is not None else " before"
        reason = f": {row.outcome['reason']}" if row.outcome and row.outcome.get("reason") else ""
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
            *(decimal(figure) if is_number(figure) else "" for figure in (*row.kl_before, kl)),
            percent(accuracy) if is_number(accuracy) else "",
            format_duration(time.monotonic() - row.began) if row.began is not None and row.outcome is None else "",
        ]

    def _redraw(self) -> None:
        size = shutil.get_terminal_size()
        rows = sorted(self.rows.values(), key=lambda row: row.outcome is None and row.began is None)
        lines = terminal_table([self.HEAD, *map(self._cells, rows)])
        done = sum(row.outcome is not None for row in rows)
        lines.append(f"{done} of {len(rows)} trials have ended, {format_duration(time.monotonic() - self.began)}")
        if len(lines) > size.lines - 1:
            lines = [*lines[: size.lines - 3], "...", lines[-1]]
        up = f"\x1b[{self.drawn}F" if self.drawn else ""
        self.out.write(up + "".join(f"\x1b[K{line[: size.columns - 1]}\n" for line in lines) + "\x1b[J")
        self.drawn = len(lines)
