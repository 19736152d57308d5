"""The configs come with the package, and the figures in the comments of the big ones are those of their models."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, CLIPVisionConfig, LlavaNextConfig

from vlskv_ray import configs
from vlskv_ray.config import load_config
from vlskv_ray.model.build import swiftkv_config
from vlskv_ray.model.wrappers.llava_next import num_image_features

CONFIGS = Path(__file__).parent.parent / "configs"
GIB = 2**30

TEXT = {
    "llava-v1.6-mistral-7b": ("mistral", {"num_key_value_heads": 8, "intermediate_size": 14336}),
    "llava-v1.6-vicuna-7b": ("llama", {"num_key_value_heads": 32, "intermediate_size": 11008}),
}


def shapes(name: str) -> LlavaNextConfig:
    """The hub model's shapes."""
    model_type, text = TEXT[name]
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=CONFIG_MAPPING[model_type](
            hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064, **text
        ),
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    )


@pytest.mark.parametrize("name", TEXT)
def test_figures_of_a_recipe(name: str) -> None:
    comments = (CONFIGS / f"{name}.yaml").read_text()
    config: Any = load_config(CONFIGS / f"{name}.yaml")
    assert config.model.name_or_path == f"llava-hf/{name}-hf"
    student = swiftkv_config(shapes(name), config.model.num_key_value_layers, config.model.key_value_group_size)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(student)
    counts = dict.fromkeys((True, False), 0)
    for key, parameter in model.named_parameters():
        counts["_swiftkv" in key] += parameter.numel()
    frozen, trained = counts[False], counts[True]
    assert f"{frozen + trained:,}, of them {trained:,} trained" in comments

    text = student.text_config
    heads = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    keys_and_values = 3 * 2 * 2 * 16 * config.data.max_length * heads  # projected, as heads, rotated; bfloat16
    memory = {
        "frozen weights": frozen * 2 / GIB,
        "trained weights": trained * 4 * 4 / GIB,
        "keys and values": keys_and_values / GIB,
        "logits": 6 * config.model.logits_memory_mib / 1024,
    }
    for what, size in memory.items():
        assert re.search(rf" {size:.1f} GiB {what}", comments), (what, size)
    total = sum(round(size, 1) for size in memory.values())
    assert f"{total:.1f} GiB in all" in comments
    checkpoint = trained * 4 * 3 / GIB
    assert f"{3 * checkpoint:.1f} GiB checkpoints: {checkpoint:.1f} GiB each" in comments
    assert f"{(frozen + trained) * 2 / GIB:.1f} GiB final/" in comments
    assert f"{frozen * 2 / GIB:.1f} GiB for the downloaded model" in comments
    largest = max(num_image_features(student, (h, w)) for h in range(100, 1400, 13) for w in range(100, 1400, 13))
    assert f"up to {largest:,} tokens" in comments


def test_they_come_with_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is listed with its first line, a whole sentence, and printed as it is."""
    files = sorted(CONFIGS.glob("*.yaml"))
    assert configs.main([]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [file.stem for file in files]
    for file, line in zip(files, listed, strict=True):
        assert line.endswith((".", "?")) and file.read_text().startswith(f"# {line.split(maxsplit=1)[1]}\n")
        assert configs.main([file.stem]) == 0
        assert capsys.readouterr().out == file.read_text()
    assert configs.main(["quickstep"]) == 2
    assert "quickstep: there is no such config; wanted one of " in capsys.readouterr().err


def test_they_go_into_a_wheel() -> None:
    """And so does the model: by what setuptools is told, file by file."""
    project = tomllib.loads((CONFIGS.parent / "pyproject.toml").read_text())
    package = CONFIGS.parent / "vlskv_ray"
    globs = project["tool"]["setuptools"]["package-data"]["vlskv_ray"]
    packed = {file.relative_to(package).as_posix() for pattern in globs for file in package.glob(pattern)}
    assert packed == {
        *(f"config/shipped/{file.relative_to(CONFIGS)}" for file in CONFIGS.rglob("*") if file.is_file()),
        *(f"model/shapes_teacher/{file.name}" for file in (package / "model" / "shapes_teacher").iterdir()),
    }


def test_a_package_without_them_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose link to them was not copied."""
    monkeypatch.setattr(configs, "FOLDER", tmp_path / "gone")
    for name in (None, "quickstart"):
        with pytest.raises(ValueError, match="gone: holds no configs; this copy of the package lacks them"):
            configs.show(name)
