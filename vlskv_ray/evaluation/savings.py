"""What a SwiftKV student saves against its teacher, measured on one model: prefill time and operations, and cache.

Teacher and student are the same weights with SwiftKV off and on. Each prefill is that of `generate()`: the whole model,
vision tower included, for one prompt and the logits of its last token. Times are the medians of prefills of teacher and
student in turn: CPU time, in which what else runs on the machine counts little (with several threads more, since they
wait for each other by spinning), and beside it what a clock shows.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlskv_ray.data.collate import IGNORE_INDEX, Encoded, collate
from vlskv_ray.model.swiftkv import swiftkv_backbone
from vlskv_ray.training.profiling import flop_counter

LENGTHS = (64, 128, 256, 512, 1024, 2048)
"""Tokens of the prompts that are tried."""

TEACHER, STUDENT = False, True  # what the config's toggle says


@dataclass(frozen=True)
class Prefill:
    """What the prefill of one prompt takes."""

    seconds: float
    """By the clock."""
    cpu_seconds: float | None
    """Of all threads of this process; None on a GPU, which computes beside them."""
    flops: int
    cache_bytes: int


def measure_savings(
    model: Any,
    sample: Encoded | None,
    *,
    lengths: Sequence[int] = LENGTHS,
    budget_seconds: float = 60.0,
    repeats: int = 5,
) -> dict[str, Any]:
    """Prefills prompts of growing length as teacher and as student, and compares; leaves the toggle as it was.

    Args:
        model: a vision-language model with a SwiftKV backbone, its weights of one dtype, as in `final/`; one that is
            being trained in bfloat16 mixes two and needs `torch.autocast` around this.
        sample: what the prompts are made of, images included; None for plain text.
        lengths: of the prompts, in tokens. Left out are those beyond the model's positions, those that would cut the
            sample's images off and, after the first, those that what is left of the time does not allow. Where none
            is left the sample's own length is measured.
        budget_seconds: for all of it; the shortest prompt is measured whatever it takes.
        repeats: timed pairs of a teacher's and a student's prefill at each length, whose medians count.

    Returns:
        A flat dict, ready for JSON. Times and operations are lists along `prompt_lengths`, CPU times None on a GPU;
        ratios are student over teacher at `prompt_length`, the longest measured.
    """
    config = swiftkv_backbone(model).config
    sample = sample or plain_text(model)
    measured: dict[int, tuple[Prefill, Prefill]] = {}
    seconds, toggle = 0.0, config.swiftkv
    deadline = time.perf_counter() + budget_seconds
    try:
        for length in prompt_lengths(model, sample, lengths):
            began = time.perf_counter()
            # at most: attention grows with the square of the length, all else with the length
            if measured and began + seconds * (length / max(measured)) ** 2 > deadline:
                break
            measured[length] = compare_prefills(model, prompt(model, sample, length), repeats)
            seconds = time.perf_counter() - began
    finally:
        config.swiftkv = toggle
    return figures_of(model, sample, measured)


def figures_of(model: Any, sample: Encoded, measured: dict[int, tuple[Prefill, Prefill]]) -> dict[str, Any]:
    """What `measure_savings` returns, from the teacher's and the student's prefills of prompts of each length."""
    longest = max(measured)
    teacher, student = measured[longest]
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {
        "prompt_lengths": list(measured),
        "teacher_prefill_cpu_seconds": [teacher.cpu_seconds for teacher, _ in measured.values()],
        "student_prefill_cpu_seconds": [student.cpu_seconds for _, student in measured.values()],
        "teacher_prefill_seconds": [teacher.seconds for teacher, _ in measured.values()],
        "student_prefill_seconds": [student.seconds for _, student in measured.values()],
        "teacher_prefill_flops": [teacher.flops for teacher, _ in measured.values()],
        "student_prefill_flops": [student.flops for _, student in measured.values()],
        "prompt_length": longest,
        "prompt_images": len(sample.images),
        "prefill_cpu_time_ratio": ratio(student.cpu_seconds, teacher.cpu_seconds),
        "prefill_time_ratio": student.seconds / teacher.seconds,
        "prefill_flops_ratio": student.flops / teacher.flops,
        "teacher_cache_bytes_per_token": teacher.cache_bytes / longest,
        "student_cache_bytes_per_token": student.cache_bytes / longest,
        "cache_bytes_ratio": student.cache_bytes / teacher.cache_bytes,
        "parameters": sum(parameters.values()),
        "trainable_parameters": sum(count for name, count in parameters.items() if "_swiftkv" in name),
        "threads": torch.get_num_threads(),
        "device": str(model.device.type),
    }


def ratio(student: float | None, teacher: float | None) -> float | None:
    """None where there is none: not measured, or by a clock too coarse for it."""
    return student / teacher if student is not None and teacher else None


def layers_of(model: Any) -> dict[str, int]:
    """How many text layers a student has, how many with keys and values of their own, and how many share a cache."""
    config = swiftkv_backbone(model).config
    names = ("num_hidden_layers", "num_key_value_layers", "key_value_group_size")
    return {name: getattr(config, name) for name in names}


# ------------------------------------------------------------------------------------------------------------ prompts
def plain_text(model: Any) -> Encoded:
    """A sample without images, as long as the model has positions: every word of the vocabulary in turn."""
    config = swiftkv_backbone(model).config
    words = np.setdiff1d(np.arange(config.vocab_size), special_ids(model))
    input_ids = np.resize(words, config.max_position_embeddings)
    return Encoded("plain text", input_ids, np.full_like(input_ids, IGNORE_INDEX))


def prompt_lengths(model: Any, sample: Encoded, lengths: Sequence[int]) -> list[int]:
    """Those of `lengths` that a prompt made of `sample` can have, growing; its own where there are none."""
    images = np.flatnonzero(sample.input_ids == model.config.image_token_id)
    shortest = int(images[-1]) + 1 if len(images) else 1
    longest = swiftkv_backbone(model).config.max_position_embeddings
    possible = sorted({length for length in lengths if shortest <= length <= longest})
    return possible or [len(sample.input_ids)]


def prompt(model: Any, sample: Encoded, length: int) -> dict[str, Tensor]:
    """The model's inputs for the first `length` tokens of a sample followed by its words over and over."""
    ids = sample.input_ids[:length]
    if length > len(ids):
        words = sample.input_ids[~np.isin(sample.input_ids, special_ids(model))]
        ids = np.concatenate([ids, np.resize(words, length - len(ids))])
    whole = replace(sample, input_ids=ids, labels=np.full_like(ids, IGNORE_INDEX))
    return collate([whole], pad_token_id=0).to(model.device).model_inputs(model.config)


def special_ids(model: Any) -> list[int]:
    """The ids that stand for no words, as far as the model's config names them."""
    text = swiftkv_backbone(model).config
    end = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    named = [model.config.image_token_id, text.bos_token_id, text.pad_token_id, *end]
    return [token for token in named if token is not None]


# ----------------------------------------------------------------------------------------------------------- prefills
@torch.inference_mode()
def compare_prefills(model: Any, inputs: dict[str, Tensor], repeats: int) -> tuple[Prefill, Prefill]:
    """Teacher's and student's prefill of one prompt, timed in turn so that what else the machine does hits both."""
    counts = {side: count_prefill(model, inputs, side) for side in (TEACHER, STUDENT)}  # which also warms up
    times: dict[bool, list[tuple[float, float | None]]] = {TEACHER: [], STUDENT: []}
    for _ in range(repeats):
        for side, of_side in times.items():
            of_side.append(time_prefill(model, inputs, side))

    def medians(side: bool) -> Prefill:
        cpu_seconds = [cpu for _, cpu in times[side] if cpu is not None]
        seconds = median(seconds for seconds, _ in times[side])
        return Prefill(seconds, median(cpu_seconds) if cpu_seconds else None, *counts[side])

    return medians(TEACHER), medians(STUDENT)


def time_prefill(model: Any, inputs: dict[str, Tensor], swiftkv: bool) -> tuple[float, float | None]:
    """Seconds of one prefill by the clock, and of CPU time, see `Prefill`."""
    is_gpu = model.device.type == "cuda"
    wait = torch.cuda.synchronize if is_gpu else lambda device: None  # a GPU computes beside the program
    wait(model.device)
    began, cpu_began = time.perf_counter(), time.process_time()
    prefill(model, inputs, swiftkv)
    wait(model.device)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return seconds, None if is_gpu else cpu_seconds


def prefill(model: Any, inputs: dict[str, Tensor], swiftkv: bool) -> Any:
    """The cache after what `generate()` does with a prompt before its first token."""
    swiftkv_backbone(model).config.swiftkv = swiftkv
    return model(**inputs, use_cache=True, logits_to_keep=1).past_key_values


def count_prefill(model: Any, inputs: dict[str, Tensor], swiftkv: bool) -> tuple[int, int]:
    """Floating-point operations of a prefill, and the bytes of the cache it leaves."""
    with flop_counter() as counter:
        cache = prefill(model, inputs, swiftkv)
    return counter.get_total_flops(), cache_bytes(cache)


def cache_bytes(cache: Any) -> int:
    """Memory behind a cache's keys and values, each piece once; layers that read another's cache hold none."""
    states = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]
    storages = [x.untyped_storage() for x in states]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
