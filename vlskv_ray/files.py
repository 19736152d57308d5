"""Small files, whole or not at all, and JSON that says each thing once."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


class DuplicateKey(ValueError):
    """A key is given twice in one object of JSON: which of them is meant cannot be told."""


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, as `object_pairs_hook` of the json module.

    Raises:
        DuplicateKey: of two that are the same, `json` would silently keep the last.
    """
    held = dict(pairs)
    if len(held) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DuplicateKey(f"the key {twice[:80]!r} is given twice in one object")
    return held


def make_readable(*files: Path) -> None:
    """Gives files the permissions that others have: safetensors writes weights for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in files:
        path.chmod(0o666 & ~umask)


def write_json(path: Path, value: Any) -> None:
    """Writes a small JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a small text file whole or not at all."""
    write_texts(path, [text])


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """Writes a file of many texts, one after the other, whole or not at all."""
    aside = path.with_name(f".writing-{path.name}")
    try:
        with open(aside, "w", encoding="utf-8", newline="") as file:
            file.writelines(texts)
        flush(aside)
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error


def add_line(path: Path, text: str) -> None:
    """Adds a line to a file for a process that nobody listens to; where the disk is full, it is not told."""
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        with open(path, "a") as lines:
            lines.write(f"{text}\n")


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
        self.offset, self.inode = self._size_and_inode()
        self.partial = ""
        self.taken_back = False
        """The file was shorter than before when it was looked at last, or written anew, and is read from its start
        again."""

    def new_lines(self) -> list[str]:
        """Whole lines that have not been seen."""
        size, inode = self._size_and_inode()
        self.taken_back = size < self.offset or (self.offset > 0 and inode != self.inode)
        self.inode = inode
        if self.taken_back:
            self.offset, self.partial = 0, ""
        if size == self.offset:
            return []
        with open(self.path) as file:
            file.seek(self.offset)
            *lines, self.partial = (self.partial + file.read()).split("\n")
            self.offset = file.tell()
        return lines

    def _size_and_inode(self) -> tuple[int, int]:
        """Of the file; zeros where there is none."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return 0, 0
        return found.st_size, found.st_ino
