"""From a sample to token ids, labels and pixels, by the model's own chat template, tokenizer and image processor."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from vlskv_ray.data.collate import IGNORE_INDEX, Encoded
from vlskv_ray.data.images import load_image
from vlskv_ray.data.sample import Rejected, Sample
from vlskv_ray.data.templates import render, spans_by_prefixes, texts_of, write
from vlskv_ray.data.tokens import fewest_tokens, tokenise


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
    _check_size(sample, processor.tokenizer, limits.max_length)
    rendering = render(processor, sample.messages)
    tiles, image_sizes, placeholders = _preprocess(sample, processor, limits.image_processing_batch_size)
    input_ids, offsets, answers = tokenise(processor, rendering, placeholders)

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
    labels = _labels(input_ids, offsets, answers)
    if not (labels != IGNORE_INDEX).any():
        raise Rejected("no_answer", "no token of an answer is left to learn from")
    return Encoded(sample.uid, input_ids, labels, tiles, image_sizes, _normalisation(processor.image_processor))


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
