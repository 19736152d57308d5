"""What a model of some size asks of a cluster, computed from its shapes: weights, operations, bytes and seconds.

Weights are counted on torch's "meta" device, which holds none of them, so that 70 billion cost nothing.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, LlavaNextConfig

from benchmarks.workloads import micro_batch
from vlskv_ray.data.collate import Batch, supervised_positions, to_row
from vlskv_ray.model import presets
from vlskv_ray.model.build import swiftkv_config
from vlskv_ray.model.wrappers import llava_next
from vlskv_ray.training.profiling import flop_counter

WORKERS = (1, 2, 16, 64, 512)
GIGABITS = (1, 10, 25, 100)
"""A second, of a worker's network link."""
FLOAT32 = 4
"""Bytes of a trained weight, of its gradient and of each of its two moments."""
MOMENTS = 2


# ---------------------------------------------------------------------------------------------------------- the models
def llava(
    text_model_type: str, text: dict[str, Any], vision: dict[str, Any], tile: int, tied: bool = False
) -> LlavaNextConfig:
    """A LLaVA-NeXT of published sizes, with the tiles of LLaVA-v1.6: up to 2 x 2, 1 x 3 or 3 x 1 of `tile` pixels."""
    grid = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
    return presets.llava_next_config(
        text_model_type,
        image_size=tile,
        patch_size=14,
        image_grid_pinpoints=[[rows * tile, columns * tile] for rows, columns in grid],
        vision={"num_attention_heads": 16, **vision},
        text={"max_position_embeddings": 8192, "tie_word_embeddings": tied, **text},
        tie_word_embeddings=tied,
    )


CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "projection_dim": 768}
SIGLIP_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26}  # as LLaVA-OneVision cuts it
QWEN2_05B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 152000,
}
MISTRAL_7B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32064,
}
LLAMA3_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128320,
}
MODELS = {
    "0.5B": lambda: llava("qwen2", QWEN2_05B, SIGLIP_SO400M, tile=384, tied=True),
    "7B": lambda: llava("mistral", MISTRAL_7B, CLIP_L, tile=336),
    "70B": lambda: llava("llama", LLAMA3_70B, CLIP_L, tile=336),
}
"""0.5B: LLaVA-OneVision-Qwen2-0.5B's text model and tower, put together as a LLaVA-NeXT. 7B: LLaVA-v1.6-Mistral-7B.
70B: Llama-3-70B behind the same tower."""


@dataclass(frozen=True)
class Needs:
    """What a model and one sample of it take."""

    frozen: int
    trained: int
    """Weights, at N = half of the layers and groups of one."""
    hidden: int
    tokens: int
    supervised: int
    """Of the sample."""
    flops: int
    cached_flops: int
    """Of the step on it, and of one from the teacher cache."""
    row_bytes: int
    """As a data worker hands it over."""

    @property
    def gradient_bytes(self) -> int:
        return FLOAT32 * self.trained

    @property
    def checkpoint_bytes(self) -> int:
        """Trained weights and their moments: what is written, and what is copied before."""
        return (1 + MOMENTS) * FLOAT32 * self.trained

    def worker_bytes(self, frozen_bytes: int, saving: bool) -> int:
        """Weights, gradients and moments of a worker, frozen weights of so many bytes each; activations apart."""
        moving = (2 + MOMENTS) * FLOAT32 * self.trained
        return frozen_bytes * self.frozen + moving + (self.checkpoint_bytes if saving else 0)

    def teacher_cache_bytes(self, element_bytes: int = FLOAT32) -> int:
        """Of the sample: a state of each token, and two of each supervised one."""
        return (self.tokens + 2 * self.supervised) * self.hidden * element_bytes


@functools.cache
def needs_of(name: str) -> Needs:
    """Of one of `MODELS`, and a question of 90 tokens about a picture of 640 x 480 with an answer of 200."""
    config = MODELS[name]()
    batch = micro_batch(config, "image_chat", 1)
    model = on_meta(config)
    text = model.config.text_config
    tokens, kept = lengths_of(batch)
    trunk_and_teacher, students = step_flops(text, tokens, kept)
    counts = weights_of(model)
    return Needs(
        frozen=counts[False],
        trained=counts[True],
        hidden=text.hidden_size,
        tokens=sum(tokens),
        supervised=sum(kept),
        flops=tower_flops(model, batch) + trunk_and_teacher + students,
        cached_flops=students,
        row_bytes=sum(len(part) for part in to_row(batch).values() if isinstance(part, str | bytes)),
    )


def on_meta(config: LlavaNextConfig) -> Any:
    """The student of a model, at N = half of its layers, without its weights."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(swiftkv_config(config), attn_implementation="sdpa")


def weights_of(model: Any) -> dict[bool, int]:
    """How many weights are frozen (False), and how many train (True)."""
    counts = {False: 0, True: 0}
    for name, parameter in model.named_parameters():
        counts["_swiftkv" in name] += parameter.numel()
    return counts


# ---------------------------------------------------------------------------------------------------------- operations
def lengths_of(batch: Batch) -> tuple[list[int], list[int]]:
    """Tokens of each sample, and supervised ones."""
    return batch.attention_mask.sum(1).tolist(), supervised_positions(batch.labels).sum(1).tolist()


def step_flops(text: Any, tokens: Sequence[int], kept: Sequence[int]) -> tuple[int, int]:
    """Operations of a step on some samples, as the design has it, term by term; `tests/test_benchmarks.py` holds them
    to counted ones, to the last.

    Args:
        text: config of a text model with groups of one.
        tokens, kept: of each sample, and those of them that are supervised.

    Returns:
        of the trunk and the teacher, and of the student, which is all that a step from the teacher cache makes. The
        vision tower comes on top.
    """
    d, m, v = text.hidden_size, text.intermediate_size, text.vocab_size
    head = getattr(text, "head_dim", None) or d // text.num_attention_heads  # qwen2's config has none
    a, kv = text.num_attention_heads * head, text.num_key_value_heads * head
    t, n = sum(tokens), sum(kept)
    whole, some = (sum(4 * a * q * k for q, k in zip(q_, tokens, strict=True)) for q_ in (tokens, kept))  # attention
    upper = text.num_hidden_layers - text.num_key_value_layers

    mlp, out, key_value = 6 * d * m, 2 * d * a, 4 * d * kv  # a token's, with both of keys and values
    trunk_and_teacher = (text.num_hidden_layers - 1) * (t * (mlp + 2 * out + key_value) + whole)
    teachers_last_layer = t * key_value + n * (mlp + 2 * out) + some
    forward = upper * (t * key_value + n * (mlp + 2 * out) + some)
    # back: through MLP, output and attention; queries by weights, and by input but for the first layer, whose input
    # is frozen; keys and values by both
    backward = upper * (n * (mlp + out) + some * 5 // 2 + n * out + 2 * t * key_value) + (upper - 1) * n * out
    heads = 3 * 2 * n * d * v  # teacher's, student's, and back through the student's
    return trunk_and_teacher + teachers_last_layer, forward + backward + heads


def tower_flops(model: Any, batch: Batch) -> int:
    """Operations of the vision tower and the projector on a batch's images, on whatever device the model is."""
    if not batch.pixels:
        return 0
    images = llava_next.model_inputs(model.config, batch)
    images["pixel_values"] = torch.empty(images["pixel_values"].shape, device=model.device)
    with torch.no_grad(), flop_counter() as counter:
        model.get_image_features(**images)
    return int(counter.get_total_flops())


# ------------------------------------------------------------------------------------------------------------- network
def all_reduce_bytes(size: int, workers: int) -> int:
    """What each worker sends, and receives, of an all-reduce by gloo's ring."""
    return 2 * (workers - 1) * size // workers


def in_plan_order_bytes(size: int, workers: int, accumulation: int) -> int:
    """What each worker receives in a step with `cluster.bit_identical`: the gradient of every micro-batch of others."""
    return (workers - 1) * accumulation * size


def in_plan_order_seconds(size: int, workers: int, accumulation: int, gigabits: float) -> float:
    """Of a step's broadcasts, one after another: gloo's go down a binomial tree, whose root sends a copy a level."""
    levels = math.ceil(math.log2(workers))
    return workers * accumulation * levels * seconds_on(size, gigabits)


def seconds_on(count: float, gigabits: float) -> float:
    """Of so many bytes on a link of so many gigabits a second."""
    return 8 * count / (gigabits * 1e9)
