"""From what `model.name_or_path` names to a student: the teacher's checkpoint with a SwiftKV text backbone.

Teacher and student are one model. What trains is `*_swiftkv`; everything else is the teacher, frozen.
"""

import copy
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from vlskv_ray.model import presets
from vlskv_ray.model.folder import Damaged, check_folder, read_json, weight_files
from vlskv_ray.model.parts import PLAIN_PARTS, SWIFTKV, freeze_all_but, part_sizes
from vlskv_ray.model.sanity import check_relations, check_text_config, check_weight_bytes
from vlskv_ray.model.swiftkv import BACKBONES, check_layers, has_swiftkv, swiftkv_backbone
from vlskv_ray.model.wrappers import wrapper_of

LIBRARY_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What reading a damaged file ends in: transformers trips over it wherever its code first uses the wrong value."""

DOWNLOADED = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]  # never weights that need unpickling


@dataclass(frozen=True)
class ModelFiles:
    """Where a model comes from: a preset's name, or a folder; `revision` is the commit of a hub model."""

    name_or_path: str
    preset: bool
    folder: Path | None
    revision: str | None


def find_model(name_or_path: str, revision: str | None = None) -> ModelFiles:
    """Resolves the name of a preset or shipped model, a local folder, or a hub id, downloaded and pinned to its commit.

    Raises:
        ValueError: there is no such thing; says what was looked for and what to do.
    """
    if name_or_path in presets.PRESETS:
        return ModelFiles(name_or_path, preset=True, folder=None, revision=None)
    folder = presets.SHIPPED.get(name_or_path) or Path(name_or_path)
    if os.path.isdir(folder):
        return _checked(ModelFiles(name_or_path, preset=False, folder=folder, revision=None))
    names = ", ".join([*presets.PRESETS, *presets.SHIPPED])
    wanted = f"a preset ({names}), a folder, or a hub id such as llava-hf/llava-v1.6-mistral-7b-hf"
    if name_or_path.endswith(".gguf"):
        raise ValueError(
            f"model.name_or_path: {name_or_path} is a GGUF file, of which `vlskv-ray assemble --text {name_or_path} "
            f"--output DIR` makes the folder of a model"
        )
    if name_or_path.count("/") > 1 or name_or_path.startswith((".", "/", "~")):
        raise ValueError(f"model.name_or_path: there is no folder {name_or_path!r}; wanted {wanted}")
    arguments: dict[str, Any] = {"repo_id": name_or_path, "revision": revision, "allow_patterns": DOWNLOADED}
    try:
        if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
            try:  # a commit never changes: what is here already needs no network
                path = snapshot_download(**arguments, local_files_only=True)
            except LocalEntryNotFoundError:
                path = snapshot_download(**arguments)
        else:
            path = snapshot_download(**arguments)
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        StrictDataclassError,
        OSError,
    ) as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model.name_or_path: {name_or_path!r}{at} is neither a folder nor to be had from the hub ({reason}); "
            f"wanted {wanted}"
        ) from error
    return _checked(ModelFiles(name_or_path, preset=False, folder=Path(path), revision=Path(path).name))


def _checked(files: ModelFiles) -> ModelFiles:
    """The same. ValueError where the folder is no model's, or holds what is not safe to read."""
    folder = files.folder
    assert folder is not None
    if not os.path.lexists(folder / "config.json") and not (folder / "adapter_config.json").exists():
        meant = f"; did you mean {folder}/final?" if (folder / "final" / "config.json").is_file() else ""
        raise ValueError(
            f"model.name_or_path: {folder} holds no config.json, so it is no Hugging Face checkpoint{meant}"
        )
    with naming_model(files):
        check_folder(folder)
    return files


@contextmanager
def naming_model(files: ModelFiles) -> Iterator[None]:
    """What is wrong with files names the model that they are of, on one line."""
    try:
        yield
    except Damaged as error:
        raise ValueError(f"model.name_or_path: {files.name_or_path}: {' '.join(str(error).split())}") from error


def file_sizes(files: ModelFiles) -> dict[str, int]:
    """Bytes of each file that a model is loaded from, by name; none of a preset."""
    folder = files.folder
    found = [path for pattern in DOWNLOADED for path in folder.glob(pattern)] if folder else []
    return {path.name: path.stat().st_size for path in found}


def parameter_counts(files: ModelFiles, config: PreTrainedConfig) -> dict[str, int]:
    """How many weights each part of a model has, without loading any; see `part_sizes`.

    Args:
        files: of the model, to name it by.
        config: of the model that trains: its own, `swiftkv_config` or `with_layers` of that.

    Raises:
        ValueError: no model can be made with this config.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except LIBRARY_ERRORS as error:
        where = f"model.name_or_path: {files.name_or_path}"
        raise ValueError(f"{where}: config.json: no model can be made with it: {one_line(error)}") from error
    return part_sizes(model)


def load_config(files: ModelFiles) -> PreTrainedConfig:
    """The checkpoint's own config. ValueError if it is not a vision-language model that this package converts."""
    if files.preset:
        return presets.PRESETS[files.name_or_path].config()
    assert files.folder is not None
    where = f"model.name_or_path: {files.name_or_path}"
    with naming_model(files):
        declared = read_json(files.folder, "config.json")
    try:
        wrapper = wrapper_of(declared.get("model_type"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}{_of_text_model(files.name_or_path, declared)}") from error
    with naming_model(files):
        check_text_config(declared)
        wrapper.check_config(declared)
    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
    except (*LIBRARY_ERRORS, StrictDataclassError) as error:
        raise ValueError(f"{where}: config.json is not a config of this model type: {one_line(error)}") from error
    backbone = config.text_config.model_type.removesuffix("_swiftkv")
    if backbone not in BACKBONES:
        raise ValueError(
            f"{where}: its text model is a {backbone!r}, whose SwiftKV form is not proven exact; "
            f"supported: {', '.join(BACKBONES)}"
        )
    with naming_model(files):
        check_relations(config)
        wrapper.check_relations(config)
        weight_bytes = sum((files.folder / name).stat().st_size for name in weight_files(files.folder))
        check_weight_bytes(config, wrapper.least_vision_weights(config), weight_bytes)
    return config


def _of_text_model(name: str, declared: dict[str, Any]) -> str:
    """What to do with a text model where a vision-language model is wanted."""
    if declared.get("model_type") not in BACKBONES:
        return ""
    return (
        f"; it is a text model, of which `vlskv-ray assemble --text {name} --output DIR` makes a vision-language model "
        f"that can be converted"
    )


def swiftkv_config(
    config: PreTrainedConfig, num_key_value_layers: int | None = None, key_value_group_size: int | None = None
) -> PreTrainedConfig:
    """The config of the student of a model with this config; `config` itself where it is a student's already.

    Args:
        config: of a vision-language model.
        num_key_value_layers: N; None for what a student's config says, else half of the layers.
        key_value_group_size: None for what a student's config says, else 1.

    Raises:
        ValueError: no layers are left to the student, or no whole groups; or `config` is that of a student with others.
    """
    text = config.text_config
    if has_swiftkv(config):
        for name, wanted in (
            ("num_key_value_layers", num_key_value_layers),
            ("key_value_group_size", key_value_group_size),
        ):
            if wanted is not None and wanted != getattr(text, name):
                raise ValueError(
                    f"model.{name}: {wanted}, but the checkpoint holds SwiftKV weights for {getattr(text, name)}; "
                    f"leave the key out, or start from the teacher's checkpoint"
                )
        return config
    layers = text.num_hidden_layers
    num_key_value_layers = layers // 2 if num_key_value_layers is None else num_key_value_layers
    key_value_group_size = 1 if key_value_group_size is None else key_value_group_size
    if num_key_value_layers >= layers:
        raise ValueError(
            f"model.num_key_value_layers: {num_key_value_layers}, but the text model has {layers} layers; "
            f"wanted 1 to {layers - 1}, so that at least one layer is left to SwiftKV"
        )
    try:
        check_layers(layers, num_key_value_layers, key_value_group_size)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    fields = text.to_dict()
    model_type = fields.pop("model_type")
    student = copy.deepcopy(config)
    student.text_config = CONFIG_MAPPING[f"{model_type}_swiftkv"](
        **fields,
        swiftkv=True,
        num_key_value_layers=num_key_value_layers,
        key_value_group_size=key_value_group_size,
    )
    return student


def build_student(
    files: ModelFiles,
    num_key_value_layers: int | None = None,
    key_value_group_size: int | None = None,
    *,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A stock vision-language model whose text backbone is a SwiftKV one, switched on, with only `*_swiftkv` to train.

    A teacher's checkpoint gives a student that starts as the teacher; one that holds SwiftKV weights keeps them.
    Frozen weights are of `dtype`, those to train always float32.

    Raises:
        ValueError: the checkpoint cannot be converted, or does not hold what its config says.
    """
    config = load_config(files)
    is_teacher = not has_swiftkv(config)
    student_config = swiftkv_config(config, num_key_value_layers, key_value_group_size)
    if files.preset:
        model = AutoModelForImageTextToText.from_config(student_config, attn_implementation=attn_implementation)
        model.load_state_dict(presets.build_teacher(config).state_dict(), strict=False)
        swiftkv_backbone(model).start_from_teacher()
        model.to(dtype)
    else:
        lacks = ("_swiftkv",) if is_teacher else ()
        model = _load_weights(files, student_config, attn_implementation, dtype, lacks)
    swiftkv_backbone(model).config.swiftkv = True
    return freeze_all_but(model, (SWIFTKV,), dtype)


def build_plain(
    files: ModelFiles,
    num_hidden_layers: int | None = None,
    *,
    attn_implementation: str = "sdpa",
    seed: int = 0,
    trained: Collection[str] = PLAIN_PARTS,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A stock vision-language model, of which some parts train, in float32; new weights are drawn from `seed`.

    Args:
        files: of a plain model.
        num_hidden_layers: text layers; None for as many as it has. A preset is drawn with so many; a checkpoint of
            fewer gets the others on top, whose output projections are 0, so that they change nothing at first.
        trained: the parts that train, of `PLAIN_PARTS`.
        dtype: of the weights of all others.

    Raises:
        ValueError: the checkpoint has SwiftKV weights, more layers, or does not hold what its config says.
    """
    config = load_config(files)
    refuse_student(files, config)
    old = config.text_config.num_hidden_layers
    config = with_layers(config, num_hidden_layers or old)
    if files.preset:
        model = presets.build_teacher(config, seed)
        model.set_attn_implementation(attn_implementation)
    else:
        check_growth(files, old, num_hidden_layers)
        new = tuple(f".layers.{i}." for i in range(old, config.text_config.num_hidden_layers))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # float32, so that what trains begins as the checkpoint has it; what is frozen is rounded afterwards
            model = _load_weights(files, config, attn_implementation, torch.float32, lacks=new)
        for layer in model.get_decoder().layers[old:]:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                for parameter in projection.parameters():
                    nn.init.zeros_(parameter)
    return freeze_all_but(model, trained, dtype)


def with_layers(config: PreTrainedConfig, num_hidden_layers: int) -> PreTrainedConfig:
    """A copy of a model's config with so many text layers, any further ones of the last one's kind."""
    config = copy.deepcopy(config)
    text = config.text_config
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = [*kinds, *kinds[-1:] * (num_hidden_layers - len(kinds))][:num_hidden_layers]
    text.num_hidden_layers = num_hidden_layers
    return config


def check_growth(files: ModelFiles, has: int, wanted: int | None) -> None:
    """ValueError where a checkpoint would have to lose layers."""
    if wanted is not None and wanted < has and not files.preset:
        raise ValueError(
            f"model.num_hidden_layers: {wanted}, but {files.name_or_path} has {has} text layers; a checkpoint can only "
            f"be given more"
        )


def refuse_student(files: ModelFiles, config: PreTrainedConfig) -> None:
    """ValueError where a model for `objective: sft` is a SwiftKV one already."""
    if has_swiftkv(config):
        raise ValueError(
            f"model.name_or_path: {files.name_or_path} holds SwiftKV weights; objective=sft trains a plain model, "
            f"which is distilled afterwards, or with model.trainable=[swiftkv] these weights alone"
        )


@contextmanager
def usable_generation_config(where: str) -> Iterator[None]:
    """What libraries say of settings for `generate` that cannot be used, as one line that begins with `where`."""
    try:
        yield
    except LIBRARY_ERRORS as error:
        raise ValueError(
            f"{where}: generation_config.json cannot be used: {one_line(error)}; mend it, or remove the file"
        ) from error


def _load_weights(
    files: ModelFiles, config: PreTrainedConfig, attn_implementation: str, dtype: torch.dtype, lacks: tuple[str, ...]
) -> Any:
    """`lacks`: parts of the names of those weights of the text model that are new to the checkpoint, which must not
    hold any of them."""
    assert files.folder is not None
    if (files.folder / "generation_config.json").exists():  # read along with the weights
        with usable_generation_config(f"model.name_or_path: {files.name_or_path}"):
            GenerationConfig.from_pretrained(files.folder)
    try:
        with quiet_transformers():  # its report lists the SwiftKV weights as missing: they are meant to be
            model, report = AutoModelForImageTextToText.from_pretrained(
                files.folder,
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (*LIBRARY_ERRORS, SafetensorError) as error:
        where = f"model.name_or_path: {files.name_or_path}"
        raise ValueError(f"{where}: weights cannot be loaded: {one_line(error)}") from error
    missing = set(report["missing_keys"])
    text_model = next(name for name, module in model.named_modules() if module is model.get_decoder())
    of_text = [key for key in model.state_dict() if key.startswith(f"{text_model}.")]
    new = {key for key in of_text if any(part in key.removeprefix(text_model) for part in lacks)}
    problems = {
        "missing": missing - new,
        "of another shape": [str(key) for key in report["mismatched_keys"]],
        "too many": {key for key in report["unexpected_keys"] if key.endswith((".weight", ".bias"))} | (new - missing),
    }
    for what, keys in problems.items():
        if keys:
            raise ValueError(
                f"model.name_or_path: {files.name_or_path}: {len(keys)} weights are {what}, "
                f"such as {sorted(keys)[0]}; the checkpoint is damaged or does not belong to its config.json"
            )
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Its bars and reports of loading are not shown."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def one_line(error: BaseException) -> str:
    """An error's own words on one line, cut to a readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def device_of(name: str | None = None) -> torch.device:
    """The device `cpu` or `cuda`, which is the GPU that this process is to use; None: `cuda` where there is one.

    Raises:
        ValueError: there is no GPU, or none that this build of torch can use.
    """
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        raise ValueError(
            f"cluster.use_gpu: torch {torch.__version__} finds no GPU here; wanted an NVIDIA GPU with its driver and a "
            f"build of torch for it; leave this out to compute on CPUs"
        )
    return torch.device("cpu")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that train, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
