"""LLaVA-NeXT, also called LLaVA-v1.6: an image as a whole, and in tiles of a grid that fits its shape best.

Shapes: I images, P tiles of the image with most, S side of a tile in pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import LlavaNextConfig, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from vlskv_ray.model.folder import PROCESSOR_FILES, Damaged, read_json, shortened
from vlskv_ray.model.sanity import (
    IMAGE_SIDES,
    VISION,
    Number,
    check_image_processor,
    check_numbers,
    check_sections,
    check_value,
    processor_files,
)
from vlskv_ray.model.wrappers.wrapper import PROJECTOR, TEXT, VISION_TOWER, ImageInputs

MODEL_TYPE = "llava_next"
PROCESSOR_CLASSES: tuple[str, ...] = ("LlavaNextProcessor",)
IMAGE_PROCESSOR_CLASSES: tuple[str, ...] = (
    "LlavaNextImageProcessor",
    "LlavaNextImageProcessorFast",
    "LlavaNextImageProcessorPil",
)

# ------------------------------------------------------------------------------------------------------------ its files
PATCH_SIZE = Number(1, 1024, "CLIP has 14 to 32")
NUMBERS = {
    "": {
        "image_token_index": Number(0, 2**22, "as many as there are tokens"),
        "image_seq_length": Number(1, 2**20, "llava's 576"),
    },
    "vision_config": VISION
    | {
        "image_size": Number(1, 4096, "InternVL's towers have 448, PaliGemma's 896"),
        "patch_size": PATCH_SIZE,
        "projection_dim": Number(1, 2**16, "CLIP has 768"),
        "initializer_factor": Number(0, 1000, "1 as a rule", whole=False),
    },
}
PROCESSOR_NUMBERS = {
    "patch_size": PATCH_SIZE,
    "num_additional_image_tokens": Number(0, 16, "1 for a tower with a class token, else 0"),
}
GRID_SIDE = Number(1, 2**16, "granite-vision has 3840")
MAX_PINPOINTS = 256
"""granite-vision has 27, llava-onevision 36."""
IMAGE_KEYS = ("image_grid_pinpoints", *IMAGE_SIDES)
"""Of the image processor; others are the processor's own."""
MAX_TILES = 256
"""Of one picture: 336 px ones take 87 MB as bytes. granite-vision has 10, llava-onevision 36."""
TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}
"""Vision towers, and the choice of their features that leaves one for each patch: only those fill a grid."""


def check_config(declared: dict[str, Any]) -> None:
    """See `Wrapper`."""
    check_sections(declared, NUMBERS)
    _check_pinpoints("config.json", "", declared)


def check_relations(config: Any) -> None:
    """See `Wrapper`."""
    vision, size = config.vision_config, config.vision_config.image_size

    def check(key: str, value: Any, fits: bool, wanted: str) -> None:
        check_value("config.json", [key], value, None if fits else wanted)

    check("vision_config.patch_size", vision.patch_size, vision.patch_size <= size, f"at most the image_size of {size}")
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


def least_vision_weights(config: Any) -> int:
    """See `Wrapper`: those of positions and of the feed-forward layers."""
    vision = config.vision_config
    positions = (vision.image_size // vision.patch_size) ** 2
    return int(vision.hidden_size * (positions + vision.num_hidden_layers * 2 * vision.intermediate_size))


def part_of(name: str) -> str:
    """See `Wrapper`. What ends a row of tiles is made in the projector's space, and learnt with it."""
    if name.startswith("model.vision_tower."):
        return VISION_TOWER
    return PROJECTOR if name.startswith(("model.multi_modal_projector.", "model.image_newline")) else TEXT


def check_processor_files(folder: Path) -> None:
    """See `Wrapper`."""
    for name, content, section, images in processor_files(folder):
        check_numbers(name, "", content, PROCESSOR_NUMBERS)
        strategy = content.get("vision_feature_select_strategy")
        wanted = None if strategy in (None, "default", "full") else "default or full"
        check_value(name, ["vision_feature_select_strategy"], strategy, wanted)
        check_image_processor(name, section, images)
        _check_pinpoints(name, section, images)


def _check_pinpoints(name: str, section: str, values: Mapping[str, Any]) -> None:
    points = values.get("image_grid_pinpoints")
    if points is None:
        return
    wanted = f"1 to {MAX_PINPOINTS} pairs of height and width, each {GRID_SIDE.problem(None)}"
    few = isinstance(points, list) and 1 <= len(points) <= MAX_PINPOINTS
    pairs = few and all(
        isinstance(point, list) and len(point) == 2 and not any(map(GRID_SIDE.problem, point)) for point in points
    )
    check_value(name, (section, "image_grid_pinpoints"), points, None if pairs else wanted)


def check_fit(processor: Any, config: Any, folder: Path | None) -> None:
    """See `Wrapper`."""
    _complete(processor, config)
    files, side = _given_in(folder), config.vision_config.image_size
    for key, (value, wanted, reason) in _fits(processor, config).items():
        name, given = files["image" if key in IMAGE_KEYS else "own"]
        if value != wanted:
            has = shortened(given[key]) if given.get(key) is not None else f"missing, which means {shortened(value)}"
            raise Damaged(
                f"{name}: {key}: {has}; wanted {shortened(wanted[0] if key in IMAGE_SIDES else wanted)}, as "
                f"config.json has {reason}: else the processor would not write as many image tokens as the model makes "
                f"features"
            )
    wide = np.zeros((side, 2 * side, 3), dtype=np.uint8)
    made = processor.image_processor([wide], input_data_format="channels_last")["pixel_values"][0]
    height, width = made.shape[-2:]
    if (height, width) != (side, side):
        raise Damaged(f"{files['image'][0]}: makes tiles of {height} x {width} pixels; the model takes {side} x {side}")


def _complete(processor: Any, config: Any) -> None:
    """Processors saved by older versions leave patches, and with them the class token, to the model's config."""
    if processor.patch_size is processor.vision_feature_select_strategy is None:
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        if not processor.num_additional_image_tokens:
            processor.num_additional_image_tokens = int(config.vision_feature_select_strategy == "default")


def _fits(processor: Any, config: Any) -> dict[str, tuple[Any, Any, str]]:
    """What must be equal, by key of the processor's files: its value, the model's, and what config.json has for it."""
    images, vision, strategy = processor.image_processor, config.vision_config, config.vision_feature_select_strategy
    side, of_side = [vision.image_size], f"vision_config.image_size {vision.image_size}"
    grid, of_model = ([list(point) for point in x.image_grid_pinpoints] for x in (images, config))
    return {
        "patch_size": (processor.patch_size, vision.patch_size, "vision_config.patch_size"),
        "vision_feature_select_strategy": (
            processor.vision_feature_select_strategy,
            strategy,
            "vision_feature_select_strategy",
        ),
        "num_additional_image_tokens": (
            processor.num_additional_image_tokens,
            int(strategy == "default"),  # the class token, which that choice drops
            f"vision_feature_select_strategy {strategy}",
        ),
        "image_grid_pinpoints": (grid, of_model, "image_grid_pinpoints"),
        "size": (_sides(images.size), side, of_side),
        "crop_size": (_sides(images.crop_size) if images.do_center_crop else side, side, of_side),
    }


def _given_in(folder: Path | None) -> dict[str, tuple[str, dict[str, Any]]]:
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


def what_is_read(config: Any, processor: Any) -> dict[str, Any]:
    """See `Wrapper`."""
    vision, images = config.vision_config, processor.image_processor
    return {
        "image size": (vision.image_size, vision.patch_size),
        "grid of image tiles": [tuple(point) for point in config.image_grid_pinpoints],
        "choice of image features": config.vision_feature_select_strategy,
        "scale of pixels": (list(images.image_mean), list(images.image_std)),
    }


# ------------------------------------------------------------------------------------------------------ made from parts
def make_config(text_config: Any, vision_config: Any, image_token_id: int, grid: Sequence[tuple[int, int]]) -> Any:
    """The config of a model of these parts.

    Args:
        text_config: of its text model.
        vision_config: of a CLIP or SigLIP tower.
        image_token_id: of the token that stands for a feature of an image.
        grid: rows and columns of the tiles that a picture may be seen in, beside the whole of it.
    """
    side = vision_config.image_size
    return LlavaNextConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_token_id,
        image_grid_pinpoints=[[rows * side, columns * side] for rows, columns in grid],
        vision_feature_select_strategy=TOWERS[vision_config.model_type],
        tie_word_embeddings=text_config.tie_word_embeddings,
    )


def make_processor(config: Any, tokenizer: Any, chat_template: str, **image_processor_options: Any) -> Any:
    """The stock processor, Pillow backend, that fits a config.

    Args:
        config: of the model.
        tokenizer: of its text model, which has the image token.
        chat_template: which renders pictures.
        image_processor_options: other than a stock one's; sizes follow from the config.
    """
    side, strategy = config.vision_config.image_size, config.vision_feature_select_strategy
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=config.image_grid_pinpoints,
        **image_processor_options,
    )
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),  # CLIP's class token
        chat_template=chat_template,
    )


# ----------------------------------------------------------------------------------------------------------- its images
def prepare_images(
    processor: Any, images: Sequence[Image.Image], *, as_bytes: bool = True
) -> tuple[list[ImageInputs], list[str]]:
    """See `Wrapper`.

    As bytes: the stock image processor without its last two steps, which `_normalisation` describes. Nor does it resize
    and crop tiles that are of the right size already.
    """
    image_processor = processor.image_processor
    options = {"do_pad": False}  # a batch pads them
    if as_bytes:
        options |= {"do_rescale": False, "do_normalize": False}
        size, crop = image_processor.size, image_processor.crop_size
        if crop and size.shortest_edge == crop.height == crop.width:  # as it cuts them
            options |= {"do_resize": False, "do_center_crop": False}
    processed = image_processor(list(images), input_data_format="channels_last", **options)
    scale = {"normalise": _normalisation(image_processor)} if as_bytes else {}
    inputs = [
        ImageInputs(
            sizes={"image_sizes": np.asarray(size, dtype=np.int64)},  # height, width
            pixels={"tiles": np.ascontiguousarray(tiles), **scale},
        )
        for tiles, size in zip(processed["pixel_values"], processed["image_sizes"], strict=True)
    ]
    return inputs, [processor.replace_image_token(processed, image_idx=i) for i in range(len(images))]


def _normalisation(image_processor: Any) -> NDArray[np.float32]:
    """[2, 3]: what a stock image processor multiplies each channel of a byte by, and then adds."""
    scale, shift = np.ones(3), np.zeros(3)
    if image_processor.do_rescale:
        scale *= image_processor.rescale_factor
    if image_processor.do_normalize:
        deviation = np.asarray(image_processor.image_std)
        scale, shift = scale / deviation, -np.asarray(image_processor.image_mean) / deviation
    return np.stack(np.broadcast_arrays(scale, shift)).astype(np.float32)


def num_features(config: Any, sizes: Mapping[str, Any]) -> int:
    """See `Wrapper`."""
    height, width = sizes["image_sizes"].tolist()
    return num_image_features(config, (height, width))


def num_image_features(config: Any, image_size: tuple[int, int]) -> int:
    """How many features a model makes of an image (height, width), by its own arithmetic on shapes."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    rows, columns = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, vision.image_size)
    height, width = unpad_image(torch.empty(1, rows * side, columns * side, device="meta"), image_size).shape[1:]
    whole = side * side  # a feature for each patch: a class token has no place in the grid of the tiles
    return whole + height * (width + 1)  # each row of the grid ends in a newline


def model_inputs(config: Any, batch: Any) -> dict[str, Tensor]:
    """See `Wrapper`. `tiles` uint8[I, P, 3, S, S], a quarter of what the model sees, and `normalise` float32[I, 2, 3];
    or float32 tiles alone. The model drops those that are padding, by `image_sizes`."""
    if not batch.pixels:
        return {}
    tiles = batch.pixels["tiles"]
    if "normalise" in batch.pixels:
        scale, shift = batch.pixels["normalise"][:, :, None, :, None, None].unbind(1)  # [I, 1, 3, 1, 1] each
        tiles = tiles * scale + shift
    return {"pixel_values": tiles, "image_sizes": batch.sizes["image_sizes"]}
