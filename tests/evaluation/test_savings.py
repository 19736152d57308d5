"""What is said of a student's savings: operations and bytes are counted here, seconds never."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from vlskv_ray.data.collate import Encoded
from vlskv_ray.evaluation.savings import cache_bytes, measure_savings, prompt
from vlskv_ray.model.swiftkv import swiftkv_backbone

# of `tiny_config`: layers, hidden, MLP, heads x size, key/value heads x size, vocabulary
L, D, M, Q, KV, V = 6, 32, 48, 32, 16, 300


def layer_flops(queries: int, keys: int, projected: int) -> int:
    """Of a text layer: queries, output and MLP of some tokens, their attention, keys and values of `projected`."""
    return 2 * queries * (2 * D * Q + 3 * D * M) + 4 * queries * keys * Q + 2 * projected * 2 * D * KV


def teacher_flops(length: int) -> int:
    return L * layer_flops(length, length, length) + 2 * D * V


def student_flops(length: int, num_key_value_layers: int, key_value_group_size: int) -> int:
    lower = num_key_value_layers * layer_flops(length, length, length)
    upper = L - num_key_value_layers
    leaders = upper // key_value_group_size
    return lower + leaders * layer_flops(1, length, length) + (upper - leaders) * layer_flops(1, length, 0) + 2 * D * V


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("num_key_value_layers", "key_value_group_size"), [(1, 1), (2, 1), (2, 2), (2, 4), (5, 1)])
def test_operations_are_those_of_the_formula(
    student: Callable[..., Any], num_key_value_layers: int, key_value_group_size: int, attention: str
) -> None:
    """All of them for the teacher; above N for the student those of one token, and keys and values once a group."""
    groups = {"num_key_value_layers": num_key_value_layers, "key_value_group_size": key_value_group_size}
    model = student(**groups)
    model.set_attn_implementation(attention)
    savings = measure_savings(model, None, lengths=(300, 64), repeats=1)
    assert savings["prompt_lengths"] == [64, 300]
    assert savings["teacher_prefill_flops"] == [teacher_flops(64), teacher_flops(300)]
    assert savings["student_prefill_flops"] == [student_flops(64, **groups), student_flops(300, **groups)]
    assert savings["prefill_flops_ratio"] == student_flops(300, **groups) / teacher_flops(300)


@pytest.mark.parametrize("index", [0, 2])
def test_both_pay_for_the_images(student: Callable[..., Any], encoded: list[Encoded], index: int) -> None:
    """The vision tower is counted, and the same for teacher and student."""
    savings = measure_savings(student(), encoded[index], lengths=(200,), repeats=1)
    (teacher,), (ours,) = savings["teacher_prefill_flops"], savings["student_prefill_flops"]
    vision = teacher - teacher_flops(200)
    assert vision == ours - student_flops(200, 2, 1)
    assert (
        vision > sum(len(image.pixels["tiles"]) for image in encoded[index].images) * 2 * (3 * 32 * 32) * 32
    )  # patches alone


def test_a_smaller_n_saves_more(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    ratios = [
        measure_savings(student(num_key_value_layers=n), encoded[0], lengths=(128,), repeats=1)["prefill_flops_ratio"]
        for n in (1, 2, 3, 4, 5)
    ]
    assert ratios == sorted(set(ratios)) and ratios[-1] < 1


@pytest.mark.parametrize(("group", "stored"), [(1, 6), (2, 4), (4, 3)])
def test_the_cache_is_what_is_stored(
    student: Callable[..., Any], encoded: list[Encoded], group: int, stored: int
) -> None:
    """Keys and values, four bytes a number, of N layers and of one layer a group."""
    savings = measure_savings(student(key_value_group_size=group), encoded[2], lengths=(200,), repeats=1)
    assert savings["teacher_cache_bytes_per_token"] == L * 2 * KV * 4
    assert savings["student_cache_bytes_per_token"] == stored * 2 * KV * 4
    assert savings["cache_bytes_ratio"] == stored / L


def test_a_view_is_no_second_cache() -> None:
    cache, states = DynamicCache(), torch.zeros(1, 2, 5, 8)
    cache.update(states, states, 0)
    cache.update(states, states, 1)
    assert cache_bytes(cache) == 4 * states.nbytes
    cache.layers[1].keys, cache.layers[1].values = cache.layers[0].keys[:, :, 1:], cache.layers[0].values
    assert cache_bytes(cache) == 2 * states.nbytes


@pytest.mark.parametrize("toggle", [True, False])
def test_the_toggle_stays_as_it_was(student: Callable[..., Any], encoded: list[Encoded], toggle: bool) -> None:
    """After an error too, whichever side it comes from."""
    model = student()
    model.config.text_config.swiftkv = toggle
    measure_savings(model, encoded[1], lengths=(64,), repeats=1)
    assert swiftkv_backbone(model).config.swiftkv is toggle
    unknown = replace(encoded[1], input_ids=np.full_like(encoded[1].input_ids, 10**6))
    with pytest.raises(IndexError):
        measure_savings(model, unknown, lengths=(64,), repeats=1)
    assert swiftkv_backbone(model).config.swiftkv is toggle
    swiftkv_backbone(model).layers[-1].self_attn.q_proj_swiftkv = None  # which the teacher does without
    with pytest.raises(TypeError):
        measure_savings(model, encoded[1], lengths=(64,), repeats=1)
    assert swiftkv_backbone(model).config.swiftkv is toggle


def test_a_prompt_is_the_sample_and_its_words_again(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    """Every image stays whole, and nothing but words is added."""
    model, sample = student(), encoded[2]
    inputs = prompt(model, sample, 400)
    ids, own = inputs["input_ids"][0].numpy(), sample.input_ids
    added = ids[len(own) :]
    assert len(ids) == 400 and (ids[: len(own)] == own).all()
    assert added.min() > 4  # the special tokens are the first five
    assert (added[: (own > 4).sum()] == own[own > 4]).all()
    assert len(inputs["pixel_values"]) == len(sample.images)


def test_teacher_and_student_are_timed_in_turn(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    """After a prefill of each that counts operations and warms up."""
    model, sides = student(), []
    model.register_forward_pre_hook(lambda *_: sides.append(swiftkv_backbone(model).config.swiftkv))
    savings = measure_savings(model, encoded[2], lengths=(200, 300), repeats=3)
    assert sides == [False, True] * (2 * (1 + 3)) and savings["prompt_images"] == 2


def test_cpu_time_is_of_this_process_alone(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    """What a clock shows while the process waits, here as the teacher, is not in it."""
    model, waiting = student(), 0.3

    def wait(*_: Any) -> None:
        time.sleep(0 if swiftkv_backbone(model).config.swiftkv else waiting)

    model.register_forward_pre_hook(wait)
    savings = measure_savings(model, encoded[1], lengths=(64,), repeats=1)
    (cpu,), (clock,) = savings["teacher_prefill_cpu_seconds"], savings["teacher_prefill_seconds"]
    assert 0 < cpu < waiting <= clock
    assert savings["prefill_cpu_time_ratio"] == savings["student_prefill_cpu_seconds"][0] / cpu


def test_lengths_that_cannot_be(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    """Beyond the model's positions, within the sample's images, or beyond the time; one is always measured."""
    model, sample = student(), encoded[2]  # 512 positions; the images end after the 64th token

    def measured(sample: Encoded | None, **options: Any) -> Any:
        return measure_savings(model, sample, repeats=1, **options)["prompt_lengths"]

    assert measured(None) == [64, 128, 256, 512]
    assert measured(sample) == [128, 256, 512]
    assert measured(sample, lengths=(8, 1024)) == [len(sample.input_ids)]
    assert measured(None, lengths=(1024,)) == [512]
    assert measured(None, budget_seconds=0.0) == [64]


def test_savings_are_ready_for_json(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    model = student()
    savings = measure_savings(model, encoded[0], lengths=(64, 128), repeats=2)
    assert json.loads(json.dumps(savings)) == savings
    assert set(savings) == {
        *("prompt_lengths", "teacher_prefill_seconds", "student_prefill_seconds"),
        *("teacher_prefill_cpu_seconds", "student_prefill_cpu_seconds", "prefill_cpu_time_ratio", "prompt_images"),
        *("teacher_prefill_flops", "student_prefill_flops"),
        *("prompt_length", "prefill_time_ratio", "prefill_flops_ratio"),
        *("teacher_cache_bytes_per_token", "student_cache_bytes_per_token", "cache_bytes_ratio"),
        *("parameters", "trainable_parameters", "threads", "device"),
    }
    lists = {len(value) for value in savings.values() if isinstance(value, list)}
    assert lists == {2} and savings["prompt_length"] == 128
    assert savings["parameters"] == model.num_parameters()
    assert savings["trainable_parameters"] == model.num_parameters(only_trainable=True)
