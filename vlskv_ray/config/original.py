"""The keys of the original project's files, brought into ours: one line for each, never silence."""

import json
from typing import Any

from vlskv_ray.config.draft import Draft, shown
from vlskv_ray.config.options import Config
from vlskv_ray.config.problems import OURS

_PRESETS = {"create_small_llava_next_swiftkv_config": "small-llava-next"}

# Keys with one possible value here, and why: why it changes nothing, and why another value is an error.
_ONLY: dict[tuple[str, ...], tuple[tuple[Any, ...], str]] = {
    ("type",): (("vl_swiftkv",), "there is one trainer"),
    ("model", "type"): (("vl_swiftkv", "vl_swiftkv_model"), "any LLaVA-style model is brought into SwiftKV form"),
    ("data", "type"): (("vl_sft",), "samples with and without images are always read alike"),
    ("data", "mask_inputs"): ((True,), "only the answers are supervised"),
    ("data", "filter_samples"): ((True,), "samples longer than data.max_length are left out and counted"),
    ("data", "pack_samples"): ((False,), "packing samples is not available yet"),
}
_DEEPSPEED_SIZES = {
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
_ENGINE_NOTICES = {
    "type": "there is one checkpoint format, and the final student is a Hugging Face folder",
    "save_every_n_steps": "see checkpoint.every_steps; the final checkpoint is always written",
    "save_every_n_epochs": "see checkpoint.every_steps; the final checkpoint is always written",
    "save_end_of_training": "the final checkpoint is always written",
    "auto_resume": "see the command's --resume",
}
_PADDING = "no effect here: padding goes to the longest sample of the micro-batch"
_NO_EFFECT: dict[tuple[str, ...], str] = {
    ("code",): "no effect here: a config names no code to run",
    ("data", "pad_to"): _PADDING,
    ("data", "div_length"): _PADDING,
}


def rename_original_keys(draft: Draft) -> None:
    """Brings keys of the original project's files into ours: one notice or problem for each, never silence."""
    tokenizer = draft.take_section("tokenizer")
    model = draft.tree.get("model")
    if tokenizer:
        name, own = tokenizer.get("name_or_path"), model.get("name_or_path") if isinstance(model, dict) else None
        if name is None or name == own:
            draft.notice(("tokenizer",), "no effect here: the model's own processor is used")
        else:
            reason = "a tokenizer that is not the model's own has other ids and no image token; remove it"
            draft.problem(("tokenizer", "name_or_path"), f"got {shown(name)}: {reason}")

    for key, (accepted, reason) in _ONLY.items():
        if (value := draft.take(*key)) in accepted:
            draft.notice(key, f"no effect here: {reason}")
        elif value is not None:
            draft.problem(key, f"wanted {json.dumps(accepted[0])}, got {shown(value)}: {reason}")
    for key, reason in _NO_EFFECT.items():
        if draft.take(*key) is not None:
            draft.notice(key, reason)

    _rename_deepspeed(draft)
    _rename_checkpoints(draft)
    for name, value in draft.take_section("logger").items():
        if name == "level":
            draft.rename(("logger", name), ("output", "level"), value.lower() if isinstance(value, str) else value)
        elif name == "output_dir":
            draft.rename(("logger", name), ("output", "dir"), value)
        else:
            draft.notice(("logger", name), "no effect here: the command prints, and writes into the run folder")


def _rename_deepspeed(draft: Draft) -> None:
    block = draft.take_section("deepspeed")
    if not block:
        return
    zero = block.pop("zero_optimization", None)
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if stage == 0:
        draft.notice(("deepspeed",), "ZeRO stage 0 has no effect here")
    else:
        reason = "frozen weights are never sharded, and trained ones are few; for more speed raise cluster.num_workers"
        draft.problem(("deepspeed", "zero_optimization", "stage"), f"wanted 0, got {shown(stage)}: {reason}")
    for name, value in block.items():
        key = ("deepspeed", name)
        if (ours := _DEEPSPEED_SIZES.get(name)) is None:
            draft.notice(key, f"no effect here: see {OURS[name]}" if name in OURS else "no effect here")
        elif value == (own := draft.tree.get(ours, Config.model_fields[ours].default)):
            draft.notice(key, f"no effect here: {ours} says the same")
        else:
            draft.problem(key, f"got {shown(value)}, but {ours} is {shown(own)}; set {ours} and remove this")


def _rename_checkpoints(draft: Draft) -> None:
    if not isinstance(engines := draft.tree.get("checkpoint"), list):
        return
    draft.take("checkpoint")
    for index, engine in enumerate(engines):
        if not isinstance(engine, dict):
            draft.problem(("checkpoint", index), f"wanted keys below it, got {shown(engine)}")
            continue
        for name, value in engine.items():
            key = ("checkpoint", index, name)
            if name == "output_dir":
                draft.rename(key, ("output", "dir"), value)
            elif name == "save_every_n_steps" and value != 0:  # 0 was off
                draft.rename(key, ("checkpoint", "every_steps"), value)
            elif name not in _ENGINE_NOTICES:
                draft.problem(key, f"unknown key; an engine has output_dir, {', '.join(_ENGINE_NOTICES)}")
            elif name == "type" and value != "huggingface":
                draft.problem(key, f"wanted huggingface, got {shown(value)}: {_ENGINE_NOTICES[name]}")
            else:
                draft.notice(key, f"no effect here: {_ENGINE_NOTICES[name]}")


def rename_original_preset(draft: Draft) -> None:
    model = draft.tree.get("model")
    name = model.get("name_or_path") if isinstance(model, dict) else None
    if isinstance(model, dict) and isinstance(name, str) and (preset := _PRESETS.get(name.rpartition(".")[2])):
        draft.notice(("model", "name_or_path"), f"read as the preset {preset}")
        model["name_or_path"] = preset
