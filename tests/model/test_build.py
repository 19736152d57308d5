"""From a checkpoint to a student: where its weights come from, what trains, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batch_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vlskv_ray.data.collate import Encoded
from vlskv_ray.model.build import build_student, find_model, load_config, swiftkv_config, trainable_parameters
from vlskv_ray.model.presets import PRESETS, build_teacher
from vlskv_ray.model.processor import load_processor
from vlskv_ray.model.swiftkv import BACKBONES, swiftkv_backbone
from vlskv_ray.training.distill import DistillationLoss, distillation_loss


def test_the_small_preset_has_its_published_size() -> None:
    """4,406,080 parameters, 16,448 of them trained; the teacher in it is the same for every N."""
    model = build_student(find_model("small-llava-next"), num_key_value_layers=2)
    assert sum(p.numel() for p in model.parameters()) == 4_406_080
    assert sum(p.numel() for p in trainable_parameters(model).values()) == 16_448
    teacher = build_teacher(PRESETS["small-llava-next"].config())
    assert sum(p.numel() for p in teacher.parameters()) == 4_389_632
    held = model.state_dict()
    assert all(torch.equal(held[name], weight) for name, weight in teacher.state_dict().items())


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("group", [1, 2])
def test_a_student_starts_as_its_teacher(student: Callable[..., Any], backbone: str, group: int) -> None:
    """Norm and queries copied, keys and values the mean of their group, biases too; nothing else is new."""
    model = swiftkv_backbone(student(backbone, moved=False, key_value_group_size=group))
    assert torch.equal(model.norm_swiftkv.weight, model.layers[2].input_layernorm.weight)
    biases = 0
    for i in range(2, 6):
        attention = model.layers[i].self_attn
        for key, weight in attention.q_proj_swiftkv.named_parameters():
            assert torch.equal(weight, attention.q_proj.get_parameter(key))
            biases += key == "bias"
        is_leader = (i - 2) % group == 0
        assert hasattr(attention, "k_proj_swiftkv") == is_leader
        if is_leader:
            for name in ("k_proj", "v_proj"):
                for key, weight in getattr(attention, f"{name}_swiftkv").named_parameters():
                    mates = [getattr(model.layers[j].self_attn, name).get_parameter(key) for j in range(i, i + group)]
                    assert torch.allclose(weight, sum(mates) / group, atol=1e-7)
    assert biases == (4 if backbone == "qwen2" else 0)


def test_only_swiftkv_weights_train(student: Callable[..., Any]) -> None:
    model = student()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "_swiftkv" in name
    }
    assert not model.training


def test_a_student_checkpoint_keeps_its_weights(student: Callable[..., Any], tmp_path: Path) -> None:
    """Training goes on from SwiftKV weights that are there, N and group size with them."""
    model = student(num_key_value_layers=4, key_value_group_size=2)
    model.save_pretrained(tmp_path)
    again = build_student(find_model(str(tmp_path)))
    assert swiftkv_backbone(again).config.num_key_value_layers == 4
    wanted = model.state_dict()
    assert all(torch.equal(wanted[name], weight) for name, weight in again.state_dict().items())
    with pytest.raises(ValueError, match="num_key_value_layers: 3, but the checkpoint holds SwiftKV weights for 4"):
        build_student(find_model(str(tmp_path)), num_key_value_layers=3)


def test_half_of_the_layers_is_the_default(teacher_folder: Callable[..., Path]) -> None:
    text = swiftkv_config(load_config(find_model(str(teacher_folder())))).text_config
    assert (text.num_key_value_layers, text.key_value_group_size, text.model_type) == (3, 1, "llama_swiftkv")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((6, 1), "model.num_key_value_layers: 6, but the text model has 6 layers; wanted 1 to 5"),
        ((3, 2), "key_value_group_size=2 does not divide the 3 layers"),
    ],
)
def test_impossible_layers_are_refused(
    teacher_folder: Callable[..., Path], layers: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        swiftkv_config(load_config(find_model(str(teacher_folder()))), *layers)


def test_trained_weights_are_float32_in_a_bfloat16_model(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    from vlskv_ray.training.step import autocast

    model = student(dtype=torch.bfloat16)
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    batch = batch_of(encoded)
    with autocast(model):
        loss, sums = distillation_loss(model, batch, DistillationLoss())
    assert loss is not None
    loss.backward()
    exact, exact_sums = distillation_loss(student(), batch, DistillationLoss())
    assert sums.loss == pytest.approx(exact_sums.loss, rel=0.1)
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in trainable_parameters(model).values())


# ------------------------------------------------------------------------------------------------------------ the hub
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_hub_id_is_pinned_to_its_commit(
    teacher_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small checkpoint in the hub cache's own layout: found by branch and by commit, without a network."""
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(teacher_folder(), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in (None, "main", COMMIT):
        checkpoint = find_model("someone/tiny", revision)
        assert checkpoint.revision == COMMIT
    model = build_student(checkpoint)
    assert swiftkv_backbone(model).config.num_key_value_layers == 3
    assert load_processor(checkpoint).image_token == "<image>"
    with pytest.raises(ValueError, match="'someone/other' at revision 'v2' is neither a folder nor to be had"):
        find_model("someone/other", "v2")


def test_hub_layout_of_old_checkpoints(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Weights under the hub's older names (`language_model.model.*`) load, and are saved under them again."""
    folder = tmp_path / "old"
    shutil.copytree(teacher_folder(), folder)
    weights = load_file(folder / "model.safetensors")
    renames = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.image_newline": "image_newline",
        "lm_head.": "language_model.lm_head.",
    }
    plain = {name.replace("language_model.model.", "model.language_model."): w for name, w in weights.items()}

    def old(name: str) -> str:
        for new, hub in renames.items():
            if name.startswith(new):
                return hub + name.removeprefix(new)
        return name

    save_file({old(name): weight for name, weight in plain.items()}, folder / "model.safetensors", {"format": "pt"})
    stock = AutoModelForImageTextToText.from_pretrained(teacher_folder())
    model = build_student(find_model(str(folder)))
    held = model.state_dict()
    assert all(torch.equal(held[name], weight) for name, weight in stock.state_dict().items())
    model.save_pretrained(tmp_path / "again")
    names = load_file(tmp_path / "again" / "model.safetensors").keys()
    assert "language_model.model.layers.3.self_attn.q_proj_swiftkv.weight" in names
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert all(torch.equal(held[name], weight) for name, weight in again.state_dict().items())


# --------------------------------------------------------------------------------------------------------- bad input
def edited(
    teacher_folder: Callable[..., Path], tmp_path: Path, file: str, edit: Callable[[dict[str, Any]], Any]
) -> str:
    folder = tmp_path / "edited"
    shutil.copytree(teacher_folder(), folder)
    content = json.loads((folder / file).read_text())
    edit(content)
    (folder / file).write_text(json.dumps(content))
    return str(folder)


def test_a_name_that_is_nothing() -> None:
    with pytest.raises(ValueError, match="there is no folder './nowhere'; wanted a preset"):
        find_model("./nowhere")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no config.json"):
        find_model(str(tmp_path))


def test_other_backbones_are_refused_with_the_list(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    name = edited(teacher_folder, tmp_path, "config.json", lambda c: c["text_config"].update(model_type="gemma"))
    with pytest.raises(ValueError, match="text model is a 'gemma'.*supported: llama, mistral, qwen2, qwen3"):
        load_config(find_model(name))


def test_other_wrappers_are_refused_with_the_list(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    name = edited(teacher_folder, tmp_path, "config.json", lambda c: c.update(model_type="blip"))
    with pytest.raises(ValueError, match="model_type 'blip' is not supported; supported: llava_next"):
        load_config(find_model(name))


def test_a_broken_config_is_named(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited(teacher_folder, tmp_path, "config.json", lambda c: None)
    (Path(folder) / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        load_config(find_model(folder))


def test_missing_weights_are_named(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(edited(teacher_folder, tmp_path, "config.json", lambda c: None))
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "layers.5.self_attn.o_proj" in name))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing, such as .*layers\.5\.self_attn\.o_proj"):
        build_student(find_model(str(folder)))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="weights cannot be loaded"):
        build_student(find_model(str(folder)))


def test_weights_that_need_unpickling_are_not_read(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(edited(teacher_folder, tmp_path, "config.json", lambda c: None))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="weights cannot be loaded"):
        build_student(find_model(str(folder)))


def test_a_foreign_tokenizer_is_refused(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    """More ids than embeddings, or the image token elsewhere: an error that says why."""
    few = edited(teacher_folder, tmp_path, "config.json", lambda c: c["text_config"].update(vocab_size=200))
    with pytest.raises(ValueError, match="ids up to 299 but the model has 200 embeddings"):
        load_processor(find_model(few))
    other = edited(teacher_folder, tmp_path / "b", "config.json", lambda c: c.update(image_token_index=7))
    with pytest.raises(ValueError, match="id of '<image>' is 4, but the model puts images at id 7"):
        load_processor(find_model(other))


def test_a_processor_without_a_chat_template_is_refused(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(edited(teacher_folder, tmp_path, "config.json", lambda c: None))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        load_processor(find_model(str(folder)))


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c["text_config"].update(hidden_size=33),
        lambda c: c["text_config"].update(num_attention_heads=0),
        lambda c: c["text_config"].update(vocab_size="x"),
        lambda c: c["text_config"].update(hidden_act="nothing"),
        lambda c: c["text_config"].update(num_hidden_layers=4),
        lambda c: c.update(text_config="x"),
        lambda c: c.update(vision_feature_select_strategy="zz"),
        lambda c: c.update(image_grid_pinpoints=[]),
        lambda c: c.update(image_grid_pinpoints=[[1]]),
        lambda c: c["vision_config"].update(patch_size=0),
        lambda c: c["vision_config"].update(patch_size=16),
    ],
)
def test_a_config_that_does_not_belong_is_one_clear_error(
    teacher_folder: Callable[..., Path], tmp_path: Path, edit: Callable[[dict[str, Any]], Any]
) -> None:
    """Whatever transformers trips over: a ValueError that names the model."""
    with pytest.raises(ValueError, match="model.name_or_path: .*edited") as error:
        files = find_model(edited(teacher_folder, tmp_path, "config.json", edit))
        load_processor(files)
        build_student(files)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("processor_config.json", "[]"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer.json", "{"),
        ("processor_config.json", "{"),
    ],
)
def test_a_damaged_processor_is_one_clear_error(
    teacher_folder: Callable[..., Path], tmp_path: Path, file: str, content: str
) -> None:
    folder = Path(edited(teacher_folder, tmp_path, "config.json", lambda c: None))
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match="model.name_or_path: .*edited") as error:
        load_processor(find_model(str(folder)))
    assert "\n" not in str(error.value)


def test_padding_of_the_teachers_tokenizer_is_left_alone(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited(teacher_folder, tmp_path, "tokenizer_config.json", lambda c: c.update(padding_side="left"))
    assert load_processor(find_model(folder)).tokenizer.padding_side == "left"
