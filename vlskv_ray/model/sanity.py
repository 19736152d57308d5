"""What the values of a model's files may be: as large as any real model's, of the right type, fitting each other."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlskv_ray.model.folder import PROCESSOR_FILES, Damaged, read_json, shortened


@dataclass(frozen=True)
class Number:
    """What a number of a config may be; `known` is the largest of any real model, or why it is bounded."""

    smallest: float
    largest: float
    known: str
    whole: bool = True

    def problem(self, value: Any) -> str | None:
        """What was wanted instead of this value; None where it will do."""
        kinds = int if self.whole else int | float
        if isinstance(value, kinds) and not isinstance(value, bool) and self.smallest <= value <= self.largest:
            return None
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} from {self.smallest:.10g} to {self.largest:.10g} ({self.known})"


LABELS = Number(0, 2**17, "2 as a rule, ImageNet-21k has 21843")
"""Which transformers makes a name for each."""
TEXT = {
    "num_labels": LABELS,
    "num_hidden_layers": Number(1, 1024, "Llama-3.1-405B has 126"),
    "hidden_size": Number(1, 2**17, "Llama-3.1-405B has 16384"),
    "intermediate_size": Number(1, 2**19, "Llama-3.1-405B has 53248"),
    "num_attention_heads": Number(1, 2048, "Llama-3.1-405B has 128"),
    "num_key_value_heads": Number(1, 2048, "no more than there are attention heads"),
    "head_dim": Number(2, 4096, "gemma has 256"),
    "vocab_size": Number(1, 2**22, "gemma-3 has 262208"),
    "max_position_embeddings": Number(1, 2**25, "Llama-4-Scout has 10485760"),
    "sliding_window": Number(1, 2**25, "no more than there are positions"),
    "num_key_value_layers": Number(1, 1024, "fewer than there are layers"),
    "key_value_group_size": Number(1, 1024, "no more than there are layers"),
    "max_window_layers": Number(0, 1024, "no more than there are layers"),
    "rms_norm_eps": Number(0, 1, "1e-5 as a rule", whole=False),
    "rope_theta": Number(1, 1e12, "llama has 1e4, Llama-4 5e5, qwen 1e6", whole=False),
    "attention_dropout": Number(0, 1, "a probability", whole=False),
    "initializer_range": Number(0, 100, "0.02 as a rule", whole=False),
}
"""Numbers of a text model. A key that is absent or null is a default of transformers'."""
VISION = {
    "num_labels": LABELS,
    "num_hidden_layers": Number(1, 256, "EVA-CLIP-18B has 48"),
    "hidden_size": Number(1, 2**16, "EVA-CLIP-18B has 5120"),
    "intermediate_size": Number(1, 2**18, "EVA-CLIP-18B has 25600"),
    "num_attention_heads": Number(1, 1024, "EVA-CLIP-18B has 40"),
    "num_channels": Number(3, 3, "pictures are RGB"),
    "layer_norm_eps": Number(0, 1, "1e-5 as a rule", whole=False),
    "attention_dropout": Number(0, 1, "a probability", whole=False),
    "initializer_range": Number(0, 100, "0.02 as a rule", whole=False),
}
"""Likewise, of a vision tower that is a transformer, whichever family has it."""
IMAGE_PROCESSOR = {
    "resample": Number(0, 5, "Pillow's filters"),
    "rescale_factor": Number(1e-9, 1e9, "1/255 as a rule", whole=False),
}
IMAGE_SIDES = ("size", "crop_size")
SIDE = Number(1, 4096, "as large as a tile")
CHANNEL = {
    "image_mean": Number(-1e6, 1e6, "0.5 as a rule", whole=False),
    "image_std": Number(1e-6, 1e6, "0.3 as a rule", whole=False),
}


# ----------------------------------------------------------------------------------------------------- values of files
def check_text_config(declared: dict[str, Any]) -> None:
    """Numbers of the text model in config.json are what a real one may have.

    Raises:
        Damaged: names the key, its value, and what was wanted.
    """
    check_sections(declared, {"": {"num_labels": LABELS}, "text_config": TEXT})
    rope = (declared.get("text_config") or {}).get("rope_parameters") or {}
    if isinstance(rope, dict):
        check_numbers("config.json", "text_config.rope_parameters", rope, {"rope_theta": TEXT["rope_theta"]})


def check_sections(declared: dict[str, Any], numbers: Mapping[str, Mapping[str, Number]]) -> None:
    """The numbers of these sections of config.json, by key; "" is the file's own. Damaged where one will not do."""
    for name, of_section in numbers.items():
        section = (declared.get(name) or {}) if name else declared
        if not isinstance(section, dict):
            raise Damaged(f"config.json: {name}: {shortened(section)}; wanted an object")
        check_numbers("config.json", name, section, of_section)


def processor_files(folder: Path) -> Iterator[tuple[str, dict[str, Any], str, dict[str, Any]]]:
    """The files of a processor that there are: name, content, and the section that is of images ("": all of it) with
    what stands there. Damaged where that is no object."""
    for name in PROCESSOR_FILES:
        if (folder / name).exists():
            content = read_json(folder, name)
            section = "image_processor" if "image_processor" in content else ""
            images = content[section] if section else content
            if not isinstance(images, dict):
                raise Damaged(f"{name}: image_processor: {shortened(images)}; wanted an object")
            yield name, content, section, images


def check_image_processor(name: str, section: str, images: Mapping[str, Any]) -> None:
    """What every stock image processor of pictures has: sides, channels, switches. Damaged where one will not do."""
    check_numbers(name, section, images, IMAGE_PROCESSOR)
    for key in IMAGE_SIDES:
        value = images.get(key)
        for part, side in value.items() if isinstance(value, dict) else [("", value)]:
            if side is not None:
                check_value(name, (section, key, part), side, SIDE.problem(side))
    for key in ("image_mean", "image_std"):
        value = images.get(key)
        wanted = "a number for each of the three channels, those of image_std not 0"
        numbers = value if isinstance(value, list) and len(value) == 3 else [value]
        if value is not None:
            check_value(name, (section, key), value, wanted if any(CHANNEL[key].problem(n) for n in numbers) else None)
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "do_convert_rgb"):
        value = images.get(key)
        check_value(name, (section, key), value, None if isinstance(value, bool | None) else "true or false")


def check_numbers(name: str, section: str, values: Mapping[str, Any], numbers: Mapping[str, Number]) -> None:
    for key, number in numbers.items():
        if values.get(key) is not None:
            check_value(name, (section, key), values[key], number.problem(values[key]))


def check_value(name: str, path: Iterable[str], value: Any, wanted: str | None) -> None:
    """Damaged where something else was wanted."""
    if wanted is not None:
        raise Damaged(f"{name}: {'.'.join(filter(None, path))}: {shortened(value)}; wanted {wanted}")


# ----------------------------------------------------------------------------------------------------------- relations
def check_relations(config: Any) -> None:
    """The values of a text model fit each other and the ids of tokens, so that the model can be built and run.

    Args:
        config: of a vision-language model, as transformers has read it, defaults included.

    Raises:
        Damaged: names the key, its value, and what was wanted.
    """
    text = config.text_config

    def check(key: str, value: Any, fits: bool, wanted: str) -> None:
        check_value("config.json", [key], value, None if fits else wanted)

    heads, groups = text.num_attention_heads, text.num_key_value_heads
    check("text_config.num_key_value_heads", groups, heads % groups == 0, f"a divisor of the {heads} attention heads")
    tokens, vocabulary = config.image_token_id, text.vocab_size
    check(image_token_key(config), tokens, tokens < vocabulary, f"less than the vocab_size of {vocabulary}")
    padding = text.pad_token_id
    inside = padding is None or -vocabulary <= padding < vocabulary
    check("text_config.pad_token_id", padding, inside, f"less than the vocab_size of {vocabulary}")


def image_token_key(config: Any) -> str:
    """What config.json calls the id of the token that stands for a feature of an image: families differ."""
    return str(config.attribute_map.get("image_token_id", "image_token_id"))


def check_weight_bytes(config: Any, vision_weights: int, weight_bytes: int) -> None:
    """The files of weights are as large as the config says at least.

    Args:
        config: of a vision-language model.
        vision_weights: how many its vision tower has at least.
        weight_bytes: of all the files of weights.

    Raises:
        Damaged: they cannot hold them.
    """
    text = config.text_config
    # those of embeddings and of the feed-forward layers
    text_weights = text.hidden_size * (text.vocab_size + text.num_hidden_layers * 3 * text.intermediate_size)
    weights = int(text_weights) + vision_weights
    if weights > weight_bytes:
        raise Damaged(
            f"weights cannot be loaded: config.json describes at least {weights:,} weights, but their files have "
            f"{weight_bytes:,} bytes; the checkpoint is damaged, or config.json is another model's"
        )
