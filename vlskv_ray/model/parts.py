"""The parts of a model, each weight of which belongs to one, and which of them train."""

from collections.abc import Collection
from typing import Any

import torch

from vlskv_ray.model.wrappers import PROJECTOR, TEXT, VISION_TOWER, wrapper_of

SWIFTKV = "swiftkv"
"""What a student has beside its teacher."""
PLAIN_PARTS = (VISION_TOWER, PROJECTOR, TEXT)
PARTS = (*PLAIN_PARTS, SWIFTKV)


def part_of(model_type: str, name: str) -> str:
    """The part of a model of this type that the weight of this name belongs to."""
    return SWIFTKV if "_swiftkv" in name else wrapper_of(model_type).part_of(name)


def part_sizes(model: Any) -> dict[str, int]:
    """How many weights each part of a model has, in the order of `PARTS`; those that are tied count once."""
    sizes = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        sizes[part_of(model.config.model_type, name)] += parameter.numel()
    return {part: size for part, size in sizes.items() if size}


def freeze_all_but(model: Any, trained: Collection[str], dtype: torch.dtype) -> Any:
    """The model, of which only these parts train: their weights are float32 at least, all others of `dtype`.

    No dropout anywhere: what is frozen is the same each time, and what is learnt does not depend on where a run was
    interrupted. Autograd then makes no graph, and no gradient, of what no trained weight comes before.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(model.config.model_type, name) in trained)
        wanted = torch.promote_types(parameter.dtype, torch.float32) if parameter.requires_grad else dtype
        parameter.data = parameter.data.to(wanted)
    return model.eval()
