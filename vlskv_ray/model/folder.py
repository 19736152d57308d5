"""What the files of a model's folder may hold, checked before any library reads them.

A folder comes from somebody else. What stands in it decides what is allocated, how long loading takes and, with pickled
weights, what code runs; so it is looked at first, and what no model has is refused by file and key.
"""

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 2**20
FILE_SIZES = {
    "config.json": 4 * MIB,  # a few KB; some 500 KB with a list of quantised modules
    "generation_config.json": MIB,
    "processor_config.json": 4 * MIB,  # may hold the chat template
    "preprocessor_config.json": 4 * MIB,
    "chat_template.json": MIB,
    "chat_template.jinja": MIB,  # the longest known have 20 KB
    "tokenizer_config.json": 16 * MIB,  # gemma-3's 6,400 added tokens take 1.2 MB
    "special_tokens_map.json": 16 * MIB,
    "added_tokens.json": 16 * MIB,
    "tokenizer.json": 96 * MIB,  # gemma-3's 262,144 tokens take 33 MB
    "tokenizer.model": 32 * MIB,  # gemma-3's has 4.7 MB
    "vocab.json": 32 * MIB,
    "merges.txt": 32 * MIB,
    "model.safetensors.index.json": 64 * MIB,  # deepseek-v3's 91,991 weights take 8.9 MB
}
"""Bytes that a file has at most. The largest known stand beside; what transformers does not read may be of any size."""

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
JSON_FILES = (
    "config.json",
    "generation_config.json",
    *PROCESSOR_FILES,
    "chat_template.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
MAX_DEPTH = 20
"""Of nested objects and arrays in them; quantisation settings reach 7."""

READ = (".json", ".jinja", ".safetensors", ".model", ".txt")
UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".pkl", ".pickle", ".ot", ".gguf")
"""Ends of the names of weights in other formats, most of which are unpickled."""
MAX_HEADER = 100_000_000
"""Bytes of the header of a safetensors file, as the safetensors library has it."""

REFUSED = {
    "auto_map": "names Python code of the folder's own, which is never run; remove the key where transformers' own "
    "class is meant",
    "transformers_weights": "names another file of weights; wanted them in model.safetensors",
    "audio_tokenizer": "names another model to be loaded with this one; wanted none",
}
"""Keys of a file by which transformers would run or load something else, and what is wrong with each."""


class Damaged(ValueError):
    """What is wrong with a folder: begins with the file."""


def check_folder(folder: Path) -> None:
    """Every file that transformers would read is a regular one, of a size that real ones have, and no code.

    Raises:
        Damaged: names the file and, where it is about one, the key.
    """
    try:
        for name in sorted(os.listdir(folder)):
            _check_entry(folder / name)
        templates = folder / "additional_chat_templates"
        for name in sorted(os.listdir(templates)) if templates.is_dir() else ():
            _check_entry(templates / name, FILE_SIZES["chat_template.jinja"])
    except OSError as error:
        raise Damaged(f"cannot be read: {error.strerror}: {error.filename}") from error
    held = {name: read_json(folder, name) for name in JSON_FILES if (folder / name).exists()}
    for name, content in held.items():
        _check_references(name, content)
    if (folder / "audio_tokenizer_config.json").exists():
        raise Damaged(f"audio_tokenizer_config.json: {REFUSED['audio_tokenizer']}; remove the file")
    for name in weight_files(folder):
        _check_safetensors(folder, name)


def _check_entry(path: Path, largest: int | None = None) -> None:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        if not path.is_symlink() or not path.name.endswith(READ):
            return  # it was there for a moment, or is none that is read, as a README.md that was not downloaded
        raise Damaged(f"{path.name}: is a link to nothing; wanted a file") from error
    is_read = path.name.endswith(READ)
    if not stat.S_ISREG(status.st_mode) and (is_read or not stat.S_ISDIR(status.st_mode)):
        raise Damaged(f"{path.name}: is no regular file; wanted a file")
    largest = FILE_SIZES.get(path.name) if largest is None else largest
    if largest is not None and status.st_size > largest:
        raise Damaged(f"{path.name}: has {status.st_size:,} bytes; wanted {largest:,} at most, as no model has more")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """An object from a file of the folder.

    Raises:
        Damaged: it holds none, or a number that is none, or is nested deeper than any of a real model.
    """

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no JSON number")

    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{name} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise Damaged(f"{name} cannot be read: it holds {shortened(content)}; wanted an object")
    if _depth(content) > MAX_DEPTH:
        raise Damaged(f"{name} cannot be read: it is nested deeper than {MAX_DEPTH} times; wanted a real model's")
    return content


def _depth(content: Any) -> int:
    """How deep objects and arrays are nested, counted level by level."""
    depth, level = 0, [content]
    while level and depth <= MAX_DEPTH:
        nested = [value.values() if isinstance(value, dict) else value for value in level]
        level = [value for values in nested for value in values if isinstance(value, dict | list)]
        depth += 1
    return depth


def _check_references(name: str, content: dict[str, Any]) -> None:
    """What a file names is what is loaded: no code, no further model, no class of another kind."""
    for key, problem in REFUSED.items():
        if content.get(key):  # an empty one names nothing
            raise Damaged(f"{name}: {key}: {shortened(content[key])}: {problem}")
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(content.get(key)):
            raise Damaged(f"{name}: {key}: {shortened(content[key])}: names code on the hub, which is never run")


def check_classes(folder: Path, processors: Sequence[str], image_processors: Sequence[str]) -> None:
    """The classes that transformers will load, looked for where and in the order it does, are of these names: others
    would be looked up and loaded by rules of their own.

    Raises:
        Damaged: names file, key, and the class.
    """
    held = {name: read_json(folder, name) for name in JSON_FILES if (folder / name).exists()}
    own = held.get("processor_config.json", {}).get("image_processor")
    images = {"processor_config.json": own} if isinstance(own, dict) else held
    for key, known, contents, names in (
        ("processor_class", processors, held, (*PROCESSOR_FILES, "tokenizer_config.json", "config.json")),
        ("image_processor_type", image_processors, images, PROCESSOR_FILES),
    ):
        name = next((name for name in names if contents.get(name, {}).get(key) is not None), None)
        if name and contents[name][key] not in known:
            raise Damaged(f"{name}: {key}: {shortened(contents[name][key])}; wanted {' or '.join(known)}")


# ---------------------------------------------------------------------------------------------------------- weights
def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that hold the model's weights.

    Raises:
        Damaged: there are none, or the index names something else.
    """
    if (folder / "adapter_config.json").exists():
        raise Damaged(
            "adapter_config.json: this is an adapter to another model; merge it into that one first "
            "(peft: merge_and_unload, then save_pretrained)"
        )
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    index = "model.safetensors.index.json"
    if (folder / index).exists():
        shards = read_json(folder, index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise Damaged(f"{index}: weight_map: {shortened(shards)}; wanted the file of each weight")
        weights_of = {str(name): (weight, name) for weight, name in shards.items()}  # one of each file
        return sorted(_shard(folder, index, weight, name) for weight, name in weights_of.values())
    others = sorted(name for name in os.listdir(folder) if name.endswith(UNSAFE))
    if others:
        raise Damaged(
            f"weights cannot be loaded: {others[0]} is no safetensors file, and reading it may run code; where you "
            f"trust it, load it with transformers and save it again with save_pretrained(), which writes safetensors"
        )
    raise Damaged("weights cannot be loaded: there is no model.safetensors and no model.safetensors.index.json")


def _shard(folder: Path, index: str, weight: str, name: Any) -> str:
    if not isinstance(name, str) or not name.endswith(".safetensors") or name != os.path.basename(name):
        raise Damaged(
            f"weights cannot be loaded: {index}: weight_map: {shortened(weight)}: {shortened(name)}; wanted the name "
            f"of a .safetensors file in this folder: no other format is read, since unpickling may run code"
        )
    if not (folder / name).is_file():
        raise Damaged(f"weights cannot be loaded: {index}: weight_map: {name}: there is no such file in the folder")
    return name


def _check_safetensors(folder: Path, name: str) -> None:
    """The file begins as safetensors do: the length of a JSON object, and that object."""
    with open(folder / name, "rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or length > MAX_HEADER or start[8:] != b"{":
        raise Damaged(
            f"weights cannot be loaded: {name}: begins with {start!r}, so it is no safetensors file, whatever its name"
        )


def shortened(value: Any) -> str:
    """A value as JSON has it, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]} ... ({len(text):,} characters)"
