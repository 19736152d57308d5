"""Which part of a model each weight belongs to, and that only those of some parts train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlskv_ray.model.build import build_plain, build_student, find_model, load_config, parameter_counts, swiftkv_config
from vlskv_ray.model.parts import PARTS, PLAIN_PARTS, part_of, part_sizes
from vlskv_ray.model.swiftkv import BACKBONES


def sizes_by_module(model: Any) -> dict[str, int]:
    """The weights of each part, by where its modules are; those of a student counted apart."""
    inner = model.model
    of_text = {*inner.language_model.parameters(), *model.lm_head.parameters()}
    of_student = {weight for name, weight in inner.language_model.named_parameters() if "_swiftkv" in name}
    modules = {
        "vision_tower": {*inner.vision_tower.parameters()},
        "projector": {*inner.multi_modal_projector.parameters(), inner.image_newline},
        "text": of_text - of_student,
        "swiftkv": of_student,
    }
    return {part: sum(weight.numel() for weight in weights) for part, weights in modules.items() if weights}


@pytest.mark.parametrize(("backbone", "tied"), [*((backbone, False) for backbone in BACKBONES), ("llama", True)])
def test_every_weight_is_of_one_part(teacher_folder: Callable[..., Path], backbone: str, tied: bool) -> None:
    """Tied ones are the text model's, once, whether weights are loaded or not."""
    files = find_model(str(teacher_folder(backbone, tie_word_embeddings=tied)))
    config = load_config(files)
    for model, model_config, parts in (
        (build_plain(files), config, PLAIN_PARTS),
        (build_student(files, 2, 2), swiftkv_config(config, 2, 2), PARTS),
    ):
        sizes = sizes_by_module(model)
        assert part_sizes(model) == sizes == parameter_counts(files, model_config) and (*sizes,) == parts
        assert sum(sizes.values()) == model.num_parameters()
        assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied


@pytest.mark.parametrize("trained", [("vision_tower", "projector"), ("text",), ("projector", "text"), PLAIN_PARTS])
def test_what_trains_is_float32_and_exact(teacher_folder: Callable[..., Path], trained: tuple[str, ...]) -> None:
    """Whatever the type of the rest, which is the checkpoint's rounded to it."""
    files = find_model(str(teacher_folder()))
    model, whole = build_plain(files, trained=trained, dtype=torch.bfloat16), build_plain(files).state_dict()
    for name, weight in model.named_parameters():
        trains = part_of("llava_next", name) in trained
        assert weight.requires_grad == trains and weight.dtype == (torch.float32 if trains else torch.bfloat16), name
        assert torch.equal(weight, whole[name].to(weight.dtype)), name
