"""From a sample to token ids, labels and pixels, by the model's own chat template, tokenizer and image processor."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vlskv_ray.data.collate import IGNORE_INDEX, Encoded
from vlskv_ray.data.images import load_image
from vlskv_ray.data.labels import labels_of
from vlskv_ray.data.sample import Rejected, Sample
from vlskv_ray.data.templates import Span, render, texts_of
from vlskv_ray.data.tokens import Ids, fewest_tokens, tokenise
from vlskv_ray.model.wrappers import ImageInputs, Wrapper, wrapper_of


@dataclass(frozen=True)
class Limits:
    """What a sample may be at most; one that is more is left out whole."""

    max_length: int = 2048
    """Tokens, those of images included."""
    max_images_per_sample: int = 8
    image_processing_batch_size: int = 4
    """Images decoded and preprocessed at once, so held in memory at full size."""
    is_of_model: bool = False
    """`max_length` is what the model has positions for, and not what a config says."""

    @property
    def longest(self) -> str:
        """`max_length`, for a reader."""
        return f"the model's {self.max_length} positions" if self.is_of_model else f"data.max_length={self.max_length}"


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
    input_ids, offsets, answers, images = _tokens_of(sample, processor, config, limits)
    labels = labels_of(input_ids, offsets, answers)
    if not (labels != IGNORE_INDEX).any():
        raise Rejected("no_answer", "no token of an answer is left to learn from")
    return Encoded(sample.uid, input_ids, labels, images)


def encode_prompt(sample: Sample, processor: Any, config: Any, limits: Limits) -> Encoded:
    """A conversation that ends with a question, up to where its answer begins; no label counts.

    Args and Raises as of `encode`.
    """
    input_ids, _, _, images = _tokens_of(sample, processor, config, limits, add_generation_prompt=True)
    return Encoded(sample.uid, input_ids, np.full_like(input_ids, IGNORE_INDEX), images)


def _tokens_of(
    sample: Sample, processor: Any, config: Any, limits: Limits, *, add_generation_prompt: bool = False
) -> tuple[Ids, Ids, list[Span], list[ImageInputs]]:
    """Token ids of a sample, the characters of each, the spans of the answers in those, and its images. Rejected as of
    `encode`."""
    if len(sample.images) > limits.max_images_per_sample:
        raise Rejected(
            "too_many_images",
            f"{len(sample.images)} images, more than data.max_images_per_sample={limits.max_images_per_sample}",
        )
    _check_size(sample, processor.tokenizer, limits)
    rendering = render(processor, sample.messages, add_generation_prompt=add_generation_prompt)
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
            f"{len(input_ids)} tokens, {num_placeholders} of them of images, more than {limits.longest}",
        )
    return input_ids, offsets, answers, images


def _check_size(sample: Sample, tokenizer: Any, limits: Limits) -> None:
    """Rejected (`text_cap`) if the texts cannot fit, told without making anything of them."""
    texts, max_length = texts_of(sample.messages), limits.max_length
    characters = sum(map(len, texts))
    if len(sample.messages) > max_length:
        what = f"{len(sample.messages)} messages, of a token each at least"
    elif characters > LONG_FOR_A_TOKEN * max_length and (fewest := fewest_tokens(tokenizer, texts)) > max_length:
        what = f"{characters} characters of text, {fewest} tokens at least"
    else:
        return
    raise Rejected("text_cap", f"{what}, more than {limits.longest}")


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
