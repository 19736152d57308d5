"""One training sample before any decoding or tokenising, and the reasons for which a row cannot become one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


class SourceError(ValueError):
    """A source that cannot be used: names the file and the place, what was wanted, and the remedy."""


class Rejected(ValueError):
    """A row that cannot be used: the caller leaves it out and counts it by `code`; its neighbours are unharmed."""

    def __init__(self, code: str, detail: str) -> None:
        """
        Args:
            code: short snake_case reason, the same for every row of its kind, such as `image_truncated`.
            detail: one line for a reader: what was found, what was wanted and the remedy.
        """
        super().__init__(code, detail)  # both in `args`, so that the exception survives pickling
        self.code = code
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


class Refused(Rejected):
    """A row that asks for a file or an address which data may not open. Never merely skipped: see data/images.py."""


@dataclass(frozen=True)
class ImageFile:
    """An image named by a row and not read yet, so that only few images are held at once.

    `path` is as the row has it, so not to be trusted; `root` is the only folder it may lead into (None: no folder).
    """

    path: str
    root: Path | None


@dataclass(frozen=True)
class Sample:
    """A conversation and its images.

    `messages` are `{"role": "system" | "user" | "assistant", "content": [part, ...]}`, a part being
    `{"type": "text", "text": str}` or `{"type": "image"}`. `images` (encoded bytes, or a file to read) are in the order
    of the image parts and equally many. `kinds` names what kind of question each assistant turn answers, for
    evaluation; empty where the data do not say.
    """

    uid: str
    messages: list[dict[str, Any]]
    images: list[bytes | ImageFile]
    kinds: tuple[str, ...] = ()
