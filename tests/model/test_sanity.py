"""Model folders that are damaged or hostile: refused in a line that names file and key, before anything reads them."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file
from transformers import SiglipVisionConfig

from vlskv_ray.data.check import check_processor
from vlskv_ray.generate import main as generate
from vlskv_ray.model import presets
from vlskv_ray.model.build import build_student, find_model, load_config, parameter_counts
from vlskv_ray.model.processor import load_processor
from vlskv_ray.model.sandbox import MAX_TEXT, MEMORY, SECONDS
from vlskv_ray.model.wrappers.llava_next import num_image_features
from vlskv_ray.train import main as train

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def folder(teacher_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A sound model's, to be damaged."""
    return Path(shutil.copytree(teacher_folder(), tmp_path / "model"))


def change(file: Path, edit: Edit) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    """What a command that opens this folder says, all the way to its weights."""
    with pytest.raises(ValueError) as error:
        files = find_model(str(folder))
        check_processor(files, load_processor(files))
        parameter_counts(files, load_config(files))
        build_student(files)
    message = str(error.value)
    assert message.startswith("model.name_or_path: ") and str(folder) in message
    assert "\n" not in message and len(message) < 1000
    return message


def test_a_sound_folder_is_opened(folder: Path) -> None:
    files = find_model(str(folder))
    check_processor(files, load_processor(files))
    build_student(files)


# ----------------------------------------------------------------------------------------------------------- values
def text(**values: Any) -> Edit:
    return lambda c: c["text_config"].update(values)


def vision(**values: Any) -> Edit:
    return lambda c: c["vision_config"].update(values)


def top(**values: Any) -> Edit:
    return lambda c: c.update(values)


def images(**values: Any) -> Edit:
    return lambda c: c["image_processor"].update(values)


CONFIG, PROCESSOR = "config.json", "processor_config.json"
VALUES: dict[str, tuple[str, Edit, str]] = {
    "ten million layers": (CONFIG, text(num_hidden_layers=10**7), "text_config.num_hidden_layers: 10000000; wanted a"),
    "no layers": (CONFIG, text(num_hidden_layers=0), "text_config.num_hidden_layers: 0; wanted a whole number from 1"),
    "negative layers": (CONFIG, text(num_hidden_layers=-4), "text_config.num_hidden_layers: -4"),
    "layers are true": (CONFIG, text(num_hidden_layers=True), "text_config.num_hidden_layers: true"),
    "layers are text": (CONFIG, text(num_hidden_layers="6"), 'text_config.num_hidden_layers: "6"'),
    "layers are a fraction": (CONFIG, text(num_hidden_layers=6.5), "text_config.num_hidden_layers: 6.5"),
    "more weights than bytes": (CONFIG, text(num_hidden_layers=1000), "describes at least 4,6.* weights, but their"),
    "a huge hidden size": (CONFIG, text(hidden_size=2**40), "text_config.hidden_size: 1099511627776; wanted"),
    "a huge vocabulary": (CONFIG, text(vocab_size=10**9), "text_config.vocab_size: 1000000000; wanted"),
    "heads that do not group": (CONFIG, text(num_key_value_heads=3), "num_key_value_heads: 3; wanted a divisor of"),
    "an odd head": (CONFIG, text(head_dim=7), "config.json .*`head_dim`=7"),
    "no rotation": (CONFIG, text(rope_parameters={"rope_type": "default", "rope_theta": 0}), "rope_theta: 0; wanted"),
    "an unknown rotation": (CONFIG, text(rope_parameters={"rope_type": "x"}), "config.json"),
    "an unknown activation": (CONFIG, text(hidden_act="x"), "config.json: no model can be made with it"),
    "no positions": (CONFIG, text(max_position_embeddings=0), "text_config.max_position_embeddings: 0; wanted"),
    "padding beyond all tokens": (
        CONFIG,
        text(pad_token_id=300),
        "text_config.pad_token_id: 300; wanted less than the",
    ),
    "a name for each of 1e9 labels": (CONFIG, top(num_labels=10**9), "num_labels: 1000000000; wanted a"),
    "labels of the tower": (CONFIG, vision(num_labels=10**9), "vision_config.num_labels: 1000000000; wanted"),
    "more layers than the tower has": (CONFIG, top(vision_feature_layer=[-1] * 10**5), "vision_feature_layer: .*wa"),
    "text_config is text": (CONFIG, top(text_config="x"), 'text_config: "x"; wanted an object'),
    "image_size 0": (CONFIG, vision(image_size=0), "vision_config.image_size: 0; wanted a whole number from 1"),
    "image_size 1e6": (CONFIG, vision(image_size=10**6), "vision_config.image_size: 1000000; wanted"),
    "patch_size 0": (CONFIG, vision(patch_size=0), "vision_config.patch_size: 0; wanted"),
    "patches larger than pictures": (CONFIG, vision(patch_size=64), "vision_config.patch_size: 64; wanted at most the"),
    "grey pictures": (CONFIG, vision(num_channels=1), "vision_config.num_channels: 1; wanted"),
    "heads that do not divide": (CONFIG, vision(num_attention_heads=3), "config.json .*attention heads .3."),
    "many pinpoints": (CONFIG, top(image_grid_pinpoints=[[32, 32]] * 10**5), r"image_grid_pinpoints: .*; wanted 1 to"),
    "no pinpoints": (CONFIG, top(image_grid_pinpoints=[]), r"image_grid_pinpoints: \[\]; wanted 1 to 256 pairs"),
    "negative pinpoints": (CONFIG, top(image_grid_pinpoints=[[-32, 32]]), r"image_grid_pinpoints: \[\[-32, 32\]\]; wa"),
    "ragged pinpoints": (CONFIG, top(image_grid_pinpoints=[[32, 32], [64]]), r"image_grid_pinpoints: .*\[64\]\]; wan"),
    "pinpoints of text": (CONFIG, top(image_grid_pinpoints=[["32", "64"]]), "image_grid_pinpoints: .*; wanted 1 to"),
    "pinpoints between tiles": (CONFIG, top(image_grid_pinpoints=[[32, 50]]), r"\[32, 50\]; wanted multiples of the"),
    "pinpoints of many tiles": (CONFIG, top(image_grid_pinpoints=[[640, 6400]]), "6400.; wanted multiples .*256 tiles"),
    "a layer that is not there": (CONFIG, top(vision_feature_layer=-9), "vision_feature_layer: -9; wanted from -3"),
    "a class token in the grid": (CONFIG, top(vision_feature_select_strategy="full"), '"full"; wanted default with a'),
    "images at no token": (CONFIG, top(image_token_index=300), "image_token_index: 300; wanted less than the vocab"),
    "tiles and crops of 1e5": (
        PROCESSOR,
        images(size={"shortest_edge": 10**5}, crop_size={"height": 10**5, "width": 10**5}),
        "image_processor.size.shortest_edge: 100000; wanted a whole number from 1 to 4096",
    ),
    "a crop of 0": (PROCESSOR, images(crop_size={"height": 0, "width": 32}), "image_processor.crop_size.height: 0"),
    "a mean of text": (PROCESSOR, images(image_mean="x"), 'image_processor.image_mean: "x"; wanted a number for each'),
    "two means": (PROCESSOR, images(image_mean=[0.5, 0.5]), r"image_processor.image_mean: \[0.5, 0.5\]; wanted a num"),
    "a deviation of 0": (PROCESSOR, images(image_std=[0, 1, 1]), r"image_processor.image_std: \[0, 1, 1\]; wanted"),
    "a filter of text": (PROCESSOR, images(resample="x"), 'image_processor.resample: "x"; wanted'),
    "a switch of text": (PROCESSOR, images(do_resize="no"), 'image_processor.do_resize: "no"; wanted true or false'),
    "many pinpoints of the processor": (
        PROCESSOR,
        images(image_grid_pinpoints=[[32, 64]] * 10**5),
        "image_processor.image_grid_pinpoints: .*; wanted 1 to 256 pairs",
    ),
    "many more tokens": (PROCESSOR, top(num_additional_image_tokens=10**9), "num_additional_image_tokens: 1000000000"),
}


@pytest.mark.parametrize(("file", "edit", "message"), VALUES.values(), ids=VALUES.keys())
def test_a_value_that_no_model_has(folder: Path, file: str, edit: Edit, message: str) -> None:
    change(folder / file, edit)
    refused = refusal(folder)
    assert file in refused and re.search(message, refused), refused


def test_settings_for_generate_are_not_taken_for_weights(folder: Path) -> None:
    change(folder / "generation_config.json", top(max_new_tokens="x"))
    assert "generation_config.json cannot be used: " in refusal(folder)


# ---------------------------------------------------------------------------------------- a processor beside its model
FITS: dict[str, tuple[str, Edit, str]] = {
    "lacks num_additional_image_tokens": (
        PROCESSOR,
        lambda c: c.pop("num_additional_image_tokens"),
        "processor_config.json: num_additional_image_tokens: missing, which means 0; wanted 1, as config.json has",
    ),
    "lacks vision_feature_select_strategy": (
        PROCESSOR,
        lambda c: c.pop("vision_feature_select_strategy"),
        'processor_config.json: vision_feature_select_strategy: missing, which means null; wanted "default", as config',
    ),
    "other vision_feature_select_strategy": (
        PROCESSOR,
        top(vision_feature_select_strategy="full"),
        'processor_config.json: vision_feature_select_strategy: "full"; wanted "default", as config.json has',
    ),
    "other patch_size": (PROCESSOR, top(patch_size=16), "processor_config.json: patch_size: 16; wanted 8, as config"),
    "other pinpoints": (
        PROCESSOR,
        images(image_grid_pinpoints=[[32, 64]]),
        r"processor_config.json: image_grid_pinpoints: \[\[32, 64\]\]; wanted \[\[32, 64\], \[64, 32\], \[64, 64\]\],",
    ),
    "lacks pinpoints": (
        PROCESSOR,
        lambda c: c["image_processor"].pop("image_grid_pinpoints"),
        r"processor_config.json: image_grid_pinpoints: missing, which means \[\[336, 672\], ",
    ),
    "other size": (
        PROCESSOR,
        images(size={"shortest_edge": 64}),
        'processor_config.json: size: {"shortest_edge": 64}; wanted 32, as config.json has vision_config.image_size',
    ),
    "other crop": (
        PROCESSOR,
        images(crop_size={"height": 32, "width": 16}),
        'processor_config.json: crop_size: {"height": 32, "width": 16}; wanted 32, as config.json has vision_config.im',
    ),
    "pinpoints of the model": (CONFIG, top(image_grid_pinpoints=[[32, 64]]), "image_grid_pinpoints: .*config.json has"),
    "no image token": (
        "tokenizer.json",
        lambda c: [c["model"]["vocab"].pop("<image>"), c.update(added_tokens=c["added_tokens"][:-1])],
        "tokenizer.json: has no token '<image>'; wanted one with id 4, the image_token_index of config.json; add it by",
    ),
}


@pytest.mark.parametrize(("file", "edit", "message"), FITS.values(), ids=FITS.keys())
def test_a_processor_that_is_not_the_models_is_the_cause(folder: Path, file: str, edit: Edit, message: str) -> None:
    """Each would make every row with an image a placeholder_mismatch, whatever the data."""
    change(folder / file, edit)
    if file == "tokenizer.json":
        change(folder / "tokenizer_config.json", lambda c: c.pop("image_token"))
    assert re.search(message, refusal(folder))


def test_old_processors_leave_patches_to_the_models_config(folder: Path) -> None:
    def older(content: dict[str, Any]) -> None:
        del content["patch_size"], content["vision_feature_select_strategy"]

    change(folder / PROCESSOR, older)
    files = find_model(str(folder))
    check_processor(files, load_processor(files))


def test_processors_older_still_leave_all_to_it(folder: Path) -> None:
    """As transformers up to 4.45 saved them: the image processor's file only, which knows of no class token either."""
    images = json.loads((folder / PROCESSOR).read_text())["image_processor"]
    (folder / PROCESSOR).unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(images | {"processor_class": "LlavaNextProcessor"}))
    files = find_model(str(folder))
    processor = load_processor(files)
    check_processor(files, processor)
    assert processor.num_additional_image_tokens == 1


def test_files_that_are_not_read_may_be_missing(folder: Path) -> None:
    """A snapshot of the hub's cache of which only some files were downloaded or copied."""
    (folder / "README.md").symlink_to("../../blobs/0123")
    change(folder / "config.json", top(auto_map={}))
    build_student(find_model(str(folder)))


def test_a_tower_without_a_class_token(tmp_path: Path) -> None:
    """SigLIP's: all of its features are used, and as many image tokens are written."""
    config = tiny_config()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config.vision_config = SiglipVisionConfig(image_size=32, patch_size=8, **sizes)
    config.vision_feature_select_strategy = "full"
    model, processor = presets.build_teacher(config), presets.llava_next_processor(config)
    model.save_pretrained(tmp_path / "siglip")
    processor.save_pretrained(tmp_path / "siglip")
    change(tmp_path / "siglip" / PROCESSOR, top(num_additional_image_tokens=1))
    assert "num_additional_image_tokens: 1; wanted 0" in refusal(tmp_path / "siglip")
    change(tmp_path / "siglip" / PROCESSOR, top(num_additional_image_tokens=0))
    files = find_model(str(tmp_path / "siglip"))
    processor = load_processor(files)
    check_processor(files, processor)
    inputs = processor(images=np.zeros((40, 90, 3), np.uint8), text="<image>", return_tensors="pt")
    with torch.no_grad():
        (made,) = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    written = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert written == len(made) == num_image_features(config, (40, 90))


# ------------------------------------------------------------------------------------------------------------ files
def a_pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def a_link(target: str) -> Callable[[Path], None]:
    def link(file: Path) -> None:
        file.unlink(missing_ok=True)
        file.symlink_to(target)

    return link


def a_folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def a_hole(file: Path) -> None:
    os.truncate(file, 2**30)


FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a pipe for a tokenizer": ("tokenizer_config.json", a_pipe, "tokenizer_config.json: is no regular file"),
    "a pipe for weights": ("model.safetensors", a_pipe, "model.safetensors: is no regular file"),
    "a pipe that nobody needs": ("notes", a_pipe, "notes: is no regular file"),
    "a device": ("generation_config.json", a_link("/dev/zero"), "generation_config.json: is no regular file"),
    "a link to nothing": ("tokenizer.json", a_link("elsewhere"), "tokenizer.json: is a link to nothing"),
    "a folder": (PROCESSOR, a_folder, "processor_config.json: is no regular file"),
    "a GiB of tokenizer": ("tokenizer.json", a_hole, "tokenizer.json: has 1,073,741,824 bytes; wanted 100,663,296 at"),
    "a GiB of template": ("chat_template.jinja", a_hole, "chat_template.jinja: has 1,073,741,824 bytes; wanted"),
    "brackets": (PROCESSOR, lambda f: f.write_text("[" * 10**5), "processor_config.json cannot be read as JSON"),
    "deep": (
        "generation_config.json",
        lambda f: f.write_text('{"a":' * 100 + "1" + "}" * 100),
        "generation_config.json cannot be read: it is nested deeper than 20",
    ),
    "no number": (
        CONFIG,
        lambda f: f.write_text(f.read_text().replace("1e-06", "NaN")),
        "config.json cannot be read as JSON .NaN is no JSON number",
    ),
    "no text": ("tokenizer_config.json", lambda f: f.write_bytes(b"\xff\xfe"), "tokenizer_config.json cannot be read"),
    "a list": ("generation_config.json", lambda f: f.write_text("[1]"), r"generation_config.json .* holds \[1\]; want"),
}


@pytest.mark.parametrize(("name", "damage", "message"), FILES.values(), ids=FILES.keys())
def test_a_file_that_is_none_of_a_model(folder: Path, name: str, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder / name)
    assert re.search(message, refusal(folder))


# ------------------------------------------------------------------------------------------------ code in the folder
class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.file),)


def index_of(folder: Path, shard: str) -> None:
    """The weights as the index names them, in one file."""
    names = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def indexed_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    index_of(folder, "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def evil_bin(folder: Path) -> None:
    index_of(folder, "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(folder.parent / "ran")))


def evil_by_another_name(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil(folder.parent / "ran")))


def archive_by_another_name(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()  # what is mapped into memory must not be overwritten
    torch.save(weights, folder / "model.safetensors")


def outside(folder: Path) -> None:
    index_of(folder, "../model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")


def shard_missing(folder: Path) -> None:
    index_of(folder, "model-00001-of-00002.safetensors")
    (folder / "model.safetensors").unlink()


def only_bin(folder: Path) -> None:
    indexed_bin(folder)
    (folder / "model.safetensors.index.json").unlink()


def named_in_the_config(folder: Path) -> None:
    indexed_bin(folder)
    (folder / "pytorch_model.bin").rename(folder / "adapter_model.bin")
    change(folder / CONFIG, top(transformers_weights="adapter_model.bin"))


UNSAFE: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled weights by the index": (
        indexed_bin,
        'weights cannot be loaded: model.safetensors.index.json: weight_map: .*: "pytorch_model.bin"; wanted the name',
    ),
    "an evil pickle by the index": (evil_bin, '"pytorch_model.bin"; wanted the name of a .safetensors file in this'),
    "an evil pickle by another name": (evil_by_another_name, "model.safetensors: begins with .*it is no safetensors"),
    "a torch archive by another name": (archive_by_another_name, "model.safetensors: begins with b'PK.*no safetensors"),
    "weights outside": (outside, '"../model.safetensors"; wanted the name of a .safetensors file in this folder'),
    "a shard that is missing": (shard_missing, "model-00001-of-00002.safetensors: there is no such file"),
    "pickled weights alone": (only_bin, "pytorch_model.bin is no safetensors file.*save_pretrained"),
    "pickled weights by the config": (named_in_the_config, 'transformers_weights: "adapter_model.bin": names another'),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "there is no model.safetensors and no"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}") and None, "an adapter to another model"),
    "code for the model": (
        lambda f: change(f / CONFIG, top(auto_map={"AutoModelForImageTextToText": "evil.Model"})),
        "config.json: auto_map: .*evil.Model.* never run",
    ),
    "code for the tokenizer": (
        lambda f: change(f / "tokenizer_config.json", top(auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})),
        "tokenizer_config.json: auto_map: ",
    ),
    "code for the processor": (
        lambda f: change(f / PROCESSOR, top(auto_map={"AutoProcessor": "evil.Processor"})),
        "processor_config.json: auto_map: ",
    ),
    "a further model": (
        lambda f: change(f / PROCESSOR, top(audio_tokenizer={"audio_tokenizer_class": "DacModel"})),
        "processor_config.json: audio_tokenizer: ",
    ),
    "another processor": (
        lambda f: change(f / PROCESSOR, top(processor_class="LlavaProcessor")),
        'processor_config.json: processor_class: "LlavaProcessor"; wanted LlavaNextProcessor',
    ),
    "another image processor": (
        lambda f: change(f / PROCESSOR, images(image_processor_type="CLIPImageProcessor")),
        'processor_config.json: image_processor_type: "CLIPImageProcessor"; wanted LlavaNextImageProcessor',
    ),
}


@pytest.mark.parametrize(("damage", "message"), UNSAFE.values(), ids=UNSAFE.keys())
def test_nothing_of_a_folder_is_unpickled_or_run(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')")
    assert re.search(message, refusal(folder))
    assert not (folder.parent / "ran").exists()


def test_shards_in_the_hubs_cache_are_links(folder: Path) -> None:
    """They lead out of the folder to files without an ending, and are read."""
    shard = "model-00001-of-00001.safetensors"
    index_of(folder, shard)
    (folder / "model.safetensors").rename(folder.parent / "blob")
    (folder / shard).symlink_to("../blob")
    build_student(find_model(str(folder)))


# -------------------------------------------------------------------------------------- programs that take all there is
TEMPLATES = {
    "loops in loops": (
        "{% for a in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3,
        f"chat_template.jinja: takes more than {SECONDS} s of CPU where it was tried",
    ),
    "a text that doubles": (
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        f"chat_template.jinja: takes more than {MEMORY / 2**30:g} GiB of memory where it was tried",
    ),
    "a macro that calls itself": (
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "chat_template.jinja: cannot be used: RecursionError: ",
    ),
    "blocks too deep for Python": (
        "{% for a in messages %}" * 40 + "{% endfor %}" * 40,
        "chat_template.jinja: cannot be used: SyntaxError: too many statically nested blocks",
    ),
    "much text": (
        "{{ 'x' * 2000000 }}",
        f"chat_template.jinja: cannot be used: ValueError: writes 2,000,000 characters .*; wanted {MAX_TEXT:,} at most",
    ),
}


@pytest.mark.parametrize(("template", "message"), TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_template_is_tried_within_limits(folder: Path, template: str, message: str) -> None:
    """It takes down a process of its own, whose end is told."""
    (folder / "chat_template.jinja").write_text(template)
    assert re.search(message, refusal(folder))


def pattern(regex: str) -> Edit:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return lambda c: c.update(pre_tokenizer=split)


def replacements(content: dict[str, Any]) -> None:
    """Each makes sixteen of every character."""
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 16}
    content["normalizer"] = {"type": "Sequence", "normalizers": [rule] * 12}


TOKENIZERS: dict[str, tuple[Edit, str]] = {
    "a pattern that is none": (pattern("(["), "tokenizer.json: cannot be used: "),
    "a token without an id": (lambda c: c["model"]["vocab"].update(a="x"), "tokenizer.json: cannot be used: "),
    "merges of nothing": (lambda c: c["model"].update(merges=[["zz", "yy"]]), "tokenizer.json: cannot be used: "),
    "a text that grows": (replacements, "tokenizer.json: takes more than "),
}


@pytest.mark.parametrize(("edit", "message"), TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_a_tokenizer_is_tried_within_limits(folder: Path, edit: Edit, message: str) -> None:
    change(folder / "tokenizer.json", edit)
    assert re.search(message, refusal(folder))


def test_what_comes_with_the_package_and_what_was_tried_is_not_tried_again(folder: Path, tmp_path: Path) -> None:
    """The same files are tried once in a process, wherever they lie."""
    from vlskv_ray.model.sandbox import _problem_of

    load_processor(find_model(str(folder)))
    before = _problem_of.cache_info().misses
    for name in ("shapes-teacher", "shapes-llava-next", str(folder), str(shutil.copytree(folder, tmp_path / "copy"))):
        load_processor(find_model(name))
    load_processor(find_model(str(folder)), tried=True)
    assert _problem_of.cache_info().misses == before
    change(folder / "tokenizer_config.json", top(model_max_length=7))
    load_processor(find_model(str(folder)))
    assert _problem_of.cache_info().misses == before + 1


# ------------------------------------------------------------------------------------------------- the real commands
@pytest.mark.parametrize("command", ["train", "generate"])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokenizer.json", lambda f: change(f, pattern("(["))),
        ("chat_template.jinja", lambda f: f.write_text(TEMPLATES["a macro that calls itself"][0])),
        ("tokenizer_config.json", a_pipe),
    ],
    ids=["pattern", "macro", "pipe"],
)
def test_a_command_says_it_in_a_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    name: str,
    damage: Callable[[Path], Any],
) -> None:
    damage(folder / name)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    if command == "train":
        config = {"model": {"name_or_path": "model"}, "data": {"sources": ["shapes"]}, "cluster": {"num_workers": 0}}
        Path("run.yaml").write_text(json.dumps(config))
        assert train(["--config", "run.yaml"]) == 2
    else:
        assert generate(["--model", "model", "--teacher", "--prompt", "hello"]) == 2
    said = capsys.readouterr().err
    begins = {"train": f"model.name_or_path: {folder}: {name}: ", "generate": f"--model: model: {name}: "}[command]
    assert said.startswith(begins) and said.count("\n") == 1
