"""One live line on a run, instead of all that Ray prints."""

import json
import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from vlskv_ray.files import Follower
from vlskv_ray.words import format_duration, printable_lines


class LiveLine:
    """A line that is redrawn on a terminal; elsewhere each becomes one of its own."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.live = self.out.isatty()

    def write(self, text: str, lasting: bool = False) -> None:
        """Shows the text, and goes on below it where it is to last."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be redrawn
            self.out.write(f"\r\x1b[K{text}\n" if lasting else f"\r\x1b[K{text[:width]}")
        else:
            self.out.write(f"{text}\n")
        self.out.flush()


class ProgressLine:
    """Follows what a run adds to metrics.jsonl: one line redrawn on a terminal, plain lines now and then elsewhere."""

    def __init__(
        self,
        metrics: Path,
        total_steps: int,
        shown: bool = True,
        out: TextIO | None = None,
        afterwards: str = "",
        on_metrics: Callable[[dict[str, Any]], None] | None = None,
        notes: Path | None = None,
    ) -> None:
        self.total_steps, self.shown, self.afterwards, self.on_metrics = total_steps, shown, afterwards, on_metrics
        self.line = LiveLine(out)
        self.metrics, self.warnings = Follower(metrics), Follower(metrics.with_name("warnings.jsonl"))
        self.notes = Follower(notes) if notes else None
        self.waits = False
        """No step was made since a note told that workers wait to be started."""
        self.began, self.printed_at = time.monotonic(), -math.inf
        self.seconds: deque[float] = deque(maxlen=100)
        self.latest: dict[str, Any] = {}

    def update(self) -> None:
        """Reads what is new, tells it and shows the latest step."""
        warned = [printable_lines(f"warning: {json.loads(line)['warning']}") for line in self.warnings.new_lines()]
        notes = self.notes.new_lines() if self.notes else []
        for text in warned + notes:
            self.line.write(text, lasting=True) if self.shown else print(text, file=sys.stderr)
        lines = self.metrics.new_lines()
        self.waits = not lines and (self.waits or bool(notes))  # a step is the proof that the wait is over
        for line in lines if self.on_metrics else ():
            self.on_metrics(json.loads(line))  # type: ignore[misc]
        if not self.shown:
            return
        if self.metrics.taken_back and self.latest:  # by new workers, which go on from their checkpoint
            self.line.write("a worker was lost; all were started again from the newest checkpoint", lasting=True)
        if not lines:
            if self.line.live and not self.latest:
                self.line.write(f"starting {format_duration(time.monotonic() - self.began)}")
            return
        for line in lines:
            self.latest |= json.loads(line)  # a step may have samples of one modality only: show the other's last
            self.seconds.append(self.latest["step_seconds"])
        is_last = self.latest["step"] >= self.total_steps
        if self.line.live or is_last or time.monotonic() - self.printed_at >= 10:
            self.line.write(self.text(), lasting=is_last)
            self.printed_at = time.monotonic()
        if is_last and self.afterwards:
            self.line.write(self.afterwards, lasting=True)
            self.afterwards = ""

    def text(self) -> str:
        """The latest step in one line."""
        m = self.latest
        parts = [f"step {m['step']}/{self.total_steps}"]
        means = {"loss": "loss", "kl_vision": "image", "kl_text": "text", "ce_vision": "image", "ce_text": "text"}
        parts += [f"{label} {m[key]:.4g}" for key, label in means.items() if key in m]
        shares = {"top1_agreement": "agree", "token_accuracy": "right"}
        parts += [f"{label} {m[key]:.0%}" for key, label in shares.items() if key in m]
        parts += [f"{m['tokens_per_second']:,.0f} tok/s"]
        if len(self.seconds) > 1:
            parts.append(f"{format_duration((self.total_steps - m['step']) * fmean(self.seconds))} left")
        return "  ".join(parts)

    def close(self) -> None:
        self.update()
        if self.line.live and self.shown and self.latest.get("step", 0) < self.total_steps:
            self.line.out.write("\n")
