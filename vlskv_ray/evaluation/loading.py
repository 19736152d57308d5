"""A model and its processor as a command names them, ready to answer."""

from typing import Any

import torch

from vlskv_ray.command import name_option
from vlskv_ray.data.check import check_processor
from vlskv_ray.model.build import (
    ModelFiles,
    build_plain,
    build_student,
    device_of,
    find_model,
    load_config,
    usable_generation_config,
)
from vlskv_ray.model.processor import load_processor
from vlskv_ray.model.swiftkv import has_swiftkv, swiftkv_backbone
from vlskv_ray.model.wrappers import wrapper_of


def device_asked_for(option: str | None) -> torch.device:
    """What `--device` names. ValueError where there is no such device."""
    with name_option("--device", "cluster.use_gpu"):
        return device_of(option)


def load(
    name_or_path: str, *, teacher: bool = False, for_samples: bool = False, beside: tuple[Any, Any] | None = None
) -> tuple[Any, Any]:
    """A checkpoint's model and processor, ready to answer; SwiftKV on, or off for the teacher.

    Args:
        name_or_path: as `find_model` takes it.
        teacher: it answers without SwiftKV, and need not have any.
        for_samples: it is to answer samples of data, not a prompt; prints what its chat template makes of them.
        beside: config and processor of a student of which this is another teacher, named by `--teacher`.

    Raises:
        ValueError: there is no such model, it cannot be loaded, it has no SwiftKV weights to answer with, or it reads
            other tokens or pixels than the student beside it.
    """
    with name_option("--teacher" if beside else "--model"):
        files = find_model(name_or_path)
        config = load_config(files)
        is_student = has_swiftkv(config)
        if not is_student and not teacher:
            remedy = (
                "wanted a student, such as the folder final/ of a run"
                if for_samples
                else "--teacher shows what it answers, a distilled student is in the folder final/ of its run"
            )
            raise ValueError(f"{name_or_path} holds no SwiftKV weights; {remedy}")
        processor = load_processor(files)
        if beside:
            check_same_reading(name_or_path, (config, processor), beside)
        if for_samples:
            for notice in check_processor(files, processor):
                print(f"warning: {notice}")
        model = build_side(files, is_student=is_student, teacher=teacher)
    return model, processor


def build_side(files: ModelFiles, *, is_student: bool, teacher: bool) -> Any:
    """The model of these files, ready to answer: a student's, by SwiftKV unless it is to be the `teacher`, or a plain
    one. ValueError where it cannot be loaded."""
    model = build_student(files) if is_student else build_plain(files)
    with usable_generation_config(files.name_or_path), torch.inference_mode():
        model.generate(input_ids=torch.zeros(1, 1, dtype=torch.long), max_new_tokens=1)
    if is_student:
        swiftkv_backbone(model).config.swiftkv = not teacher
    return model


def check_same_reading(name_or_path: str, teacher: tuple[Any, Any], student: tuple[Any, Any]) -> None:
    """ValueError where two models, each given as config and processor, are made for other tokens or pixels."""
    its, mine = what_is_read(*teacher), what_is_read(*student)
    if different := [name for name in {**mine, **its} if mine.get(name) != its.get(name)]:
        raise ValueError(
            f"{name_or_path} has another {', another '.join(different)} than the student, so that they cannot be "
            f"compared token by token"
        )


def what_is_read(config: Any, processor: Any) -> dict[str, Any]:
    """What decides which tokens and pixels a model is made for, in words for a reader."""
    return {
        "vocabulary": (processor.tokenizer.get_vocab(), config.text_config.vocab_size, config.image_token_id),
        **wrapper_of(config.model_type).what_is_read(config, processor),
    }
