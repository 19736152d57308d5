"""A text model as people have it: a folder, a hub id or a GGUF file."""

import os
import struct
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vlskv_ray.model import presets
from vlskv_ray.model.build import LIBRARY_ERRORS, find_model, naming_model, one_line, quiet_transformers
from vlskv_ray.model.folder import read_json
from vlskv_ray.model.sandbox import problem_of
from vlskv_ray.model.sanity import check_text_config
from vlskv_ray.model.swiftkv import BACKBONES

GGUF_PACKAGES = ("gguf", "accelerate")
"""What transformers reads a GGUF file by."""


@dataclass(frozen=True)
class TextModel:
    """A language model and what its texts are written in."""

    name: str
    """As the user has it."""
    model: Any
    """A stock causal language model, for evaluation."""
    tokenizer: Any

    @property
    def config(self) -> Any:
        return self.model.config


def read_text_model(name: str, dtype: torch.dtype | None = None) -> TextModel:
    """A text model whose SwiftKV form is exact.

    Args:
        name: a folder, a hub id, a `.gguf` file, or one of the hub as OWNER/NAME/FILE.gguf.
        dtype: of its weights; None: as they are stored, those of a GGUF file as float32.

    Raises:
        ValueError: there is none, it is of another architecture, or cannot be read.
    """
    options: dict[str, Any] = {"trust_remote_code": False}
    if name.endswith(".gguf"):
        file = find_gguf(name)
        folder, dtype = file.parent, dtype or torch.float32
        options["gguf_file"] = file.name
        of_weights: dict[str, Any] = {}
    else:
        folder, of_weights = checked_folder(name), {"use_safetensors": True}
    try:
        with quiet_transformers(), redirect_stderr(StringIO()):  # a bar of reading GGUF files has no other switch
            config = AutoConfig.from_pretrained(folder, **options)
            check_architecture(name, config)
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", output_loading_info=True, **of_weights, **options
            )
    except Unsuitable:
        raise
    except (*LIBRARY_ERRORS, SafetensorError, struct.error) as error:
        if "gguf_file" in options:
            raise ValueError(unread_gguf(name, file, error)) from error
        raise ValueError(f"{name}: cannot be loaded: {one_line(error)}") from error
    if lacking := sorted(report["missing_keys"]):
        raise ValueError(f"{name}: {len(lacking)} of its weights are missing, such as {lacking[0]}; is it complete?")
    if not tokenizer.is_fast:
        raise ValueError(f"{name}: its tokenizer is a {type(tokenizer).__name__}; wanted one with a tokenizer.json")
    for left in ("quantization_config", "_name_or_path", "_model_name_or_path"):  # the weights are plain ones now
        vars(model.config).pop(left, None)
    return TextModel(name, model.eval(), tokenizer)


def find_gguf(name: str) -> Path:
    """The GGUF file of this name. ValueError where there is none, or no package to read it by."""
    lacking = [package for package in GGUF_PACKAGES if find_spec(package) is None]
    if lacking:
        packages = f"package{'s' * (len(lacking) > 1)} {' and '.join(lacking)}"
        raise ValueError(
            f"{name}: reading a GGUF file takes the {packages}, not installed here: pip install 'vlskv_ray[gguf]'"
        )
    file = Path(os.path.expanduser(name))
    if not file.exists() and name.count("/") == 2 and not name.startswith((".", "/", "~")):
        owner, repository, file_name = name.split("/")
        try:
            file = Path(hf_hub_download(f"{owner}/{repository}", file_name))
        except (*LIBRARY_ERRORS, HfHubHTTPError) as error:
            raise ValueError(f"{name}: is neither a file nor to be had from the hub ({one_line(error)})") from error
    if not file.is_file():
        raise ValueError(f"{name}: there is no such file; wanted a GGUF file, a folder or a hub id")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{name}: is no GGUF file: it does not begin with the letters GGUF")
    return file


def unread_gguf(name: str, file: Path, error: Exception) -> str:
    """Why a GGUF file cannot be read: whatever goes wrong in one is told by its libraries as anything else."""
    return (
        f"{name}: cannot be read as a GGUF file, which has {file.stat().st_size:,} bytes here; was it cut short, or is "
        f"it of a kind that transformers does not know? Compare it with the original ({one_line(error)})"
    )


def checked_folder(name: str) -> Path:
    """A text model's folder, looked at before any library reads it. ValueError where something is wrong with it."""
    files = find_model(name)
    folder = files.folder
    if folder is None or folder in presets.SHIPPED.values():
        raise ValueError(f"{name} is a vision-language model already; name it as model.name_or_path of a run")
    with naming_model(files):
        declared = read_json(folder, "config.json")
        check_text_config({"text_config": declared})
    if problem := problem_of(folder):
        raise ValueError(f"{name}: {problem}")
    return folder


class Unsuitable(ValueError):
    """A model of another kind than is wanted."""


def check_architecture(name: str, config: Any) -> None:
    """Unsuitable where the SwiftKV form of such a text model is not proven exact."""
    if hasattr(config, "vision_config"):
        raise Unsuitable(
            f"{name} is a vision-language model already (model_type {config.model_type!r}); name it as "
            f"model.name_or_path of a run"
        )
    if config.model_type not in BACKBONES:
        raise Unsuitable(
            f"{name} is a {config.model_type!r}, whose SwiftKV form is not proven exact; supported: "
            f"{', '.join(BACKBONES)}"
        )
