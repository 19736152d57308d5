"""A model and its processor as a command names them, ready to answer."""

from typing import Any

import torch

from vlskv_ray.command import told_of
from vlskv_ray.data.check import check_processor
from vlskv_ray.model.build import (
    LIBRARY_ERRORS,
    build_plain,
    build_student,
    device_of,
    find_model,
    load_config,
    load_processor,
    one_line,
)
from vlskv_ray.model.swiftkv import has_swiftkv, swiftkv_backbone


def device_asked_for(option: str | None) -> torch.device:
    """What `--device` names. ValueError where there is no such device."""
    with told_of("--device", "cluster.use_gpu"):
        return device_of(option)


def load(name_or_path: str, *, teacher: bool = False) -> tuple[Any, Any]:
    """A checkpoint's model and processor; SwiftKV on, or off for the teacher.

    Raises:
        ValueError: there is no such model, it cannot be loaded, or it has no SwiftKV weights to answer with.
    """
    with told_of("--model"):
        files = find_model(name_or_path)
        is_student = has_swiftkv(load_config(files))
        if not is_student and not teacher:
            raise ValueError(
                f"{name_or_path} holds no SwiftKV weights; --teacher shows what it answers, a distilled student is in "
                f"the folder final/ of its run"
            )
        processor = load_processor(files)
        model = build_student(files) if is_student else build_plain(files)
        check_generation(model, name_or_path)
    if is_student:
        swiftkv_backbone(model).config.swiftkv = not teacher
    return model, processor


@torch.inference_mode()
def check_generation(model: Any, name_or_path: str) -> None:
    """ValueError where the checkpoint's own settings for `generate` let it answer nothing."""
    try:
        model.generate(input_ids=torch.zeros(1, 1, dtype=torch.long), max_new_tokens=1)
    except LIBRARY_ERRORS as error:
        raise ValueError(
            f"{name_or_path}: generation_config.json cannot be used: {one_line(error)}; mend it, or remove the file"
        ) from error


def student(name_or_path: str) -> tuple[Any, Any]:
    """A student and its processor. ValueError if there is no such model, or it has no SwiftKV weights."""
    with told_of("--model"):
        files = find_model(name_or_path)
        if not has_swiftkv(load_config(files)):
            raise ValueError(
                f"{name_or_path} holds no SwiftKV weights; wanted a student, such as the folder final/ of a run"
            )
        processor = load_processor(files)
        for notice in check_processor(files, processor):
            print(f"warning: {notice}")
        model = build_student(files)
        check_generation(model, name_or_path)
        return model, processor


def other_teacher(name_or_path: str, student_config: Any, student_processor: Any) -> Any:
    """Another teacher. ValueError if there is no such model, or it reads other tokens or pixels than the student."""
    with told_of("--teacher"):
        files = find_model(name_or_path)
        config = load_config(files)
        mine, its = what_is_read(student_config, student_processor), what_is_read(config, load_processor(files))
        if different := [name for name in mine if mine[name] != its[name]]:
            raise ValueError(
                f"{name_or_path} has another {', another '.join(different)} than the student, so that they cannot be "
                f"compared token by token"
            )
        is_student = has_swiftkv(config)
        return build_student(files) if is_student else build_plain(files)


def what_is_read(config: Any, processor: Any) -> dict[str, Any]:
    """What decides which tokens and pixels a model is made for, in words for a reader."""
    vision, images = config.vision_config, processor.image_processor
    return {
        "vocabulary": (processor.tokenizer.get_vocab(), config.text_config.vocab_size, config.image_token_id),
        "image size": (vision.image_size, vision.patch_size),
        "grid of image tiles": [tuple(point) for point in config.image_grid_pinpoints],
        "choice of image features": config.vision_feature_select_strategy,
        "scale of pixels": (list(images.image_mean), list(images.image_std)),
    }
