"""What the values of a model's files may be: as large as any real model's, of the right type, fitting each other."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
NUMBERS: dict[str, dict[str, Number]] = {
    "": {
        "num_labels": LABELS,
        "image_token_index": Number(0, 2**22, "as many as there are tokens"),
        "image_seq_length": Number(1, 2**20, "llava's 576"),
    },
    "text_config": {
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
    },
    "vision_config": {
        "num_labels": LABELS,
        "num_hidden_layers": Number(1, 256, "EVA-CLIP-18B has 48"),
        "hidden_size": Number(1, 2**16, "EVA-CLIP-18B has 5120"),
        "intermediate_size": Number(1, 2**18, "EVA-CLIP-18B has 25600"),
        "num_attention_heads": Number(1, 1024, "EVA-CLIP-18B has 40"),
        "image_size": Number(1, 4096, "InternVL's towers have 448, PaliGemma's 896"),
        "patch_size": Number(1, 1024, "CLIP has 14 to 32"),
        "num_channels": Number(3, 3, "pictures are RGB"),
        "projection_dim": Number(1, 2**16, "CLIP has 768"),
        "layer_norm_eps": Number(0, 1, "1e-5 as a rule", whole=False),
        "attention_dropout": Number(0, 1, "a probability", whole=False),
        "initializer_range": Number(0, 100, "0.02 as a rule", whole=False),
        "initializer_factor": Number(0, 1000, "1 as a rule", whole=False),
    },
    "processor": {
        "patch_size": Number(1, 1024, "CLIP has 14 to 32"),
        "num_additional_image_tokens": Number(0, 16, "1 for a tower with a class token, else 0"),
    },
    "image_processor": {
        "resample": Number(0, 5, "Pillow's filters"),
        "rescale_factor": Number(1e-9, 1e9, "1/255 as a rule", whole=False),
    },
}
"""What numbers stand in the sections of config.json and in a processor's files. A key that is absent or null is a
default of transformers'."""
SIDE = Number(1, 4096, "as large as a tile")
CHANNEL = {
    "image_mean": Number(-1e6, 1e6, "0.5 as a rule", whole=False),
    "image_std": Number(1e-6, 1e6, "0.3 as a rule", whole=False),
}
GRID_SIDE = Number(1, 2**16, "granite-vision has 3840")
MAX_PINPOINTS = 256
"""granite-vision has 27, llava-onevision 36."""
SIDES = ("size", "crop_size")
IMAGE_KEYS = ("image_grid_pinpoints", *SIDES)
MAX_TILES = 256
"""Of one picture: 336 px ones take 87 MB as bytes. granite-vision has 10, llava-onevision 36."""
TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}
"""Vision towers, and the choice of their features that leaves one for each patch: only those fill a grid."""


def check_config(config: dict[str, Any]) -> None:
    """Numbers of config.json are what a real LLaVA-NeXT may have. Damaged, with key, value and what was wanted."""
    sections = {"": config}
    for name in ("text_config", "vision_config"):
        sections[name] = config.get(name) or {}
        if not isinstance(sections[name], dict):
            raise Damaged(f"config.json: {name}: {shortened(config[name])}; wanted an object")
    for name, section in sections.items():
        _check_numbers("config.json", name, section, NUMBERS[name])
    rope = sections["text_config"].get("rope_parameters") or {}
    if isinstance(rope, dict):
        theta = {"rope_theta": NUMBERS["text_config"]["rope_theta"]}
        _check_numbers("config.json", "text_config.rope_parameters", rope, theta)
    _check_pinpoints("config.json", "", config)


def check_processor(folder: Path) -> None:
    """Likewise, for the files of the processor."""
    for name in PROCESSOR_FILES:
        if not (folder / name).exists():
            continue
        content = read_json(folder, name)
        _check_numbers(name, "", content, NUMBERS["processor"])
        strategy = content.get("vision_feature_select_strategy")
        if strategy not in (None, "default", "full"):
            raise Damaged(f"{name}: vision_feature_select_strategy: {shortened(strategy)}; wanted default or full")
        section = "image_processor" if "image_processor" in content else ""
        images = content[section] if section else content
        if not isinstance(images, dict):
            raise Damaged(f"{name}: image_processor: {shortened(images)}; wanted an object")
        _check_images(name, section, images)


def _check_images(name: str, section: str, images: Mapping[str, Any]) -> None:
    _check_numbers(name, section, images, NUMBERS["image_processor"])
    _check_pinpoints(name, section, images)
    for key in SIDES:
        value = images.get(key)
        for part, side in value.items() if isinstance(value, dict) else [("", value)]:
            if side is not None:
                _check(name, (section, key, part), side, SIDE.problem(side))
    for key in ("image_mean", "image_std"):
        value = images.get(key)
        wanted = "a number for each of the three channels, those of image_std not 0"
        numbers = value if isinstance(value, list) and len(value) == 3 else [value]
        if value is not None:
            _check(name, (section, key), value, wanted if any(CHANNEL[key].problem(n) for n in numbers) else None)
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "do_convert_rgb"):
        value = images.get(key)
        _check(name, (section, key), value, None if isinstance(value, bool | None) else "true or false")


def _check_numbers(name: str, section: str, values: Mapping[str, Any], numbers: Mapping[str, Number]) -> None:
    for key, number in numbers.items():
        if values.get(key) is not None:
            _check(name, (section, key), values[key], number.problem(values[key]))


def _check_pinpoints(name: str, section: str, values: Mapping[str, Any]) -> None:
    points = values.get("image_grid_pinpoints")
    if points is None:
        return
    wanted = f"1 to {MAX_PINPOINTS} pairs of height and width, each {GRID_SIDE.problem(None)}"
    few = isinstance(points, list) and 1 <= len(points) <= MAX_PINPOINTS
    pairs = few and all(
        isinstance(point, list) and len(point) == 2 and not any(map(GRID_SIDE.problem, point)) for point in points
    )
    _check(name, (section, "image_grid_pinpoints"), points, None if pairs else wanted)


def _check(name: str, path: Iterable[str], value: Any, wanted: str | None) -> None:
    """Damaged where something else was wanted."""
    if wanted is not None:
        raise Damaged(f"{name}: {'.'.join(filter(None, path))}: {shortened(value)}; wanted {wanted}")


# -------------------------------------------------------------------------------------------------------- relations
def check_relations(config: Any, weight_bytes: int) -> None:
    """The values of a config fit each other and the files of weights, so that the model can be built and run.

    Args:
        config: of a LLaVA-NeXT, as transformers has read it, defaults included.
        weight_bytes: of all the files of weights.

    Raises:
        Damaged: names the key, its value, and what was wanted.
    """
    text, vision = config.text_config, config.vision_config

    def check(key: str, value: Any, fits: bool, wanted: str) -> None:
        _check("config.json", [key], value, None if fits else wanted)

    heads, groups = text.num_attention_heads, text.num_key_value_heads
    check("text_config.num_key_value_heads", groups, heads % groups == 0, f"a divisor of the {heads} attention heads")
    size = vision.image_size
    check("vision_config.patch_size", vision.patch_size, vision.patch_size <= size, f"at most the image_size of {size}")
    tokens, vocabulary = config.image_token_id, text.vocab_size
    check("image_token_index", tokens, tokens < vocabulary, f"less than the vocab_size of {vocabulary}")

    padding = text.pad_token_id
    inside = padding is None or -vocabulary <= padding < vocabulary
    check("text_config.pad_token_id", padding, inside, f"less than the vocab_size of {vocabulary}")

    for height, width in config.image_grid_pinpoints:
        whole = height % size == width % size == 0 and height * width <= MAX_TILES * size * size
        wanted = f"multiples of the vision tower's image_size of {size}, of {MAX_TILES} tiles at most"
        check("image_grid_pinpoints", [height, width], whole, wanted)
    layers, chosen = vision.num_hidden_layers, config.vision_feature_layer
    indices = [chosen] if isinstance(chosen, int) else chosen
    inside = 1 <= len(indices) <= layers + 1 and all(-layers - 1 <= layer <= layers for layer in indices)
    check("vision_feature_layer", chosen, inside, f"from {-layers - 1} to {layers}, for a tower of {layers} layers")
    if vision.model_type in TOWERS:
        strategy, wanted = config.vision_feature_select_strategy, TOWERS[vision.model_type]
        check("vision_feature_select_strategy", strategy, strategy == wanted, f"{wanted} with a {vision.model_type}")

    weights = least_weights(config)
    if weights > weight_bytes:
        raise Damaged(
            f"weights cannot be loaded: config.json describes at least {weights:,} weights, but their files have "
            f"{weight_bytes:,} bytes; the checkpoint is damaged, or config.json is another model's"
        )


def least_weights(config: Any) -> int:
    """How many weights a model with this config has at least: those of embeddings and of the feed-forward layers."""
    text, vision = config.text_config, config.vision_config
    positions = (vision.image_size // vision.patch_size) ** 2
    return int(
        text.vocab_size * text.hidden_size
        + text.num_hidden_layers * 3 * text.hidden_size * text.intermediate_size
        + positions * vision.hidden_size
        + vision.num_hidden_layers * 2 * vision.hidden_size * vision.intermediate_size
    )


def check_fit(processor: Any, config: Any, folder: Path | None) -> None:
    """A processor makes tiles of the size, and writes image tokens of the number, that its model has.

    Args:
        processor: a LLaVA-NeXT one, as transformers has read it, defaults included.
        config: of its model.
        folder: where its files are; None where it has none.

    Raises:
        Damaged: names the file and key in which they differ, and both values.
    """
    images, side = processor.image_processor, config.vision_config.image_size
    strategy = config.vision_feature_select_strategy
    files = _processor_files(folder)
    fits: list[tuple[str, Any, Any, str]] = [
        ("patch_size", processor.patch_size, config.vision_config.patch_size, "vision_config.patch_size"),
        (
            "vision_feature_select_strategy",
            processor.vision_feature_select_strategy,
            strategy,
            "vision_feature_select_strategy",
        ),
        (
            "num_additional_image_tokens",
            processor.num_additional_image_tokens,
            int(strategy == "default"),  # the class token, which that choice drops
            f"vision_feature_select_strategy {strategy}",
        ),
        (
            "image_grid_pinpoints",
            [list(point) for point in images.image_grid_pinpoints],
            [list(point) for point in config.image_grid_pinpoints],
            "image_grid_pinpoints",
        ),
        ("size", _sides(images.size), [side], f"vision_config.image_size {side}"),
        (
            "crop_size",
            _sides(images.crop_size) if images.do_center_crop else [side],
            [side],
            f"vision_config.image_size {side}",
        ),
    ]
    for key, value, wanted, reason in fits:
        file, given = files["image" if key in IMAGE_KEYS else "own"]
        if value != wanted:
            has = shortened(given[key]) if given.get(key) is not None else f"missing, which means {shortened(value)}"
            raise Damaged(
                f"{file}: {key}: {has}; wanted {shortened(wanted[0] if key in SIDES else wanted)}, as config.json has "
                f"{reason}: else the processor would not write as many image tokens as the model makes features"
            )
    wide = np.zeros((side, 2 * side, 3), dtype=np.uint8)
    height, width = images([wide], input_data_format="channels_last")["pixel_values"][0].shape[-2:]
    if (height, width) != (side, side):
        raise Damaged(f"{files['image'][0]}: makes tiles of {height} x {width} pixels; the model takes {side} x {side}")


def _processor_files(folder: Path | None) -> dict[str, tuple[str, dict[str, Any]]]:
    """Which files give what the processor has of its own, and its image processor, and what stands there."""
    own, images = PROCESSOR_FILES
    held = {
        name: read_json(folder, name) if folder is not None and (folder / name).exists() else {}
        for name in (own, images)
    }
    nested = held[own].get("image_processor")
    return {"own": (own, held[own]), "image": (own, nested) if nested else (images, held[images])}


def _sides(size: Any) -> list[int]:
    """The different sides that an image processor's size names."""
    return sorted({side for side in (size.height, size.width, size.shortest_edge) if side is not None}) if size else []
