"""Small files, whole or not at all."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def make_readable(folder: Path) -> None:
    """Gives files the permissions that others have: safetensors writes weights for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


def write_json(path: Path, value: Any) -> None:
    """Writes a small JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a small text file whole or not at all."""
    aside = path.with_name(f".writing-{path.name}")
    try:
        aside.write_text(text, encoding="utf-8", newline="")
        flush(aside)
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Follower:
    """What is added to a file of lines, from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset, self.partial = path.stat().st_size if path.exists() else 0, ""
        self.taken_back = False
        """The file was shorter than before when it was looked at last, and is read from its start again."""

    def new_lines(self) -> list[str]:
        """Whole lines that have not been seen."""
        size = self.path.stat().st_size if self.path.exists() else 0
        self.taken_back = size < self.offset
        if self.taken_back:
            self.offset, self.partial = 0, ""
        if size == self.offset:
            return []
        with open(self.path) as file:
            file.seek(self.offset)
            *lines, self.partial = (self.partial + file.read()).split("\n")
            self.offset = file.tell()
        return lines
