"""Loading by transformers' own ways: what a checkpoint holds is left alone, wherever and in whatever form it comes."""

from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForImageTextToText, TorchAoConfig

from vlskv_ray.model.build import swiftkv_config
from vlskv_ray.model.swiftkv import swiftkv_backbone

IDS = torch.tensor([[*range(40, 60)]])
WITHOUT_PACKAGE = "needs the package {}, which this one does not depend on"


class Arithmetic(TorchDispatchMode):
    """Counts the operations by which weights start: means of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def saved(student: Callable[..., Any], tmp_path: Path) -> tuple[Any, Path]:
    """A finished student with groups of two, and the folder where it is saved."""
    model = student("qwen2", key_value_group_size=2)
    model.save_pretrained(tmp_path / "student")
    return model, tmp_path / "student"


def answers(model: Any) -> list[int]:
    tokens: list[int] = model.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False)[0].tolist()
    return tokens


def test_nothing_is_computed_for_a_finished_student(
    saved: tuple[Any, Path], teacher_folder: Callable[..., Path]
) -> None:
    """A plain teacher's weights are averaged, one mean for each new weight; of those that are there none is."""
    model, folder = saved
    with Arithmetic() as of_student:
        loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert of_student.counts["mean"] == of_student.counts["stack"] == 0
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    teacher = teacher_folder("qwen2")
    with Arithmetic() as of_teacher:
        AutoModelForImageTextToText.from_pretrained(
            teacher, config=swiftkv_config(AutoConfig.from_pretrained(teacher), 2, 2)
        )
    assert of_teacher.counts["mean"] == 4 * 2 + 2 * 2 * 2  # queries of four layers, keys and values of two; with biases


def test_only_what_a_checkpoint_lacks_starts_anew(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    weights = load_file(folder / "model.safetensors")
    (lost,) = [name for name in weights if name.endswith("layers.4.self_attn.v_proj_swiftkv.weight")]
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    differing = [
        name for name, weight in model.state_dict().items() if not torch.equal(loaded.state_dict()[name], weight)
    ]
    assert len(differing) == 1 and differing[0].endswith("layers.4.self_attn.v_proj_swiftkv.weight")
    first, second = (swiftkv_backbone(loaded).layers[i].self_attn for i in (4, 5))
    mean = (first.v_proj.weight + second.v_proj.weight) / 2
    assert torch.allclose(first.v_proj_swiftkv.weight, mean, atol=1e-7)


def leave_on_disk(module: nn.Module) -> None:
    """As a loader that offloads: weights without numbers, and without the mark of those that were loaded."""
    for name, weight in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(weight.to("meta"), requires_grad=False))


def test_weights_on_disk_are_passed_over(student: Callable[..., Any]) -> None:
    """The teacher's or the student's own, of some layers of a group; those at hand keep what was loaded."""
    backbone = swiftkv_backbone(student(key_value_group_size=2))
    for parameter in backbone.parameters():
        parameter._is_hf_initialized = True
    before = {name: weight.clone() for name, weight in backbone.named_parameters()}
    for module in (backbone.layers[2].self_attn.k_proj, backbone.layers[2].self_attn.q_proj_swiftkv):
        leave_on_disk(module)
    for part in backbone.layers[5].modules():
        leave_on_disk(part)
    backbone._init_weights(backbone)
    for name, weight in backbone.named_parameters():
        assert weight.is_meta or torch.equal(weight, before[name])


def test_a_teacher_on_disk_cannot_be_started_from(student: Callable[..., Any]) -> None:
    backbone = swiftkv_backbone(student(key_value_group_size=2))
    leave_on_disk(backbone.layers[3].self_attn.k_proj)
    with pytest.raises(
        ValueError, match="teacher's, which are quantised or on disk here .*; load the teacher as it is"
    ):
        backbone._init_weights(backbone)


@pytest.mark.skipif(find_spec("accelerate") is None, reason=WITHOUT_PACKAGE.format("accelerate"))
def test_disk_offload(saved: tuple[Any, Path], teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Some layers on disk, a group's two in different places."""
    model, folder = saved
    text = "model.language_model"
    device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    device_map["model.image_newline"] = "cpu"
    device_map |= {f"{text}.{name}": "cpu" for name in ("embed_tokens", "norm", "norm_swiftkv", "rotary_emb")}
    device_map |= {f"{text}.layers.{i}": "disk" if i in (1, 2, 5) else "cpu" for i in range(6)}
    options = {"device_map": device_map, "offload_folder": str(tmp_path / "offloaded")}
    loaded = AutoModelForImageTextToText.from_pretrained(folder, **options)
    assert {weight.device.type for weight in loaded.parameters()} == {"cpu", "meta"}
    assert answers(loaded) == answers(model)
    teacher = teacher_folder("qwen2")
    with pytest.raises(ValueError, match="on disk"):
        config = swiftkv_config(AutoConfig.from_pretrained(teacher), 2, 2)
        AutoModelForImageTextToText.from_pretrained(teacher, config=config, **options)


@pytest.mark.skipif(find_spec("torchao") is None, reason=WITHOUT_PACKAGE.format("torchao"))
def test_quantised_while_loading(saved: tuple[Any, Path]) -> None:
    """As quantised after loading."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    _, folder = saved
    loaded = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"])
    )
    afterwards = AutoModelForImageTextToText.from_pretrained(folder)
    quantize_(
        afterwards, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and name != "lm_head"
    )
    assert type(swiftkv_backbone(loaded).layers[2].self_attn.k_proj_swiftkv.weight.data) is not torch.Tensor
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, afterwards(IDS).logits)
