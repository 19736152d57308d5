"""Families of vision-language models, each with all that it has of its own in one file of this folder.

A family is a module with the names of `Wrapper`, and one call of `register`. The rest of the package reaches it by
`wrapper_of` only, and never looks into what it keeps of images.
"""

from vlskv_ray.model.wrappers import llava_next
from vlskv_ray.model.wrappers.wrapper import PROJECTOR, TEXT, VISION_TOWER, ImageInputs, Wrapper

__all__ = ["FAMILIES", "PROJECTOR", "TEXT", "VISION_TOWER", "ImageInputs", "Wrapper", "register", "wrapper_of"]

FAMILIES: dict[str, Wrapper] = {}
"""Those that are registered, by model type; no other is accepted."""


def register(wrapper: Wrapper) -> None:
    """Makes models of a family known."""
    FAMILIES[wrapper.MODEL_TYPE] = wrapper


def wrapper_of(model_type: str | None) -> Wrapper:
    """The family of models of this type. ValueError where it is none of those known."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


register(llava_next)
