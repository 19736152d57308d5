"""Held-out samples as questions: each turn of the assistant is one, and what comes before it is the prompt."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlskv_ray.data.chat import Limits, encode
from vlskv_ray.data.collate import IGNORE_INDEX, Encoded
from vlskv_ray.data.plan import Table, first_of_mixture
from vlskv_ray.data.sample import Rejected, Sample, left_out
from vlskv_ray.data.sources import Source
from vlskv_ray.model.wrappers import wrapper_of


@dataclass(frozen=True)
class HeldOut:
    """The first samples of a mixture, and how they are prepared and answered. Small: it travels to the workers."""

    sources: tuple[Source, ...]
    num_samples: int | None
    limits: Limits
    batch_size: int = 32
    max_new_tokens: int = 64

    def rows(self) -> list[tuple[int, int]]:
        """Source and row of each sample."""
        tables = [Table(source.num_rows, source.weight) for source in self.sources]
        count = sum(table.rows for table in tables) if self.num_samples is None else self.num_samples
        return [(k, row) for k, table in enumerate(first_of_mixture(tables, count)) for row in range(table.rows)]


@dataclass(frozen=True)
class Question:
    """An assistant's turn to be answered: what comes before it in the conversation is the prompt."""

    id: str
    place: tuple[int, int]
    """Source and row of its sample."""
    kind: str
    """As the data have it; empty where they do not say."""
    text: str
    """What the user asked."""
    sample: Encoded
    """The whole conversation."""
    start: int
    stop: int
    """The answer among the sample's tokens, the token that ends it included."""
    num_images: int
    """How many of the sample's images come before the answer."""

    @property
    def answer_ids(self) -> list[int]:
        ids: list[int] = self.sample.input_ids[self.start : self.stop].tolist()
        return ids


def read_questions(
    held_out: HeldOut, places: Sequence[tuple[int, int]], processor: Any, config: Any
) -> tuple[list[Question], Counter[str], list[dict[str, Any]]]:
    """The questions of these samples, how many samples cannot be used, by reason, and what is told of each of those."""
    questions: list[Question] = []
    reasons: Counter[str] = Counter()
    rejected: list[dict[str, Any]] = []
    for k, row in places:
        try:
            sample = held_out.sources[k].read(row)
            encoded = encode(sample, processor, config, held_out.limits)
        except Rejected as reason:
            reasons[reason.code] += 1
            rejected.append(left_out(held_out.sources[k].uid(row), reason))
            continue
        questions += questions_of(sample, encoded, (k, row), config)
    return questions, reasons, rejected


def questions_of(sample: Sample, encoded: Encoded, place: tuple[int, int], config: Any) -> list[Question]:
    """One for each assistant turn; turns show in the labels as runs of tokens that count."""
    counts = np.pad(encoded.labels != IGNORE_INDEX, 1)
    edges = np.flatnonzero(counts[1:] != counts[:-1])
    texts = [
        _text(before) for before, turn in zip(sample.messages, sample.messages[1:], strict=False) if _answers(turn)
    ]
    spans = edges.reshape(-1, 2).tolist()
    if len(spans) != len(texts):  # turns side by side, or one without a token: then what was asked cannot be told
        texts = [""] * len(spans)
    kinds = sample.kinds if len(sample.kinds) == len(spans) else ("",) * len(spans)
    num_features = wrapper_of(config.model_type).num_features
    through = np.cumsum([num_features(config, image.sizes) for image in encoded.images])  # up to each image's end
    questions = []
    for i, ((start, stop), text, kind) in enumerate(zip(spans, texts, kinds, strict=True)):
        image_tokens = int((encoded.input_ids[:start] == config.image_token_id).sum())
        name = sample.uid if len(spans) == 1 else f"{sample.uid}#{i + 1}"
        num_images = int((through <= image_tokens).sum())
        questions.append(Question(name, place, kind, text, encoded, start, stop, num_images))
    return questions


def _answers(message: dict[str, Any]) -> bool:
    return bool(message["role"] == "assistant")


def _text(message: dict[str, Any]) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")
