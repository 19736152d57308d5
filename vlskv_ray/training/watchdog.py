"""What notices that a worker gets on with nothing, and that a step ends its workers again and again."""

import faulthandler
import json
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

TIMES_AS_LONG = 10.0
"""As its slowest part of the work a worker may take for the next one, where that is more than `stall_seconds`."""
DEATHS = 3
"""Of a step in a row, after which it is not tried again."""


class Watchdog:
    """Ends this process where it gets on with nothing, after writing down what each of its threads is at.

    The processes that wait for it then end likewise, and all are started again from the newest checkpoint.
    """

    def __init__(self, folder: Path, rank: int, seconds: float | None) -> None:
        """
        Args:
            folder: for the stacks.
            rank: of the worker.
            seconds: that a part of the work may take, or ten times as long as the slowest part so far, whichever is
                more; the first part may take ten times these seconds. None: for ever.
        """
        self.file, self.seconds, self.slowest = None, seconds, seconds
        if seconds is not None:
            folder.mkdir(exist_ok=True)
            for path in folder.glob(f"*-rank-{rank}.txt"):
                if not path.stat().st_size:  # of one that was killed: it had nothing to say
                    path.unlink(missing_ok=True)
            self.path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-rank-{rank}.txt"
            self.file = open(self.path, "w")  # noqa: SIM115 - closed by rest()

    def begin(self) -> None:
        """Work of another kind begins: how long a part of it takes is not known yet."""
        self.slowest = self.seconds
        self.first = True
        self.alive()

    def alive(self) -> None:
        """The worker has got on with something."""
        self.heard_at = time.monotonic()
        if self.file and self.seconds and self.slowest:
            limit = max(self.seconds, TIMES_AS_LONG * self.slowest)
            # by a thread of its own in C: it works where Python itself hangs in a library
            faulthandler.dump_traceback_later(limit, exit=True, file=self.file)

    def done(self) -> None:
        """The worker has done a part, begun when it was last heard of."""
        took = time.monotonic() - self.heard_at
        self.slowest = took if self.first or self.slowest is None else max(took, self.slowest)
        self.first = False
        self.alive()

    def rest(self) -> None:
        """The worker has ended well."""
        if self.file:
            faulthandler.cancel_dump_traceback_later()
            self.file.close()
            with suppress(OSError):
                self.path.unlink()
                self.path.parent.rmdir()  # if it is empty: stacks of others stay


class Attempts:
    """Which step is being computed, in attempt.json, so that one which ends its workers each time is known for it.

    An end at any other time, as while samples are waited for or answers measured, is none of the step's doing. One from
    outside while it is computed cannot be told from its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.died: Counter[str] = Counter()
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            found = json.loads(path.read_text())
            died = Counter({str(int(step)): int(count) for step, count in found["died"].items()})
            if found["step"] is not None:
                died[str(int(found["step"]))] += 1
            self.died = died

    def poisoned(self, total_steps: int) -> int | None:
        """A step of so many that was begun three times and never finished."""
        steps = (int(step) for step, count in self.died.items() if count >= DEATHS)
        return next((step for step in steps if 0 <= step < total_steps), None)

    def begin(self, step: int) -> None:
        self._write(step)

    def done(self, step: int) -> None:
        """The step has been computed after all."""
        self.died.pop(str(step), None)
        self._write(None)

    def end(self) -> None:
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _write(self, step: int | None) -> None:
        with suppress(OSError):
            self.path.write_text(json.dumps({"step": step, "died": self.died}))
