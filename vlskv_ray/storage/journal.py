"""What long work has found so far, added line by line to a file, each whole or not at all, whatever is killed when."""

import json
import os
from pathlib import Path
from typing import Any

from vlskv_ray.files import flush
from vlskv_ray.words import plural

SHOWN = 40
"""Characters of a setting that are still shown where it has changed."""


class Journal:
    """A file of JSON lines under a first one that says what they are of; to be opened by one process at a time."""

    def __init__(self, path: Path, settings: dict[str, Any], option: str, anew: bool = False) -> None:
        """Opens it to go on, without a last line that a kill cut short, or begins it.

        Args:
            path: of the file.
            settings: what decides the lines.
            option: by which a reader has named where it lies.
            anew: begin it, whatever is there.

        Raises:
            ValueError: it is of other settings, or damaged; says what to do.
        """
        self.path = path
        found, num_bytes = ([], 0) if anew or not path.exists() else _whole_lines(path, option)
        if len(found) < 2:  # nothing would be lost
            found, num_bytes = [], 0
        elif changed := changed_settings(found[0], settings):
            lost = plural(len(found) - 1, "line")
            raise ValueError(
                f"{option}: {path} holds what was made with other settings ({', '.join(changed)}); give the same ones "
                f"to go on, or --anew to begin anew, without the {lost} in it"
            )
        self.lines: list[dict[str, Any]] = found[1:]
        """Those that were there."""
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by `remove`, or with the process
        self.file.truncate(num_bytes)
        if not found:
            self.append(settings)
        flush(path.parent)

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line; afterwards it is on the disk. OSError where that is full."""
        data = json.dumps(line).encode() + b"\n"
        try:
            while data:
                data = data[self.file.write(data) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            kept = "what it holds is kept, and the same command goes on"
            raise OSError(error.errno, f"cannot be written: {error.strerror}; {kept}", str(self.path)) from error

    def remove(self) -> None:
        """Once all that it holds is elsewhere."""
        self.file.close()
        self.path.unlink()


def _whole_lines(path: Path, option: str) -> tuple[list[dict[str, Any]], int]:
    """The lines of a file but for a last one that was not ended, and how many bytes they take."""
    *lines, _ = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(dict(json.loads(line)))
        except (TypeError, ValueError) as error:
            remedy = "delete it and all lines after it, or --anew begins anew"
            raise ValueError(f"{option}: {path}:{number}: the line is damaged ({error}); {remedy}") from error
    return found, sum(len(line) + 1 for line in lines)


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, with values where they are short."""
    now = json.loads(json.dumps(now))  # as they will be read: lists for tuples
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    values = {name: [json.dumps(settings.get(name)) for settings in (before, now)] for name in names}
    return [
        f"{name}: {was}, now {is_now}" if len(was + is_now) <= SHOWN else f"another {name}"
        for name, (was, is_now) in values.items()
    ]
