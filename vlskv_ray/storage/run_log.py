"""A run's own files, a JSON line a step, and what is taken back of them when it goes on from an earlier step."""

import io
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from vlskv_ray.files import write_text


class RunLog:
    """The run's own files, written by rank 0: what a killed run wrote beyond its checkpoint is taken back first.

    A disk that is full stops nothing: lines wait until there is room, and `warnings.jsonl` tells of it.
    """

    def __init__(self, folder: Path, start: int, *, order: bool, tensorboard: bool) -> None:
        truncate_logs(folder, start)
        names = ("metrics", "rejected", "notices", *(("order",) if order else ()))
        self.folder, self.files = folder, {name: _opened(folder, name) for name in names}
        self.waiting = dict.fromkeys((*names, "warnings"), b"")
        self.warned: set[str] = set()
        self.latest_step = start
        self.tensorboard = None
        with suppress(OSError):  # as below: metrics.jsonl has all of it
            if tensorboard:
                self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def step(
        self,
        metrics: dict[str, float],
        rejected: Sequence[dict[str, Any]],
        notices: Sequence[dict[str, str]],
        ids: Sequence[Sequence[str]],
        *,
        with_metrics: bool,
    ) -> None:
        """Writes down one step: its metrics if they are due, rows left out, what was changed in others, and its samples
        if they are asked for."""
        self.latest_step = step = int(metrics["step"])
        if with_metrics:
            self._line("metrics", metrics)
            self._show(step, metrics)
        self.left_out(step, rejected)
        for row in notices:
            self._line("notices", {"step": step, **row})
        if "order" in self.files:
            self._line("order", {"step": step, "micro_batches": ids})

    def left_out(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Writes down rows that were left out of a step; 0 is what comes before the first."""
        for row in rows:
            self._line("rejected", {"step": step, **row})

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        """In TensorBoard; where the disk is full, metrics.jsonl will have it."""
        if self.tensorboard:
            with suppress(OSError):
                for name in metrics.keys() - {"step"}:
                    self.tensorboard.add_scalar(name, metrics[name], step)

    def warn(self, text: str) -> None:
        """Tells the driver, which shows it; the same thing only once."""
        if text not in self.warned:
            self.warned.add(text)
            self._line("warnings", {"step": self.latest_step, "warning": text})

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        if self.tensorboard:
            with suppress(OSError):
                self.tensorboard.close()

    def _line(self, name: str, value: Any) -> None:
        self.waiting[name] += json.dumps(value).encode() + b"\n"
        try:
            if name not in self.files:
                self.files[name] = _opened(self.folder, name)
            while self.waiting[name]:
                self.waiting[name] = self.waiting[name][self.files[name].write(self.waiting[name]) :]
        except OSError as error:
            if name != "warnings":
                self.warn(f"{name}.jsonl cannot be written: {error.strerror}; its lines wait until it can")


def _opened(folder: Path, name: str) -> io.FileIO:
    return open(folder / f"{name}.jsonl", "ab", buffering=0)  # unbuffered: a kill loses no line, and cuts one at most


def truncate_logs(folder: Path, step: int) -> None:
    """Drops from a run's logs the lines of later steps, and a last line that a kill cut short; all of them for a run
    that begins anew."""
    for path in (folder / f"{name}.jsonl" for name in ("metrics", "rejected", "notices", "order", "warnings")):
        if path.exists():
            text = path.read_text(errors="replace")
            kept = "".join(f"{line}\n" for line in text.splitlines() if step and step_of(line) <= step)
            if kept != text:  # else whoever follows it would read it anew
                write_text(path, kept)


def step_of(line: str) -> float:
    """The step a line of a log belongs to; infinite for what is no such line, as one that a kill cut short."""
    try:
        row = json.loads(line)
    except ValueError:
        return math.inf
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else math.inf
