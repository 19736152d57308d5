"""The SwiftKV backbones: the teacher bit for bit, the method by its formulas, generation, caches and files."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from conftest import batch_of, tiny_config
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaNextForConditionalGeneration,
    StaticCache,
)

from vlskv_ray.data.collate import Encoded
from vlskv_ray.model.swiftkv import BACKBONES, SwiftKVPass, swiftkv_backbone

LAYERS = [(2, 1), (2, 2), (2, 4), (5, 1)]


def logits(model: Any, batch: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch.model_inputs(model.config), use_cache=False, **options).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_off_is_the_stock_teacher_bit_for_bit(
    teacher_folder: Callable[..., Path],
    student: Callable[..., Any],
    encoded: list[Encoded],
    backbone: str,
    attention: str,
) -> None:
    stock = AutoModelForImageTextToText.from_pretrained(teacher_folder(backbone), attn_implementation=attention)
    ours = student(backbone, key_value_group_size=2)
    ours.set_attn_implementation(attention)
    batch = batch_of(encoded)
    on = logits(ours, batch)
    swiftkv_backbone(ours).config.swiftkv = False
    off = logits(ours, batch)
    assert type(ours) is LlavaNextForConditionalGeneration
    assert torch.equal(off, logits(stock, batch))
    assert not torch.allclose(on, off, atol=1e-3)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("num_key_value_layers", "key_value_group_size"), LAYERS)
def test_on_follows_the_formulas(
    student: Callable[..., Any],
    encoded: list[Encoded],
    float64_norms: None,
    backbone: str,
    num_key_value_layers: int,
    key_value_group_size: int,
) -> None:
    model = student(
        backbone,
        dtype=torch.float64,
        num_key_value_layers=num_key_value_layers,
        key_value_group_size=key_value_group_size,
    )
    batch = batch_of(encoded[1:2])
    backbone_model = swiftkv_backbone(model)
    x = reference.embeddings(model, batch)[0]
    wanted, _ = reference.text_model(dict(backbone_model.named_parameters()), backbone_model.config, x, swiftkv=True)
    assert torch.allclose(logits(model, batch)[0], (wanted @ model.lm_head.weight.T).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_kept_tokens_are_those_of_the_whole_pass(
    student: Callable[..., Any], encoded: list[Encoded], backbone: str
) -> None:
    """The last k tokens, or those of a mask, of student and teacher alike; a sample may have none."""
    model = student(backbone, key_value_group_size=2)
    batch = batch_of(encoded[:4])
    inputs = batch.model_inputs(model.config) | {"use_cache": False}
    with torch.no_grad():
        student_states = model.model(**inputs).last_hidden_state
        last = model.model(**inputs, swiftkv=SwiftKVPass(keep=3)).last_hidden_state
        keep = (torch.rand(batch.input_ids.shape) < 0.2) & batch.attention_mask.bool()
        keep[1] = False
        flat = model.model(**inputs, swiftkv=SwiftKVPass(keep=keep)).last_hidden_state
        both = SwiftKVPass(keep=keep, distill=True)
        teacher = model.model(**inputs, swiftkv=both).last_hidden_state
        swiftkv_backbone(model).config.swiftkv = False
        teacher_states = model.model(**inputs).last_hidden_state
    assert torch.allclose(last, student_states[:, -3:], atol=2e-6)
    assert torch.allclose(flat[0], student_states[keep], atol=2e-6)
    assert both.student is not None and torch.allclose(both.student[0], student_states[keep], atol=2e-6)
    assert torch.allclose(teacher[0], teacher_states[keep], atol=2e-6)


def test_any_number_of_kept_tokens(student: Callable[..., Any]) -> None:
    """None at all, or those of sequences of a single token."""
    model, ids = student(), torch.tensor([[7], [8], [9]])
    with torch.no_grad():
        whole = model.model(ids, use_cache=False).last_hidden_state
        keep = torch.tensor([[True], [False], [True]])
        kept = model.model(ids, use_cache=False, swiftkv=SwiftKVPass(keep=keep)).last_hidden_state
        none = model.model(ids, use_cache=False, swiftkv=SwiftKVPass(keep=keep & False)).last_hidden_state
    assert torch.allclose(kept[0], whole[keep], atol=1e-6)
    assert none.shape == (1, 0, whole.shape[-1])


def test_kept_tokens_need_padding_on_the_right(student: Callable[..., Any]) -> None:
    ids, mask = torch.tensor([[7, 8, 9], [7, 8, 9]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    with pytest.raises(ValueError, match="padded on the right"):
        student().model(ids, attention_mask=mask, use_cache=False, swiftkv=SwiftKVPass(keep=ids > 7))


def test_sliding_windows_stay(teacher_folder: Callable[..., Path], encoded: list[Encoded]) -> None:
    """A mistral whose window is shorter than the prompt: kept tokens see the window that whole passes see."""
    from vlskv_ray.model.build import build_student, find_model

    model = build_student(find_model(str(teacher_folder("mistral", sliding_window=16))))
    batch = batch_of([encoded[2], encoded[1], encoded[4]])
    keep = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    keep[0, 60:70] = keep[1, 3:5] = keep[2, 30:40] = True
    whole = logits(model, batch)
    with torch.no_grad():
        kept = model.model(
            **batch.model_inputs(model.config), use_cache=False, swiftkv=SwiftKVPass(keep=keep)
        ).last_hidden_state
    assert torch.allclose(model.lm_head(kept)[0], whole[keep], atol=1e-5)
    model.model.language_model.config.sliding_window = None
    assert not torch.allclose(logits(model, batch), whole, atol=1e-3)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("group", [1, 2])
def test_generate_skips_the_upper_layers_for_the_prompt(
    student: Callable[..., Any], encoded: list[Encoded], backbone: str, group: int
) -> None:
    """Greedy tokens are those of whole passes, and the upper MLPs see one token a step, the first included."""
    model = student(backbone, key_value_group_size=group)
    batch = batch_of(encoded[2:3])
    tokens = batch.model_inputs(model.config)
    seen: dict[int, list[int]] = {1: [], 4: []}
    hooks = [
        swiftkv_backbone(model).layers[i].mlp.register_forward_hook(lambda _, x, y, i=i: seen[i].append(x[0].shape[1]))
        for i in seen
    ]
    generated = model.generate(**tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for hook in hooks:
        hook.remove()
    prompt = batch.input_ids.shape[1]
    assert seen[1] == [prompt] + [1] * 7
    assert seen[4] == [1] * 8
    ids = batch.input_ids
    for _ in range(8):
        tokens |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            scores = model(**tokens, use_cache=False).logits[:, -1]
        scores[:, 2] = -torch.inf  # min_new_tokens forbids the end-of-sequence token
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(generated, ids)


def test_batched_generation_with_left_padding(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    """Each sample of a left-padded batch generates what it does alone."""
    model = student()
    prompts = [torch.from_numpy(encoded[i].input_ids) for i in (1, 3, 5)]
    longest = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.full((longest - len(p),), 3), p]) for p in prompts])
    mask = torch.stack([torch.cat([torch.zeros(longest - len(p)), torch.ones(len(p))]) for p in prompts]).long()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    together = model.generate(input_ids=ids, attention_mask=mask, **options)[:, longest:]
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(input_ids=prompt[None], attention_mask=torch.ones_like(prompt[None]), **options)
        assert torch.equal(row, alone[0, len(prompt) :])


@pytest.mark.parametrize(("num_key_value_layers", "key_value_group_size"), LAYERS)
def test_a_group_keeps_one_cache(
    student: Callable[..., Any], encoded: list[Encoded], num_key_value_layers: int, key_value_group_size: int
) -> None:
    """Numbers in the cache: those of N layers and of one a group; the teacher keeps all layers'."""
    model = student(num_key_value_layers=num_key_value_layers, key_value_group_size=key_value_group_size)

    def cached() -> int:
        with torch.no_grad():
            cache = model(**batch_of(encoded[1:2]).model_inputs(model.config), use_cache=True).past_key_values
        stored = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        return sum(layer.keys.numel() + layer.values.numel() for layer in stored)

    with_swiftkv = cached()
    swiftkv_backbone(model).config.swiftkv = False
    of_teacher = cached()
    stored_layers = num_key_value_layers + (6 - num_key_value_layers) // key_value_group_size
    assert with_swiftkv * 6 == of_teacher * stored_layers
    for swiftkv, stored in ((True, stored_layers), (False, 6)):  # nor does one that is allocated ahead
        model.config.text_config.swiftkv = swiftkv
        ahead = StaticCache(config=model.config.text_config, max_cache_len=8)
        ahead.early_initialization(1, num_heads=2, head_dim=8, dtype=torch.float32, device="cpu")
        assert sum(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in ahead.layers) == stored


@pytest.mark.parametrize("backbone", BACKBONES)
def test_files_copies_and_pickles_are_the_same_model(
    student: Callable[..., Any], encoded: list[Encoded], tmp_path: Path, backbone: str
) -> None:
    model = student(backbone, key_value_group_size=2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    copies = (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    batch = batch_of(encoded)
    wanted = logits(model, batch)
    assert type(loaded) is LlavaNextForConditionalGeneration
    for other in copies:
        assert swiftkv_backbone(other).config.swiftkv
        assert torch.equal(logits(other.eval(), batch), wanted)
        assert len(other._forward_pre_hooks) == 1  # the fast prefill came along, once


def test_text_only_models_are_registered_too() -> None:
    for backbone in BACKBONES:
        text = tiny_config(backbone).text_config.to_dict()
        text.pop("model_type")
        config = CONFIG_MAPPING[f"{backbone}_swiftkv"](**text, num_key_value_layers=3, swiftkv=True)
        model = AutoModelForCausalLM.from_config(config).eval()
        start = model.model.layers[4].self_attn
        assert torch.equal(start.q_proj_swiftkv.weight, start.q_proj.weight)
        assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, min_new_tokens=2).shape == (1, 5)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"num_key_value_layers": 7}, "num_key_value_layers=7: the model has 6 layers"),
        ({"num_key_value_layers": 0}, "num_key_value_layers=0"),
        ({"num_key_value_layers": 3, "key_value_group_size": 2}, "does not divide the 3 layers"),
    ],
)
def test_impossible_layers_are_refused(layers: dict[str, int], message: str) -> None:
    with pytest.raises(Exception, match=message):
        CONFIG_MAPPING["llama_swiftkv"](num_hidden_layers=6, **layers)


def test_a_group_cannot_mix_full_and_sliding_layers() -> None:
    kinds = ["full_attention", "sliding_attention"] * 3
    with pytest.raises(Exception, match="full and with sliding attention"):
        CONFIG_MAPPING["qwen2_swiftkv"](
            num_hidden_layers=6, layer_types=kinds, num_key_value_layers=2, key_value_group_size=2
        )


def test_an_unknown_backbone_has_no_swiftkv_form() -> None:
    with pytest.raises(ValueError, match="gemma_swiftkv"):
        AutoConfig.for_model("gemma_swiftkv")
