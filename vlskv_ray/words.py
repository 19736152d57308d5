"""How texts from elsewhere, sizes, times, counts and paths are written for people."""

from collections.abc import Collection, Sequence
from pathlib import Path


def printable(text: str) -> str:
    """A text on one line of a terminal: what would steer it, such as an escape sequence, is written out."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def printable_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def shorten(text: str, most: int) -> str:
    """A text of at most so many characters: what is beyond is cut off and its length told."""
    if len(text) <= most:
        return text
    mark = f"… (of {len(text):,} characters)"
    return text[: max(most - len(mark), 1)].rstrip() + mark


def plural(count: int | str, word: str) -> str:
    """1 trial, 2 trials; 2 processes."""
    ending = "" if str(count) == "1" else "es" if word.endswith("s") else "s"
    return f"{count} {word}{ending}"


def short_path(path: Path) -> Path:
    """A path as a person here would write it."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # deleted meanwhile, which is no reason to fail
        return path
    return path.relative_to(here) if path.is_relative_to(here) else path


def format_duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_bytes(count: float) -> str:
    """Bytes as GiB, or MiB where it is less."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def terminal_table(rows: Sequence[Sequence[str]], to_the_right: Collection[int] = ()) -> list[str]:
    """Lines of a table in columns, the first row being their titles.

    Args:
        rows: a text for each column.
        to_the_right: which columns, from 0, stand at the right of theirs.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.rjust if number in to_the_right else str.ljust for number in range(len(widths))]
    return ["  ".join(map(lambda pad, text, width: pad(text, width), pads, row, widths)).rstrip() for row in rows]
