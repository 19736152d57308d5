"""One training sample before any decoding or tokenising, and the reasons for which a row cannot become one."""

from collections.abc import Iterable, Mapping
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
    """A row that asks for a file or an address which data may not open: it stops a run, unless data.on_refused=skip."""


def left_out(uid: str, reason: Rejected) -> dict[str, Any]:
    """What is told of a row that is left out: `id`, `reason` and `detail`, and `refused` where it is."""
    told = {"id": uid, "reason": reason.code, "detail": reason.detail}
    return told | {"refused": True} if isinstance(reason, Refused) else told


def refused_message(rows: Iterable[Mapping[str, Any]], on_refused: str, option: str = "data.on_refused=skip") -> str:
    """Why the first refused one of some `left_out` rows ends a run, and by which option it goes on; empty where none
    does."""
    row = next((row for row in rows if row.get("refused")), None)
    if row is None or on_refused == "skip":
        return ""
    return (
        f"{row['id']}: {row['reason']}: {row['detail']}. Data that ask for what they may not open are not to be "
        f"trusted as they are; mend them, or {option} leaves such rows out and goes on"
    )


@dataclass(frozen=True)
class Notice:
    """What was changed in a row that is used: a short reason, the same for every row of its kind, and one line."""

    reason: str
    detail: str

    def to_json(self, uid: str) -> dict[str, str]:
        """As it is told of the row with this uid, see `left_out`."""
        return {"id": uid, "reason": self.reason, "detail": self.detail}


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
    `{"type": "text", "text": str}` or `{"type": "image"}`; an answer that was cut has `"cut": True`, and its end is not
    learnt. `images` (encoded bytes, or a file to read) are in the order
    of the image parts and equally many. `kinds` names what kind of question each assistant turn answers, for
    evaluation; empty where the data do not say. `notices` tell what was changed in it.
    """

    uid: str
    messages: list[dict[str, Any]]
    images: list[bytes | ImageFile]
    kinds: tuple[str, ...] = ()
    notices: tuple[Notice, ...] = ()
