"""Small models with seeded random weights, by name: for tests, and for trying things without a checkpoint."""

import itertools
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from vlskv_ray.model.wrappers import llava_next

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message['role'] | upper }}:\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:\n{% endif %}"
)


WORDS = (
    *("USER", "ASSISTANT", "SYSTEM", "I", "a", "above", "answer", "are", "as", "at", "below", "black", "blue", "both"),
    *("bottom", "circle", "circles", "colour", "cross", "crosses", "first", "further", "green", "has", "how", "in"),
    *(
        "is",
        "it",
        "left",
        "letters",
        "many",
        "more",
        "neither",
        "no",
        "nothing",
        "of",
        "often",
        "or",
        "each",
        "place",
    ),
    *("picture", "plus", "red", "reverse", "right", "second", "see", "sentence", "shape", "shapes", "sort"),
    *("square", "squares", "the", "there", "top", "triangle", "triangles", "what", "where", "which", "yellow", "yes"),
)
"""Words of the built-in world (data/shapes.py) that are one token each, however they stand."""


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with LLaVA's special tokens, a token for each byte, so that no text is unknown to it, and `WORDS`.

    The rest of the vocabulary is syllables: they let every id that a random model comes up with be read.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = sorted({form for word in WORDS for form in (word, word.capitalize()) if len(form) > 1} - {*SPECIAL_TOKENS})
    syllables = ("".join(letters) for n in (2, 3, 4) for letters in itertools.product(string.ascii_lowercase, repeat=n))
    tokens = dict.fromkeys(itertools.chain(SPECIAL_TOKENS, alphabet, words, (f"Ġ{word}" for word in words), syllables))
    vocabulary = {token: i for i, token in enumerate(itertools.islice(tokens, vocab_size))}
    # without merges, a word that is in the vocabulary is one token and any other is its bytes
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>", ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def llava_next_config(
    text_model_type: str = "llama",
    *,
    image_size: int,
    patch_size: int,
    image_grid_pinpoints: list[list[int]],
    vision: dict[str, Any],
    text: dict[str, Any],
    **others: Any,
) -> LlavaNextConfig:
    """A LLaVA-NeXT of any size around a CLIP tower; ids of special tokens are those of `byte_tokenizer`."""
    ids = {name: SPECIAL_TOKENS.index(token) for name, token in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))}
    text_config = CONFIG_MAPPING[text_model_type](**{f"{k}_token_id": v for k, v in ids.items()}, **text)
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=image_size, patch_size=patch_size, **vision),
        text_config=text_config,
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        image_grid_pinpoints=image_grid_pinpoints,
        **others,
    )


def llava_next_processor(config: LlavaNextConfig, **image_processor_options: Any) -> LlavaNextProcessor:
    """The stock processor, Pillow backend, that fits a config of `llava_next_config`."""
    tokenizer = byte_tokenizer(config.text_config.vocab_size)
    return llava_next.make_processor(config, tokenizer, CHAT_TEMPLATE, **image_processor_options)


def small_llava_next() -> LlavaNextConfig:
    """The small model of the original project: 4,389,632 parameters, 4,406,080 with SwiftKV at N = 2.

    Its weights are drawn wider than a model to be trained would have them: a teacher whose outputs are nowhere near
    uniform gives a student something to match.
    """
    return llava_next_config(
        image_size=224,
        patch_size=16,
        image_grid_pinpoints=[[224, 224]],
        vision={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "projection_dim": 64,
        },
        text={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 32064,
            "max_position_embeddings": 1024,
            "initializer_range": 0.2,
        },
    )


def shapes_llava_next() -> LlavaNextConfig:
    """The architecture that fits the built-in world (data/shapes.py): a patch sees a whole place of a picture."""
    return llava_next_config(
        image_size=32,
        patch_size=16,
        image_grid_pinpoints=[[32, 64], [64, 32]],
        vision_feature_layer=-1,  # all of the tower's few layers
        vision={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "projection_dim": 64,
        },
        text={
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 8,
            # wide heads that turn slowly: what a question names is found by content, at whatever distance
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 48,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "vocab_size": 528,
            "max_position_embeddings": 2048,
            "initializer_range": 0.1,  # 1 / sqrt(hidden_size): nearer to 0 a narrow model takes long to start learning
        },
    )


@dataclass(frozen=True)
class Preset:
    """An architecture, and what its image processor has other than a stock one."""

    config: Callable[[], LlavaNextConfig]
    image_processor: dict[str, Any] = field(default_factory=dict)

    def processor(self) -> LlavaNextProcessor:
        """The one that fits it."""
        return llava_next_processor(self.config(), **self.image_processor)


PRESETS = {
    "small-llava-next": Preset(small_llava_next),
    # the world's pictures are bright: this brings their background to 0, and its shapes to a size at which the tower,
    # newly drawn, sees a patch's place beside what it shows
    "shapes-llava-next": Preset(shapes_llava_next, {"image_mean": [0.94] * 3, "image_std": [3.0] * 3}),
}
"""Names that `model.name_or_path` takes beside a folder and a hub id: architectures with random weights."""

SHIPPED = {"shapes-teacher": Path(__file__).with_name("shapes_teacher")}
"""Likewise: trained models that come with the package. This one is `configs/shapes-teacher.yaml`'s."""


def build_teacher(config: LlavaNextConfig, seed: int = 0) -> Any:
    """A stock model with weights drawn from `seed`, leaving the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config).eval()
