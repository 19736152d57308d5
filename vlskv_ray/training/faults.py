"""Fault injection for tests: a process ends, stops or waits at a chosen moment. Does nothing in normal use.

The environment variable VLSKV_RAY_FAULTS names a folder of files such as

    01.json     {"phase": "reduce", "step": 3, "rank": 1, "action": "kill"}

Each happens once, when a worker of that rank comes to that point: then its file is renamed to 01.json.done.
"""

import json
import os
import signal
import time
from pathlib import Path

FOLDER = "VLSKV_RAY_FAULTS"
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
LONGEST_WAIT = 600.0
"""Seconds; for a test that is gone itself."""


def fault_point(phase: str, step: int, rank: int = 0) -> None:
    """A moment at which something may be made to go wrong.

    Args:
        phase: what the worker is about to do or has just done.
        step: optimizer steps that were finished before.
        rank: of the worker.
    """
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    for path in sorted(Path(folder).glob("*.json")):
        fault = json.loads(path.read_text())
        if (fault["phase"], fault["step"], fault["rank"]) == (phase, step, rank):
            path.rename(path.with_name(f"{path.name}.done"))
            _happen(fault["action"], path)
            return


def _happen(action: str, path: Path) -> None:
    """kill: this process ends at once. term: it is asked to. stop: it does not answer any more. wait: until the test
    has made `path`.go."""
    if action == "wait":
        until = time.monotonic() + LONGEST_WAIT
        while not path.with_name(f"{path.name}.go").exists() and time.monotonic() < until:
            time.sleep(0.01)
    else:
        os.kill(os.getpid(), SIGNALS[action])
