"""What is measured: two models with random weights, and micro-batches of real pictures and text made by the package."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaNextConfig

from vlskv_ray.data.chat import Limits, encode
from vlskv_ray.data.collate import Batch, Encoded, collate
from vlskv_ray.data.sample import Sample
from vlskv_ray.data.teacher_cache import content_key
from vlskv_ray.model import presets
from vlskv_ray.model.build import swiftkv_config
from vlskv_ray.model.swiftkv import swiftkv_backbone


def llava_next(hidden: int, layers: int, heads: int, key_value_heads: int, mlp: int, tower: int) -> LlavaNextConfig:
    """A llama of these sizes behind a CLIP tower `tower` wide, for pictures of up to 5 tiles of 224 pixels."""
    return presets.llava_next_config(
        image_size=224,
        patch_size=16,
        image_grid_pinpoints=[[224, 448], [448, 224], [448, 448]],
        vision={
            "hidden_size": tower,
            "intermediate_size": 4 * tower,
            "num_hidden_layers": 6,
            "num_attention_heads": tower // 64,
            "projection_dim": tower,
        },
        text={
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "vocab_size": 32064,
            "max_position_embeddings": 2048,
            "initializer_range": hidden**-0.5,  # a teacher whose answers are nowhere near uniform
        },
    )


# A real LLaVA spends 5 to 8 % of its forward in the tower; so do these.
CONFIGS = {
    "mid": lambda: llava_next(hidden=576, layers=16, heads=9, key_value_heads=3, mlp=1536, tower=256),
    "wide": lambda: llava_next(hidden=2048, layers=4, heads=16, key_value_heads=16, mlp=5632, tower=512),
}
"""mid: 16 layers of a small language model. wide: few layers, whose matrix products are those of a large one."""


@dataclass(frozen=True)
class Conversation:
    """One question and its answer, with or without a picture. Sizes are in tokens, of which letters are one each."""

    question: int
    answer: int
    """Supervised: the token that ends it is one of them."""
    picture: tuple[int, int] | None = None
    """Width and height in pixels: 600 to 1,010 tokens."""


WORKLOADS = {
    "visual_qa": (
        Conversation(100, 6, (640, 480)),
        Conversation(40, 4, (448, 448)),
        Conversation(150, 9, (800, 400)),
        Conversation(60, 5, (480, 640)),
    ),
    "image_chat": (
        Conversation(90, 200, (640, 480)),
        Conversation(60, 270, (448, 448)),
        Conversation(130, 140, (800, 400)),
        Conversation(70, 190, (480, 640)),
    ),
    "text_chat": (
        Conversation(241, 256),
        Conversation(180, 190),
        Conversation(300, 330),
        Conversation(220, 248),
    ),
}
"""The first conversation alone is the micro-batch of one sample; all of them, of ragged lengths, the one of four."""


def build(config: LlavaNextConfig) -> Any:
    """A student with N = half of the layers, whose new weights have moved away from the teacher's, as in training."""
    student = AutoModelForImageTextToText.from_config(swiftkv_config(config), attn_implementation="sdpa")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student.load_state_dict(presets.build_teacher(config).state_dict(), strict=False)
        swiftkv_backbone(student).start_from_teacher()
        for parameter_name, parameter in student.named_parameters():
            parameter.requires_grad_("_swiftkv" in parameter_name)
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.data += 0.1 * parameter.std() * torch.randn_like(parameter)
    swiftkv_backbone(student).config.swiftkv = True
    return student.eval()


def micro_batch(config: Any, workload: str, size: int) -> Batch:
    """The first `size` conversations of a workload, through the stock processor, as a run would have them."""
    processor = presets.llava_next_processor(config)
    samples = [encoded(sample_of(workload, i), processor, config) for i in range(size)]
    return collate(samples, presets.SPECIAL_TOKENS.index("<pad>"))


def sample_of(workload: str, number: int) -> Sample:
    """One conversation of a workload before anything is decoded."""
    messages, pictures = conversation_of(WORKLOADS[workload][number], np.random.default_rng(number))
    return Sample(str(number), messages, list(pictures))


def encoded(sample: Sample, processor: Any, config: Any) -> Encoded:
    limits = Limits(max(2048, config.text_config.max_position_embeddings))
    return replace(encode(sample, processor, config, limits), key=content_key(sample))


def conversation_of(conversation: Conversation, rng: np.random.Generator) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Messages of random letters, and the encoded picture."""
    content: Sequence[dict[str, str]] = [{"type": "image"}] if conversation.picture else []
    messages = [
        {"role": "user", "content": [*content, {"type": "text", "text": _letters(rng, conversation.question)}]},
        {"role": "assistant", "content": [{"type": "text", "text": _letters(rng, conversation.answer - 1)}]},
    ]
    return messages, [_picture(rng, conversation.picture)] if conversation.picture else []


def _letters(rng: np.random.Generator, count: int) -> str:
    return "".join(rng.choice(list("bcdfgjklmpqvwxz"), count))  # no words of the vocabulary


def _picture(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A JPEG of coloured blocks."""
    blocks = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size)
    encoded = io.BytesIO()
    blocks.save(encoded, format="JPEG")
    return encoded.getvalue()
