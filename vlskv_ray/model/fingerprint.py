"""What tells one model from another: by its files, or by the teacher that is in them."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vlskv_ray.model.build import ModelFiles, load_config
from vlskv_ray.model.folder import weight_files
from vlskv_ray.model.processor import load_processor

OF_SAVING = {"_name_or_path", "architectures", "dtype", "transformers_version"}
"""Keys of a config that say how and where a model was saved."""
OF_STUDENT = {"swiftkv", "num_key_value_layers", "key_value_group_size"}
"""Keys that a student's config has beside its teacher's."""

LEVELS = {"model", "language_model", "vision_model"}
"""Parts of the names of weights that are there or not by the version of transformers that saved a model."""


def fingerprint_of(files: ModelFiles) -> str:
    """Tells one model from another: a preset by its name, files by their sizes and both ends of each."""
    if files.folder is None:
        return files.name_or_path
    digest = hashlib.sha256()
    patterns = ("*.json", "*.jinja", "*.safetensors")
    for path in sorted(path for pattern in patterns for path in files.folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


def teacher_fingerprint(files: ModelFiles, dtype: torch.dtype) -> str:
    """Tells one teacher from another by all that what it makes of a sample depends on, read to the last byte.

    It is the same for the folder of a teacher, in however many files, and for that of any student of it, such as
    `final/` of a run: SwiftKV weights do not count, nor does how either was saved.

    Args:
        files: of a teacher or a student.
        dtype: of frozen weights, to which those in the files are rounded.
    """
    if files.folder is None:
        return files.name_or_path
    digest = hashlib.sha256(json.dumps(_config_of_teacher(files), sort_keys=True).encode())
    for name, content in _processor_as_saved(files):
        digest.update(f"{name} {len(content)} ".encode() + content)
    held = {name: file for file in weight_files(files.folder) for name in _names(files.folder / file)}
    known_as = {name: ".".join(level for level in name.split(".") if level not in LEVELS) for name in held}
    for name in sorted((name for name in held if "_swiftkv" not in name), key=lambda name: (known_as[name], name)):
        with safe_open(files.folder / held[name], "pt") as opened:
            weight = opened.get_tensor(name)
        digest.update(f"{known_as[name]} {tuple(weight.shape)} ".encode())
        digest.update(weight.to(dtype).reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _config_of_teacher(files: ModelFiles) -> dict[str, Any]:
    """The config with all its defaults, as it would be without SwiftKV and however it was saved."""

    def kept(values: dict[str, Any]) -> dict[str, Any]:
        return {
            key: kept(value) if isinstance(value, dict) else value
            for key, value in values.items()
            if key not in OF_SAVING
        }

    config = kept(load_config(files).to_dict())
    text = {key: value for key, value in config["text_config"].items() if key not in OF_STUDENT}
    return config | {"text_config": text | {"model_type": text["model_type"].removesuffix("_swiftkv")}}


def _processor_as_saved(files: ModelFiles) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of a processor, as transformers writes them: whatever it reads is in them, and
    older files with the same in another form make the same ones."""
    processor = load_processor(files, tried=True)
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            yield path.relative_to(folder).as_posix(), path.read_bytes()
