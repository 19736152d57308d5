"""A vision tower: one that people have, or a small new one; with the projector that was trained behind it, if any."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel, SiglipVisionModel

from vlskv_ray.model import presets
from vlskv_ray.model.build import LIBRARY_ERRORS, find_model, naming_model, one_line, quiet_transformers
from vlskv_ray.model.folder import read_json
from vlskv_ray.model.sanity import VISION, check_image_processor, check_sections, processor_files
from vlskv_ray.model.wrappers import PROJECTOR
from vlskv_ray.model.wrappers.llava_next import part_of

TOWERS = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}
"""By the model_type of their config.json: a whole CLIP or SigLIP, or its vision tower alone."""
READ = ("image_mean", "image_std", "rescale_factor", "resample", "do_rescale", "do_normalize", "do_convert_rgb")
"""What of a tower's image processor says how it sees a picture; sizes follow from the tower."""
MOST_PATCHES = 2**14
"""Of a picture in a new tower: each becomes a feature, and is attended to by all."""
HEAD_SIZE = 32
"""Of a new tower."""
PROJECTOR_FILE = "projector.safetensors"
"""Beside a tower's own files: the projector that was trained with it. How it sees is in the metadata of the file."""
LAYER, GRID = "vision_feature_layer", "grid"
"""That metadata: JSON by key."""


@dataclass(frozen=True)
class Projector:
    """What was trained between a tower and a text model, and how the two saw pictures then."""

    weights: dict[str, Tensor]
    """By their names in a LLaVA-NeXT."""
    feature_layer: int
    grid: tuple[tuple[int, int], ...]
    """Rows and columns of the tiles that a picture is seen in."""


@dataclass(frozen=True)
class VisionTower:
    """A stock vision tower, and how its pictures are prepared."""

    name: str
    """As the user has it."""
    model: Any
    """A stock model, for evaluation."""
    image_processor: dict[str, Any] = field(default_factory=dict)
    """What its image processor has other than a stock one: mean, deviation, filter."""
    is_new: bool = False
    projector: Projector | None = None
    """The trained one that comes with it."""

    @property
    def config(self) -> Any:
        return self.model.config


@dataclass(frozen=True)
class NewTower:
    """The size of a CLIP tower that is drawn."""

    image_size: int = 64
    """Side of a picture in pixels."""
    patch_size: int = 8
    width: int = 192
    layers: int = 6

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"--image-size: {self.image_size}; wanted a multiple of the --patch-size {self.patch_size}"
            )
        if (self.image_size // self.patch_size) ** 2 > MOST_PATCHES:
            raise ValueError(
                f"--patch-size: {self.patch_size} makes {(self.image_size // self.patch_size) ** 2:,} patches of a "
                f"picture of --image-size {self.image_size}; wanted {MOST_PATCHES:,} at most: a larger patch"
            )
        if self.width % HEAD_SIZE:
            raise ValueError(f"--vision-width: {self.width}; wanted a multiple of {HEAD_SIZE}, the width of a head")


def draw_tower(size: NewTower, seed: int, dtype: torch.dtype) -> VisionTower:
    """A new tower with random weights, leaving the global random state as it was."""
    config = CLIPVisionConfig(
        image_size=size.image_size,
        patch_size=size.patch_size,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // HEAD_SIZE,
        projection_dim=size.width,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPVisionModel(config)
    return VisionTower(f"new, drawn from seed {seed}", model.to(dtype).eval(), is_new=True)


def read_tower(name: str, dtype: torch.dtype) -> VisionTower:
    """A CLIP or SigLIP tower.

    Args:
        name: a folder or a hub id, of the tower alone or of the whole model.
        dtype: of its weights.

    Raises:
        ValueError: there is none, it is of another kind, or cannot be read.
    """
    files = find_model(name)
    folder = files.folder
    if folder is None or folder in presets.SHIPPED.values():
        raise ValueError(
            f"{name} is a whole vision-language model; wanted a vision tower, such as openai/clip-vit-base-patch16"
        )
    with naming_model(files):
        declared = read_json(folder, "config.json")
        check_sections(declared, {"": VISION, "vision_config": VISION})
        found = list(processor_files(folder))
        for file, _, section, images in found:
            check_image_processor(file, section, images)
    kind = declared.get("model_type")
    if not isinstance(kind, str) or kind not in TOWERS:
        raise ValueError(f"{name} is a {kind!r}; wanted a vision tower: {', '.join(TOWERS)}")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            config = getattr(config, "vision_config", config)
            model, report = TOWERS[kind].from_pretrained(
                folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
    except (*LIBRARY_ERRORS, SafetensorError) as error:
        raise ValueError(f"{name}: cannot be loaded: {one_line(error)}") from error
    if lacking := sorted(report["missing_keys"]):
        raise ValueError(f"{name}: {len(lacking)} weights of the tower are missing, such as {lacking[0]}")
    if not found:
        raise ValueError(
            f"{name}: has no preprocessor_config.json, which says how its pictures are scaled; put the file of the "
            f"original model there"
        )
    *_, images = found[0]
    scale = {key: images[key] for key in READ if images.get(key) is not None}
    return VisionTower(name, model.eval(), scale, projector=read_projector(folder / PROJECTOR_FILE))


def read_projector(file: Path) -> Projector | None:
    """The trained projector in a file as `write_tower` writes it; None where there is no such file.

    Raises:
        ValueError: it is another kind of file, or does not say how pictures are seen.
    """
    if not file.exists():
        return None
    try:
        weights = load_file(file)
        with safe_open(file, "pt") as stored:
            said = stored.metadata() or {}
        layer, grid = json.loads(said[LAYER]), json.loads(said[GRID])
        pairs = tuple((int(rows), int(columns)) for rows, columns in grid)
        return Projector(weights, int(layer), pairs)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: is no trained projector: {one_line(error)}; wanted safetensors with {LAYER} and {GRID} in their "
            f"metadata; without the file a new projector is drawn"
        ) from error


def write_tower(model: Any, image_processor: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    """Writes a LLaVA-NeXT's vision tower and projector into a new folder, for `read_tower`.

    Args:
        model: a stock LLaVA-NeXT whose vision_feature_layer is one number.
        image_processor: its image processor's options.
        folder: to write.
        dtype: of the weights in it.
    """
    model.model.vision_tower.to(dtype).save_pretrained(folder)
    scale = {key: image_processor[key] for key in READ if image_processor.get(key) is not None}
    (folder / "preprocessor_config.json").write_text(json.dumps(scale, indent=2) + "\n")
    side = model.config.vision_config.image_size
    grid = [[height // side, width // side] for height, width in model.config.image_grid_pinpoints]
    said = {LAYER: json.dumps(model.config.vision_feature_layer), GRID: json.dumps(grid)}
    weights = {name: weight for name, weight in model.state_dict().items() if part_of(name) == PROJECTOR}
    save_file({name: weight.to(dtype).contiguous() for name, weight in weights.items()}, folder / PROJECTOR_FILE, said)
