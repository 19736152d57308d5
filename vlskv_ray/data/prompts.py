"""Rows that a model is to answer, and what is written of them: rows again, with the answers in their place."""

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlskv_ray.data.image_columns import IMAGE_COLUMNS
from vlskv_ray.data.images import read_image_file
from vlskv_ray.data.rows import IMAGE_PARTS, MARKER
from vlskv_ray.data.sample import ImageFile, Sample
from vlskv_ray.data.sources import Source


@dataclass(frozen=True)
class Prompts:
    """The rows of some sources, counted from 0 through all of them. Small: it travels to workers."""

    sources: tuple[Source, ...]
    counts: tuple[int, ...]
    """How many rows of each, from its first."""
    replace: bool = False
    """Rows that end with an answer are answered anew; otherwise they stay as they are."""
    system: str | None = None
    """A system turn for the prompts that have none."""

    @property
    def num_rows(self) -> int:
        return sum(self.counts)

    def uid(self, number: int) -> str:
        source, row = self._locate(number)
        return source.uid(row)

    def read(self, number: int) -> tuple[Sample, bool]:
        """A row's conversation, and whether it is to be answered: then it ends with the question.

        Raises:
            Rejected: the row cannot be used.
        """
        sample, is_asked = self._read_own_turns(number)
        system = [{"role": "system", "content": [{"type": "text", "text": self.system}]}]
        messages = [*(system if is_asked and self._adds_system(sample) else []), *sample.messages]
        return replace(sample, messages=messages), is_asked

    def written(self, number: int, answer: dict[str, Any] | None, root: Path | None) -> dict[str, Any]:
        """A row as it is written: as its file has it where JSON can say that, with the answer as its last turn.

        Args:
            number: of the row.
            answer: the turn; None for a row that stays as it is.
            root: the folder that image paths are to be relative to; None: pictures are written into the row.

        Raises:
            Rejected: the row cannot be used.
        """
        source, row = self._locate(number)
        sample, is_asked = self._read_own_turns(number)
        columns = source.columns(row)
        row_id = {"id": sample.uid if columns.get("id") is None else columns["id"]}  # first, for a reader
        answered = [] if answer is None else [answer]
        system = [{"role": "system", "content": self.system}] if is_asked and self._adds_system(sample) else []
        is_messages = source.layout is not None and source.layout.name == "messages"
        if is_messages and source.roots in ((), (root,)) and is_json(columns):
            turns = columns["messages"][: len(sample.messages)]
            return row_id | columns | row_id | {"messages": [*system, *turns, *answered]}
        read = () if source.layout is None else source.layout.columns
        beside = {name: value for name, value in columns.items() if name not in read and is_json(value)}
        turns = [turn_as_json(message) for message in sample.messages]
        images = {"images": [picture_as_text(image, root) for image in sample.images]} if sample.images else {}
        return row_id | beside | row_id | {"messages": [*system, *turns, *answered]} | images

    def _read_own_turns(self, number: int) -> tuple[Sample, bool]:
        """Likewise `read`, without a system turn that the row does not have."""
        source, row = self._locate(number)
        sample = source.read(row, prompt=True)
        if sample.messages[-1]["role"] == "user":
            return sample, True
        return replace(sample, messages=sample.messages[:-1]) if self.replace else sample, self.replace

    def _adds_system(self, sample: Sample) -> bool:
        return self.system is not None and sample.messages[0]["role"] != "system"

    def _locate(self, number: int) -> tuple[Source, int]:
        """The source of a row, and its number there."""
        for source, count in zip(self.sources, self.counts, strict=True):
            if number < count:
                return source, number
            number -= count
        raise IndexError(number)


def common_root(sources: Sequence[Source]) -> Path | None:
    """The folder that image paths of several sources can all be relative to; None where there is none but that of the
    whole machine, which no data should be allowed to read."""
    roots = {root for source in sources for root in source.roots}
    if not roots:
        return None
    common = Path(os.path.commonpath(roots))
    return common if common in roots or common != Path(common.anchor) else None


def has_pictures(row: Mapping[str, Any]) -> bool:
    """Whether a row as it is written names pictures, in a column or in the parts of its turns."""
    contents = [turn["content"] for turn in row["messages"] if isinstance(turn["content"], list)]
    parts = [part for content in contents for part in content if isinstance(part, dict)]
    return any(part.get("type") in IMAGE_PARTS for part in parts) or any(row.get(name) for name in IMAGE_COLUMNS)


def is_json(value: Any) -> bool:
    """Whether JSON can say it: no bytes, no numbers that are none."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def turn_as_json(message: dict[str, Any]) -> dict[str, Any]:
    """A turn of a `Sample` as rows have them."""
    content: Any = message["content"]
    if len(content) == 1 and content[0]["type"] == "text" and MARKER not in content[0]["text"]:
        content = content[0]["text"]
    return {"role": message["role"], "content": content} | ({"finish_reason": "length"} if message.get("cut") else {})


def picture_as_text(image: bytes | ImageFile, root: Path | None) -> str:
    """The path of a picture, or a data URI that holds it.

    Args:
        image: as a `Sample` has it.
        root: what the path is to be relative to; None: always a data URI.

    Raises:
        Rejected: it cannot be read, where it has to be.
    """
    if isinstance(image, ImageFile):
        if image.path[:5].lower() == "data:":
            return image.path
        if root is not None and image.root is not None:
            return image.path if image.root == root else os.path.join(os.path.relpath(image.root, root), image.path)
        image = read_image_file(image.path, image.root)
    return "data:image;base64," + base64.b64encode(image).decode()
