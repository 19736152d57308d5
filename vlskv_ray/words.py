"""How texts from elsewhere, sizes, times, counts and paths are written for people."""

from pathlib import Path


def printable(text: str) -> str:
    """A text on one line of a terminal: what would steer it, such as an escape sequence, is written out."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def printable_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def plural(count: int, word: str) -> str:
    """1 trial, 2 trials."""
    return f"{count} {word}{'s' * (count != 1)}"


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
