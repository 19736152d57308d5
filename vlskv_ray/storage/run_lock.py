"""Whose a run folder is: one driver's at a time, on whatever machine, and its workers' for as long as it is."""

import fcntl
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

BEAT_SECONDS = 5.0
"""How often an owner shows that it lives."""
LEFT = -1
"""In place of a count of beats: the owner has ended."""


@contextmanager
def own_run_folder(
    folder: Path, option: str = "output.dir", remedy: str = "wait, or use another output.name"
) -> Iterator[str]:
    """Makes the run folder this process's own while it lives, so that two commands never write one run.

    A lock of the file system tells of owners on this machine, and often on others; where it does not, an owner on
    another machine is known by its heartbeat, the count in `.lock`, which is watched for a moment.

    Args:
        folder: is made if it is not there, and removed again if nothing comes of it.
        option: by which a reader has named it.
        remedy: what to do where it is another's.

    Returns:
        a name for this ownership, by which `is_owner` knows the workers of this run from those of one before.

    Raises:
        ValueError: another process has it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ValueError(f"{option}: {folder} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process runs this run{_who(folder)}; {remedy}") from None
        _wait_for_silence(folder, remedy)
        owner = secrets.token_hex(8)
        ended = threading.Event()
        try:
            _write(folder, owner, 0)
            # a daemon: it must not keep a command alive that wants to end
            beating = threading.Thread(target=_beat, args=(folder, owner, ended), daemon=True)
            beating.start()
            yield owner
        finally:
            ended.set()
            with suppress(OSError):  # the folder may have been moved, and another's be in its place
                if is_owner(folder, owner):
                    _write(folder, owner, LEFT)
            if folder.exists() and os.listdir(folder) == [".lock"]:
                shutil.rmtree(folder)  # nothing came of it


def is_owner(folder: Path, owner: str) -> bool:
    """Whether this ownership still holds; workers outlive a driver that was killed by a moment."""
    found = _read(folder)
    return found is None or found.get("owner") == owner  # unreadable storage is no proof


def _beat(folder: Path, owner: str, ended: threading.Event) -> None:
    count = 0
    while not ended.wait(BEAT_SECONDS):
        count += 1
        with suppress(OSError):
            if is_owner(folder, owner):
                _write(folder, owner, count)


def _wait_for_silence(folder: Path, remedy: str) -> None:
    """ValueError if an owner on another machine is heard of, which the lock did not tell."""
    before = _read(folder)
    if before is None or before.get("host") == socket.gethostname() or before.get("beats") == LEFT:
        return
    until = time.monotonic() + 3 * BEAT_SECONDS
    while time.monotonic() < until:
        time.sleep(BEAT_SECONDS / 5)
        if _read(folder) != before:
            raise ValueError(f"{folder}: another process runs this run{_who(folder)}; {remedy}")


def _who(folder: Path) -> str:
    found = _read(folder)
    return f" (process {found.get('pid')} on {found.get('host')})" if found else ""


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / ".lock").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(folder: Path, owner: str, count: int) -> None:
    """In place and of one size, so that it is a single write, and works on a full disk."""
    about = {"owner": owner, "pid": os.getpid(), "host": socket.gethostname(), "beats": count}
    with open(folder / ".lock", "r+") as file:
        file.write(f"{json.dumps(about):<240}\n")
        file.truncate()
