"""From a sample to token ids, labels and pixels, by the model's own chat template, tokenizer and image processor."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from vlskv_ray.data.collate import IGNORE_INDEX, Encoded
from vlskv_ray.data.images import load_image
from vlskv_ray.data.sample import Rejected, Sample


@dataclass(frozen=True)
class Limits:
    """What a sample may be at most; one that is more is left out whole."""

    max_length: int = 2048
    """Tokens, those of images included."""
    max_images_per_sample: int = 8
    image_processing_batch_size: int = 4
    """Images decoded and preprocessed at once, so held in memory at full size."""


def render(processor: Any, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the character spans of the assistant's turns, their end-of-turn tokens included.

    Spans come of rendering prefixes: turn i begins where the text of the messages before it ends (after the words that
    open an assistant's turn) and ends where the text of the messages up to it does. Where a template closes the last
    answer with no special token, the end-of-sequence token is added: a student must learn where to stop.

    Raises:
        ValueError: the template refuses the conversation, or rewrites earlier turns as later ones come, so that no span
            can be told.
    """

    def text_of(count: int, **options: Any) -> str:
        try:
            return processor.apply_chat_template(messages[:count], tokenize=False, **options) if count else ""
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError) as error:  # what templates do
            raise ValueError(f"the model's chat template does not take this conversation: {error}") from error

    full, spans = text_of(len(messages)), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, opened, upto = text_of(i), text_of(i, add_generation_prompt=True), text_of(i + 1)
        if not full.startswith(upto) or not upto.startswith(before):
            raise ValueError(
                f"the model's chat template writes message {i + 1} of a conversation differently once others follow "
                f"({upto[-80:]!r} is not the beginning of the whole); labels cannot be placed with such a template"
            )
        spans.append((max(len(before), len(os.path.commonprefix([full, opened]))), len(upto)))
    tokenizer = processor.tokenizer
    start, end = spans[-1]
    closing_tokens = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]
    if end == len(full) and tokenizer.eos_token and not any(token in full[start:] for token in closing_tokens):
        full += tokenizer.eos_token
        spans[-1] = (start, len(full))
    return full, spans


def num_image_features(config: Any, image_size: tuple[int, int]) -> int:
    """How many features a LLaVA-NeXT makes of an image (height, width), by the model's own arithmetic on shapes."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    rows, columns = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, vision.image_size)
    height, width = unpad_image(torch.empty(1, rows * side, columns * side, device="meta"), image_size).shape[1:]
    whole = side * side  # a feature for each patch: a class token has no place in the grid of the tiles
    return whole + height * (width + 1)  # each row of the grid ends in a newline


def encode(sample: Sample, processor: Any, num_features: Callable[[tuple[int, int]], int], limits: Limits) -> Encoded:
    """A sample ready for the model.

    Args:
        sample: see `Sample`.
        processor: a stock LLaVA-NeXT processor.
        num_features: how many features the model makes of an image (height, width).
        limits: what the sample may be at most.

    Raises:
        Rejected: the sample does not fit, or an image cannot be used; nothing of it is ever cut off.
    """
    if len(sample.images) > limits.max_images_per_sample:
        raise Rejected(
            "too_many_images",
            f"{len(sample.images)} images, more than data.max_images_per_sample={limits.max_images_per_sample}",
        )
    for message in sample.messages:
        for part in message["content"]:
            if part["type"] == "text" and processor.image_token in part["text"]:
                raise Rejected(
                    "text_special", f"a text holds {processor.image_token!r}, which the model would take for an image"
                )
    try:
        text, spans = render(processor, sample.messages)
    except ValueError as error:
        raise Rejected("chat_template", str(error)) from error
    if text.count(processor.image_token) != len(sample.images):
        written = text.count(processor.image_token)
        raise Rejected(
            "marker_mismatch", f"the chat template writes {written} image tokens for {len(sample.images)} images"
        )
    tiles, image_sizes, placeholders = _preprocess(sample, processor, limits.image_processing_batch_size)
    (expanded,), (offsets,) = processor.get_text_with_replacements([text], placeholders)
    encoding = processor.tokenizer(
        expanded,
        add_special_tokens=not text.startswith(processor.tokenizer.bos_token or "\0"),
        return_offsets_mapping=True,
    )
    input_ids = np.asarray(encoding["input_ids"], dtype=np.int64)

    features = [num_features(size) for size in image_sizes]
    num_placeholders = int((input_ids == processor.image_token_id).sum())
    if num_placeholders != sum(features):
        raise Rejected(
            "placeholder_mismatch",
            f"the processor writes {num_placeholders} image tokens, the model makes {sum(features)} features of images "
            f"of (height, width) {image_sizes}",
        )
    if len(input_ids) > limits.max_length:
        code = "too_long_image" if num_placeholders >= limits.max_length else "too_long"
        raise Rejected(
            code,
            f"{len(input_ids)} tokens, {num_placeholders} of them of images, more than "
            f"data.max_length={limits.max_length}",
        )
    labels = _labels(input_ids, encoding["offset_mapping"], [_shift(span, offsets) for span in spans])
    if not (labels != IGNORE_INDEX).any():
        raise Rejected("no_answer", "no token of an answer is left to learn from")
    return Encoded(sample.uid, input_ids, labels, tiles, image_sizes, _normalisation(processor.image_processor))


def _preprocess(
    sample: Sample, processor: Any, at_once: int
) -> tuple[list[NDArray[np.uint8]], list[tuple[int, int]], list[str]]:
    """Tiles, sizes and placeholder texts of a sample's images, of which only `at_once` are held decoded.

    The stock processor, without its last two steps, which `_normalisation` describes: tiles stay bytes. Nor does it
    resize and crop tiles that are of the right size already.
    """
    image_processor = processor.image_processor
    options = {"do_pad": False, "do_rescale": False, "do_normalize": False}
    size, crop = image_processor.size, image_processor.crop_size
    if crop and size.shortest_edge == crop.height == crop.width:  # as it cuts them
        options |= {"do_resize": False, "do_center_crop": False}
    all_tiles: list[NDArray[np.uint8]] = []
    image_sizes: list[tuple[int, int]] = []
    placeholders: list[str] = []
    for start in range(0, len(sample.images), at_once):
        images = [load_image(image) for image in sample.images[start : start + at_once]]
        processed = image_processor(images, input_data_format="channels_last", **options)
        all_tiles += [np.ascontiguousarray(tiles) for tiles in processed["pixel_values"]]
        image_sizes += [(int(height), int(width)) for height, width in processed["image_sizes"]]
        placeholders += [processor.replace_image_token(processed, image_idx=i) for i in range(len(images))]
    return all_tiles, image_sizes, placeholders


def _normalisation(image_processor: Any) -> NDArray[np.float32]:
    """[2, 3]: what a stock image processor multiplies each channel of a byte by, and then adds."""
    scale, shift = np.ones(3), np.zeros(3)
    if image_processor.do_rescale:
        scale *= image_processor.rescale_factor
    if image_processor.do_normalize:
        deviation = np.asarray(image_processor.image_std)
        scale, shift = scale / deviation, -np.asarray(image_processor.image_mean) / deviation
    return np.stack(np.broadcast_arrays(scale, shift)).astype(np.float32)


def _shift(span: tuple[int, int], offsets: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """A character span of the text after every placeholder before its ends has been expanded."""

    def moved(position: int) -> int:
        gained = [o["new_span"][1] - o["span"][1] for o in offsets if o["span"][1] <= position]
        return position + (gained[-1] if gained else 0)

    return moved(span[0]), moved(span[1])


def _labels(
    input_ids: NDArray[np.int64], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> NDArray[np.int64]:
    """`input_ids` where a token overlaps a span, IGNORE_INDEX elsewhere."""
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    supervised = np.zeros(len(input_ids), dtype=bool)
    for start, end in spans:
        supervised |= (starts < end) & (ends > start)
    return np.where(supervised, input_ids, IGNORE_INDEX)


def check_template(processor: Any) -> None:
    """ValueError if labels cannot be placed with the processor's chat template; tried on two turns about an image."""
    turns = [("user", "What is this?"), ("assistant", "A circle."), ("user", "Which colour?"), ("assistant", "Red.")]
    messages: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns
    ]
    messages[0]["content"].insert(0, {"type": "image"})
    text, spans = render(processor, messages)
    for (start, end), answer in zip(spans, ("A circle.", "Red."), strict=True):
        if answer not in text[start:end]:
            raise ValueError(f"the model's chat template does not render an assistant's text as given: {text!r}")
