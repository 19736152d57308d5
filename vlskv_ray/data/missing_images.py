"""For a picture that is not there: the one which the row may have meant, written in another way."""

import functools
import os
import unicodedata
from pathlib import Path
from urllib.parse import unquote

_MOST_NAMES = 20_000  # of a folder that are looked at
_MOST_PARTS = 32  # of a path


def nearest_to(path: str, root: str) -> str:
    """What is there instead of a missing file, in words; empty where nothing like it is.

    Args:
        path: as the row has it.
        root: the folder that it leads from, resolved; nothing outside it is looked at.
    """
    as_written = {
        "": path,
        "with slashes for the backslashes of Windows": path.replace("\\", "/"),
        "with its %-escapes decoded": unquote(path),
        "with its %-escapes decoded and slashes for backslashes": unquote(path).replace("\\", "/"),
    }
    for how, meant in as_written.items():
        if how and meant == path:
            continue
        found, differs = _found(meant, root)
        if found:
            return f"{found!r} is there{', ' if how or differs else ''}{' and '.join(filter(None, (how, differs)))}"
    if path[1:3] == ":\\" or path.startswith("\\\\"):
        return "it is a path of Windows; wanted one relative to image_root, with slashes"
    return ""


def _found(path: str, root: str) -> tuple[str, str]:
    """The path of a file below `root` like this one, and how its name differs; empty where there is none."""
    parts = Path(os.path.relpath(os.path.join(root, path), root) if "\0" not in path else "").parts
    here, differs = root, ""
    for depth, part in enumerate(parts[:_MOST_PARTS], 1):
        if part == "..":
            return "", ""
        if not os.path.lexists(os.path.join(here, part)):
            name, how = _like(part, here, is_file=depth == len(parts))
            if not name:
                return "", ""
            part, differs = name, how
        here = os.path.join(here, part)
    is_inside = Path(os.path.realpath(here)).is_relative_to(root)
    return (os.path.relpath(here, root), differs) if is_inside and os.path.isfile(here) else ("", "")


def _like(name: str, folder: str, is_file: bool) -> tuple[str, str]:
    """A name in a folder like this one, and how it differs."""
    by_key, by_stem = _names(folder)
    if found := by_key.get(_key(name)):
        in_another_form = unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", name)
        form = "NFD" if unicodedata.is_normalized("NFD", found) else "NFC"
        return found, f"in another Unicode form ({form})" if in_another_form else "in another case"
    if is_file and (found := by_stem.get(_key(os.path.splitext(name)[0]))):
        return found, "with another suffix"
    return "", ""


@functools.lru_cache(maxsize=4)  # many rows name files of one folder
def _names(folder: str) -> tuple[dict[str, str], dict[str, str]]:
    """The names in a folder, by their keys and by those of their stems."""
    by_key: dict[str, str] = {}
    by_stem: dict[str, str] = {}
    try:
        with os.scandir(folder) as entries:
            for entry, _ in zip(entries, range(_MOST_NAMES), strict=False):
                by_key.setdefault(_key(entry.name), entry.name)
                by_stem.setdefault(_key(os.path.splitext(entry.name)[0]), entry.name)
    except OSError:  # no folder, or one that may not be read: nothing is known
        return {}, {}
    return by_key, by_stem


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
