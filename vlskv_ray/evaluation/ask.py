"""Asks a model a question about images, greedily answered and timed."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TextStreamer
from transformers.generation import BaseStreamer

from vlskv_ray.data.collate import IGNORE_INDEX, Encoded, collate
from vlskv_ray.data.images import load_image
from vlskv_ray.data.sample import ImageFile, Rejected
from vlskv_ray.data.templates import render
from vlskv_ray.data.tokens import tokenise
from vlskv_ray.model.swiftkv import swiftkv_backbone
from vlskv_ray.model.wrappers import wrapper_of
from vlskv_ray.words import terminal_table


@dataclass(frozen=True)
class Answer:
    """What a model answered, and how fast."""

    text: str
    num_tokens: int
    """Those that were generated, the one that ends the turn included."""
    first_token_seconds: float
    """From prepared inputs to the first token: vision tower and prefill, without decoding and resizing images."""
    tokens_per_second: float | None
    """Of the tokens after the first; None where there are none."""


def open_image(path: str) -> Image.Image:
    """The image at a path from the command line, which may lie anywhere. ValueError where it cannot be used."""
    file = Path(os.path.realpath(path))
    if not file.exists():
        raise ValueError(f"--image: there is no file {path!r}")
    try:
        return load_image(ImageFile(str(file), root=file.parent))
    except Rejected as error:
        raise ValueError(f"--image: {path}: {error.detail}") from error


def read_question(
    config: Any, processor: Any, prompt: str, images: Sequence[Image.Image]
) -> tuple[dict[str, torch.Tensor], int]:
    """A question about images, as the inputs of the model's `generate`.

    Args:
        config: the model's.
        processor: the model's.
        prompt: the question.
        images: RGB, shown before it.

    Returns:
        the inputs, and the number of tokens that the model has positions left for.

    Raises:
        ValueError: the model cannot be asked this; says which option is to be changed.
    """
    if not prompt.strip():
        raise ValueError("--prompt: is empty; wanted a question")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError("--prompt: is not UTF-8 text") from error
    if processor.image_token in prompt:
        raise ValueError(f"--prompt: holds {processor.image_token!r}, which stands for an image; use --image FILE")
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    wrapper = wrapper_of(config.model_type)
    prepared, placeholders = wrapper.prepare_images(processor, images, as_bytes=False) if images else ([], [])
    try:
        rendering = render(processor, [{"role": "user", "content": content}], add_generation_prompt=True)
        ids, _, _ = tokenise(processor, rendering, placeholders)
    except Rejected as reason:
        option = "--prompt: " if reason.code == "text_special" else "--model: its "
        raise ValueError(option + reason.detail.removeprefix("the model's ")) from reason
    question = Encoded("question", ids, np.full_like(ids, IGNORE_INDEX), prepared)
    inputs = collate([question], pad_token_id=0).model_inputs(config)
    length, of_images = len(ids), num_image_tokens(config, inputs)
    features = sum(wrapper.num_features(config, image.sizes) for image in prepared)
    if of_images != features:
        raise ValueError(
            f"--model: its processor writes {of_images} image tokens, but it makes {features} features of these "
            f"images; a processor that is not the model's own cannot be used"
        )
    positions = config.text_config.max_position_embeddings
    if length > positions:
        raise ValueError(
            f"--prompt: {length} tokens, {of_images} of them of images, but the model has positions for {positions}; "
            f"use fewer images or a shorter prompt"
        )
    return inputs, positions - length + 1  # the last token of an answer is not fed back, so it needs none


def num_image_tokens(config: Any, inputs: dict[str, torch.Tensor]) -> int:
    return int((inputs["input_ids"] == config.image_token_id).sum())


class Arrivals(BaseStreamer):
    """Notes when each token came, and hands it on."""

    def __init__(self, following: BaseStreamer | None) -> None:
        self.following = following
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.following is not None:
            self.following.put(value)

    def end(self) -> None:
        if self.following is not None:
            self.following.end()


def answer(
    model: Any, processor: Any, inputs: dict[str, torch.Tensor], *, max_new_tokens: int = 64, stream: bool = False
) -> Answer:
    """The model's greedy answer, by SwiftKV where that is on.

    Args:
        model: as `load` gives it.
        processor: the model's.
        inputs: see `read_question`.
        max_new_tokens: where the answer is cut at the latest.
        stream: print it word by word as it comes, and end the line.
    """
    printer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    arrivals = Arrivals(printer)
    began = time.perf_counter()
    greedily = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=arrivals, **greedily)
    _, first, *others = arrivals.times  # `generate` puts the prompt, then each token
    return Answer(
        text=processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True),
        num_tokens=1 + len(others),
        first_token_seconds=first - began,
        tokens_per_second=len(others) / (others[-1] - first) if others else None,
    )


def compare(
    model: Any,
    processor: Any,
    inputs: dict[str, torch.Tensor],
    *,
    max_new_tokens: int = 64,
    turns: int = 31,
    enough_seconds: float = 10,
) -> tuple[Answer, Answer]:
    """The teacher's answer and the student's, by one model with SwiftKV weights, which is left with SwiftKV on.

    Each is answered once. The time to the first token is the median of `turns`, in each of which the teacher is asked
    for one, then the student; the turn before them, whose first uses are slow, does not count. No further turn begins
    once `enough_seconds` are spent on them: prompts that take so long are timed well by a few.
    """
    sides = (False, True)

    def ask(swiftkv: bool, max_new_tokens: int) -> Answer:
        swiftkv_backbone(model).config.swiftkv = swiftkv
        return answer(model, processor, inputs, max_new_tokens=max_new_tokens)

    for swiftkv in sides:
        ask(swiftkv, min(2, max_new_tokens))
    seconds: list[list[float]] = []  # [turn][side]
    while len(seconds) < turns and sum(map(sum, seconds)) <= enough_seconds:
        seconds.append([ask(swiftkv, 1).first_token_seconds for swiftkv in sides])
    medians = [median(times) for times in zip(*seconds, strict=True)]
    teacher, student = (
        replace(ask(swiftkv, max_new_tokens), first_token_seconds=first)
        for swiftkv, first in zip(sides, medians, strict=True)
    )
    return teacher, student


def comparison(teacher: Answer, student: Answer) -> str:
    """Two answers as the rows of a table, and how much sooner the student's began."""
    rows = [["", "first token", "tokens/s", "answer"]]
    for name, answered in (("teacher", teacher), ("student", student)):
        rate = "-" if answered.tokens_per_second is None else f"{answered.tokens_per_second:.1f}"
        rows.append([name, f"{answered.first_token_seconds:.3f} s", rate, " ".join(answered.text.split())])
    ratio = teacher.first_token_seconds / student.first_token_seconds
    lines = terminal_table(rows, to_the_right=(1, 2))
    return "\n".join([*lines, f"time to first token, teacher / student: {ratio:.2f}"])


def prompt_tokens(config: Any, inputs: dict[str, torch.Tensor]) -> str:
    return f"{inputs['input_ids'].shape[1]} prompt tokens ({num_image_tokens(config, inputs)} of images)"
