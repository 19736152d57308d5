"""From a sample to token ids, labels and pixels, by the model's own chat template, tokenizer and image processor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlskv_ray.data.collate import IGNORE_INDEX, Encoded
from vlskv_ray.data.images import load_image
from vlskv_ray.data.sample import Rejected, Sample
from vlskv_ray.data.templates import render, spans_by_prefixes, texts_of, write
from vlskv_ray.data.tokens import fewest_tokens, tokenise
from vlskv_ray.model.wrappers import ImageInputs, Wrapper, wrapper_of


@dataclass(frozen=True)
class Limits:
    """What a sample may be at most; one that is more is left out whole."""

    max_length: int = 2048
    """Tokens, those of images included."""
    max_images_per_sample: int = 8
    image_processing_batch_size: int = 4
    """Images decoded and preprocessed at once, so held in memory at full size."""


LONG_FOR_A_TOKEN = 16
"""Characters; texts shorter than so many a token are cheaply tokenised, whether they fit or not."""


def encode(sample: Sample, processor: Any, config: Any, limits: Limits) -> Encoded:
    """A sample ready for the model.

    Args:
        sample: see `Sample`.
        processor: the model's own.
        config: the model's.
        limits: what the sample may be at most.

    Raises:
        Rejected: the sample does not fit, or an image cannot be used; nothing of it is ever cut off.
    """
    if len(sample.images) > limits.max_images_per_sample:
        raise Rejected(
            "too_many_images",
            f"{len(sample.images)} images, more than data.max_images_per_sample={limits.max_images_per_sample}",
        )
    _check_size(sample, processor.tokenizer, limits.max_length)
    rendering = render(processor, sample.messages)
    wrapper = wrapper_of(config.model_type)
    images, placeholders, shapes = _prepare_images(wrapper, sample, processor, limits.image_processing_batch_size)
    input_ids, offsets, answers = tokenise(processor, rendering, placeholders)

    num_features = sum(wrapper.num_features(config, image.sizes) for image in images)
    num_placeholders = int((input_ids == processor.image_token_id).sum())
    if num_placeholders != num_features:
        raise Rejected(
            "placeholder_mismatch",
            f"the processor writes {num_placeholders} image tokens, the model makes {num_features} features of images "
            f"of (height, width) {shapes}",
        )
    if len(input_ids) > limits.max_length:
        code = "too_long_image" if num_placeholders >= limits.max_length else "too_long"
        raise Rejected(
            code,
            f"{len(input_ids)} tokens, {num_placeholders} of them of images, more than "
            f"data.max_length={limits.max_length}",
        )
    labels = _labels(input_ids, offsets, answers)
    if not (labels != IGNORE_INDEX).any():
        raise Rejected("no_answer", "no token of an answer is left to learn from")
    return Encoded(sample.uid, input_ids, labels, images)


def _check_size(sample: Sample, tokenizer: Any, max_length: int) -> None:
    """Rejected (`text_cap`) if the texts cannot fit, told without making anything of them."""
    texts = texts_of(sample.messages)
    characters = sum(map(len, texts))
    if len(sample.messages) > max_length:
        what = f"{len(sample.messages)} messages, of a token each at least"
    elif characters > LONG_FOR_A_TOKEN * max_length and (fewest := fewest_tokens(tokenizer, texts)) > max_length:
        what = f"{characters} characters of text, {fewest} tokens at least"
    else:
        return
    raise Rejected("text_cap", f"{what}, more than data.max_length={max_length}")


def _prepare_images(
    wrapper: Wrapper, sample: Sample, processor: Any, at_once: int
) -> tuple[list[ImageInputs], list[str], list[tuple[int, int]]]:
    """Inputs, placeholder texts, and height and width of a sample's images, of which `at_once` are held decoded."""
    prepared: list[ImageInputs] = []
    placeholders: list[str] = []
    shapes: list[tuple[int, int]] = []
    for start in range(0, len(sample.images), at_once):
        images = [load_image(image) for image in sample.images[start : start + at_once]]
        inputs, texts = wrapper.prepare_images(processor, images)
        prepared += inputs
        placeholders += texts
        shapes += [(image.height, image.width) for image in images]
    return prepared, placeholders, shapes


def _labels(
    input_ids: NDArray[np.int64], offsets: NDArray[np.int64], spans: Sequence[tuple[int, int]]
) -> NDArray[np.int64]:
    """`input_ids` where a token overlaps a span, IGNORE_INDEX elsewhere."""
    starts, ends = np.asarray(spans, dtype=np.int64).reshape(-1, 2).T
    ended, begun = np.searchsorted(ends, offsets[:, 0], "right"), np.searchsorted(starts, offsets[:, 1], "left")
    return np.where(begun > ended, input_ids, IGNORE_INDEX)


def check_template(processor: Any) -> list[str]:
    """Tries the processor's chat template on conversations as data have them.

    Returns:
        what a reader should know of it: which rows it does not take, and which it writes in another order.

    Raises:
        ValueError: labels cannot be placed with it.
    """
    if not processor.tokenizer.is_fast:
        kind = type(processor.tokenizer).__name__
        raise ValueError(
            f"the model's tokenizer ({kind}) does not say which characters a token is of, which labels need; "
            f"wanted one with a tokenizer.json"
        )
    turns = ("What is this?", "A circle.", "Which colour?", "Red.")
    try:
        messages = _conversation(*turns, images=1)
        spans_by_prefixes(processor, messages, write(processor, messages))
        rendering = render(processor, messages)
    except Rejected as reason:
        raise ValueError(reason.detail) from reason
    for (start, end), answer in zip(rendering.answers, turns[1::2], strict=True):
        if answer not in rendering.text[start:end]:
            shown = repr(rendering.text)
            raise ValueError(f"the model's chat template does not render an answer as given: {shown}")
    notices = []
    for what, messages in _less_usual(turns):
        try:
            rendering = render(processor, messages)
        except Rejected as reason:
            notices.append(f"rows with {what} will be left out: {reason.detail}")
            continue
        if rendering.moves_images:
            notices.append(f"rows with {what} are learnt as the model's chat template has them: the images first")
    return notices


def _less_usual(turns: Sequence[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Conversations that not every template takes, and what they have."""
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    yield "a system turn", [system, *_conversation(*turns, images=1)]
    yield "several images", _conversation(*turns, images=2)
    between = _conversation(*turns, images=1)
    between[0]["content"].insert(0, {"type": "text", "text": "Look at this: "})
    yield "an image after a text", between


def _conversation(*turns: str, images: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(turns)
    ]
    messages[0]["content"] = [{"type": "image"} for _ in range(images)] + messages[0]["content"]
    return messages
