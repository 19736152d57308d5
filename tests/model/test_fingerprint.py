"""What a teacher cache is named by: the teacher, wherever and in whatever form it lies."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlskv_ray.model.build import build_student, find_model
from vlskv_ray.model.fingerprint import fingerprint_of, teacher_fingerprint


def fingerprint(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    return teacher_fingerprint(find_model(str(folder)), dtype)


def save_as_final(model: Any, teacher: Path, folder: Path) -> Path:
    """As a run leaves it."""
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(teacher, backend="pil").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_student_has_that_of_its_teacher(teacher_folder: Callable[..., Path], tmp_path: Path, tied: bool) -> None:
    """Of whatever N, trained or not, in one file or in shards; the models themselves have different ones."""
    teacher = teacher_folder(tie_word_embeddings=tied)
    wanted = fingerprint(teacher)
    found = [fingerprint_of(find_model(str(teacher)))]
    for layers, group in ((2, 1), (4, 2)):
        student = build_student(find_model(str(teacher)), layers, group)
        for weight in student.parameters():
            weight.data += 0.1 * weight.requires_grad
        final = save_as_final(student, teacher, tmp_path / f"final-{layers}")
        assert fingerprint(final) == wanted
        found.append(fingerprint_of(find_model(str(final))))
    assert len({*found}) == 3
    whole = AutoModelForImageTextToText.from_pretrained(teacher)
    whole.save_pretrained(save_as_final(whole, teacher, tmp_path / "shards"), max_shard_size="50KB")
    (tmp_path / "shards" / "model.safetensors").unlink(missing_ok=True)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2 and fingerprint(tmp_path / "shards") == wanted


def test_weights_count_as_the_run_has_them(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    """What a run in bfloat16 leaves is its teacher's again in bfloat16, and another teacher in float32."""
    student = build_student(find_model(str(teacher_folder())), 2, dtype=torch.bfloat16).to(torch.bfloat16)
    final = save_as_final(student, teacher_folder(), tmp_path / "final")
    assert fingerprint(final, torch.bfloat16) == fingerprint(teacher_folder(), torch.bfloat16)
    assert fingerprint(final) != fingerprint(teacher_folder()) != fingerprint(teacher_folder(), torch.bfloat16)


def test_whatever_makes_other_states_is_another_teacher(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    """One weight within a large tensor, a name, a value of the config, the template, a token, the scale of pixels."""
    folder = Path(shutil.copytree(teacher_folder(), tmp_path / "model"))
    found = [fingerprint(folder)]
    originals = {path.name: path.read_bytes() for path in folder.iterdir()}

    def change_weight(name: str) -> None:
        weights = load_file(folder / "model.safetensors")
        weights[name].flatten()[weights[name].numel() // 2] += 1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def change_json(name: str, *keys: str, to: Any) -> None:
        content = json.loads((folder / name).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        assert keys[-1] in inner
        inner[keys[-1]] = to
        (folder / name).write_text(json.dumps(content))

    template = originals["chat_template.jinja"].decode()
    for change in (
        lambda: change_weight("language_model.lm_head.weight"),
        lambda: change_weight("vision_tower.post_layernorm.weight"),
        lambda: change_json("config.json", "text_config", "rms_norm_eps", to=1e-3),
        lambda: change_json("config.json", "vision_feature_layer", to=-1),
        lambda: change_json("processor_config.json", "image_processor", "image_mean", to=[0.1, 0.2, 0.3]),
        lambda: change_json("tokenizer.json", "model", "ignore_merges", to=False),
        lambda: (folder / "chat_template.jinja").write_text(template.replace("ASSISTANT", "MODEL")),
    ):
        change()
        found.append(fingerprint(folder))
        for name, content in originals.items():
            (folder / name).write_bytes(content)
    assert len({*found}) == len(found) and fingerprint(folder) == found[0]


def test_how_it_was_saved_is_of_no_account(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher_folder(), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"transformers_version": "4.99.0", "architectures": None, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "README.md").write_text("# something")
    weights = load_file(folder / "model.safetensors")
    for old, new in (
        ("vision_tower.", "vision_tower.vision_model."),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
    ):
        renamed = {new + name.removeprefix(old) if name.startswith(old) else name: w for name, w in weights.items()}
        assert renamed.keys() != weights.keys()
        weights = renamed
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        assert fingerprint(folder) == fingerprint(teacher_folder())
