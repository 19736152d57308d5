"""What is wrong with a config, in plain words: what was got, what was wanted, and the key that was meant."""

import difflib
import functools
from collections.abc import Iterator
from typing import Any

from pydantic_core import ErrorDetails

from vlskv_ray.config.draft import KeyPath, dotted, shown
from vlskv_ray.config.options import DISTRIBUTIONS, Config

# What other trainers (HF Trainer, TRL, Axolotl, LLaMA-Factory, torchtune, Lightning, ArcticTraining) call our keys.
_OTHER_NAMES = {
    "seed": "random_seed data_seed",
    "epochs": "num_train_epochs num_epochs max_epochs",
    "max_steps": "max_train_steps max_steps_per_epoch train_iters exit_iteration num_train_steps",
    "micro_batch_size": "per_device_train_batch_size per_device_batch_size train_batch_size batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accumulation accumulate_grad_batches",
    "temperature": "kd_temperature distill_temperature",
    "model.name_or_path": "model_name_or_path base_model model_id model_name pretrained_model_name_or_path model_path",
    "model.revision": "model_revision revision_of_model",
    "model.trainable": "trainable_modules unfreeze unfrozen_parameters trainable_parts",
    "model.attn_implementation": "attn_impl flash_attn flash_attention use_flash_attention_2 sdp_attention",
    "model.dtype": "bf16 bfloat16 fp16 torch_dtype precision mixed_precision",
    "data.sources": "dataset datasets dataset_name dataset_path train_file train_files data_files data_path",
    "data.max_length": "max_seq_length max_seq_len cutoff_len sequence_len seq_length seq_len model_max_length",
    "data.num_proc": "dataset_num_proc preprocessing_num_workers dataloader_num_workers dataset_processes",
    "data.cache_dir": "use_data_cache cache_processed_data dataset_prepared_path",
    "data.sources.*.image_root": "image_dir image_folder media_dir image_path",
    "data.sources.*.num_samples": "max_samples max_train_samples",
    "optimizer.type": "optim",
    "optimizer.lr": "learning_rate peak_lr",
    "optimizer.learning_rates.vision_tower": "mm_vision_tower_lr vision_lr vision_tower_lr",
    "optimizer.learning_rates.projector": "mm_projector_lr projector_lr merger_lr aligner_lr",
    "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optimizer.eps": "adam_epsilon epsilon",
    "optimizer.max_grad_norm": "gradient_clipping clip_grad_norm gradient_clip_val grad_clip",
    "scheduler.type": "lr_scheduler_type lr_scheduler",
    "scheduler.warmup_steps": "num_warmup_steps",
    "cluster.num_workers": "num_processes nproc_per_node world_size num_nodes",
    "cluster.stall_seconds": "ddp_timeout",
    "checkpoint.every_steps": "save_steps save_every_n_steps checkpointing_steps save_interval",
    "checkpoint.keep_last": "save_total_limit keep_last_n_checkpoints",
    "output.dir": "output_dir logging_dir default_root_dir",
    "output.name": "run_name experiment_name",
    "output.log_every_steps": "logging_steps log_every_n_steps loss_log_interval log_interval",
    "output.level": "log_level logging_level",
    "output.tensorboard": "report_to",
}
OURS: dict[str, str] = {theirs: ours for ours, names in _OTHER_NAMES.items() for theirs in names.split()}


@functools.cache
def _known_keys() -> dict[KeyPath, dict[str, Any]]:
    """The JSON schema of every key; "*" stands for every index of a list."""
    root = Config.model_json_schema()
    known: dict[KeyPath, dict[str, Any]] = {}

    def add(key: KeyPath, schema: dict[str, Any]) -> None:
        if "$ref" in schema:
            schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
        known[key] = schema
        for name, child in schema.get("properties", {}).items():
            add((*key, name), child)
        for item in schema.get("prefixItems", [schema["items"]] if "items" in schema else [])[:1]:
            add((*key, "*"), item)

    add((), root)
    return known


def _pattern(key: KeyPath) -> KeyPath:
    return tuple("*" if isinstance(part, int) else part for part in key)


def in_plain_words(details: ErrorDetails) -> Iterator[tuple[KeyPath, str]]:
    """What a pydantic error means to the user, and the keys it is about."""
    key, kind = details["loc"], details["type"]
    if kind == "contradiction":
        for name, text in details["ctx"]["problems"].items():
            yield (*key, *filter(None, name.split("."))), text
    elif kind == "value_error":
        yield key, str(details["ctx"]["error"])
    elif kind == "too_short" and details["input"]:
        return  # pydantic counts only the items that are right, and told about each of the others
    elif kind == "extra_forbidden":
        yield key, _unknown(key)
    elif kind == "missing" and not isinstance(key[-1], int):
        yield key, f"missing. {_known_keys()[_pattern(key)]['description']}"
    else:
        if kind == "missing":  # one of the two betas: the list is what is wrong
            key = key[:-1]
        quotes = "; put it in quotes" if kind == "string_type" and isinstance(details["input"], int | float) else ""
        yield key, f"wanted {_wanted(_known_keys()[_pattern(key)])}, got {shown(details['input'])}{quotes}"


def no_option(name: str) -> str | None:
    """What is wrong with the name of an option in a space of options; None where there is one of that name."""
    key: KeyPath = tuple("*" if part.isdecimal() else part for part in name.split("."))
    known = _known_keys()
    if key in known:
        return "is a section; name its options" if "properties" in known[key] else None
    if key[:-1] in known and "properties" not in known[key[:-1]] and len(key) > 2:
        return f"{key[-1]!r} is none of {', '.join(DISTRIBUTIONS)}"
    return _unknown(tuple(name.split(".")))


_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _wanted(schema: dict[str, Any]) -> str:
    """What a key's schema allows, in plain words."""
    if "anyOf" in schema:
        return " or ".join(_wanted(choice) for choice in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    match schema["type"]:
        case "object":
            return "keys below it"
        case "array":
            count, most = schema.get("minItems", 0), schema.get("maxItems")
            if count == most:
                return f"a list of {count} values"
            return f"a list of at least {count}" if count else "a list"
        case "string":
            return "text"
        case "boolean":
            return "true or false"
        case "null":
            return "null"
    bounds = [f"{sign} {schema[name]:.16g}" for name, sign in _BOUNDS.items() if name in schema]
    return " ".join(["an integer" if schema["type"] == "integer" else "a number", " and ".join(bounds)]).strip()


def _unknown(key: KeyPath) -> str:
    """Suggests the key that was meant: by another trainer's name for it, else by spelling; or lists what there is."""
    leaf = str(key[-1])[-64:].lower().replace("-", "_")
    pattern = _pattern(key[:-1])
    siblings = [name for name in _known_keys() if name and name[:-1] == pattern]
    in_list = "*" in pattern
    # a key of a list's entries is meant only where its name is exactly right: `data.image_root`
    candidates = siblings if in_list else [n for n in _known_keys() if n and ("*" not in n or n[-1] == leaf)]

    def closeness(name: KeyPath) -> float:
        ratio = difflib.SequenceMatcher(None, leaf.rpartition(".")[2], str(name[-1])).ratio()
        return ratio + 0.1 * (name[:-1] == pattern)

    meant: KeyPath = tuple(OURS.get(leaf, "").split("."))
    if leaf not in OURS or (in_list and meant[:-1] != pattern):
        meant = max(candidates, key=closeness)
        if closeness(meant) < 0.75:
            return f"unknown key; the keys here are {', '.join(str(name[-1]) for name in siblings)}"
    suggestion = dotted((*key[:-1], meant[-1]) if in_list else meant).replace("*", "0")
    if suggestion == dotted(key):
        section, _, name = suggestion.rpartition(".")
        return f"unknown key; in a file write `{name}:` indented below `{section}:`"
    return f"unknown key, did you mean {suggestion}?"
