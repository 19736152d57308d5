"""The fit against numpy's least squares in float64, on attention that transformers' own eager function gives."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import batch_of
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from vlskv_ray.data.collate import Batch, Encoded, supervised_positions
from vlskv_ray.evaluation.evaluator import toggled
from vlskv_ray.model.swiftkv import BACKBONES, swiftkv_backbone
from vlskv_ray.training.distill import frozen_states, kl_divergence, shared_pass
from vlskv_ray.training.fit import (
    FLOOR,
    PARTS,
    RIDGES,
    FitSums,
    add_batch,
    as_complex,
    choose,
    error,
    fit,
    groups_of,
    joined,
    set_weights,
    shared_keys,
    shared_values,
    solve,
)
from vlskv_ray.training.profiling import flop_counter

RIDGE = 0.01
WEIGHTS = (1.3, 0.7)
"""Of samples without and with images."""


def observed(model: Any, batch: Batch) -> tuple[NDArray[Any], dict[int, dict[str, NDArray[Any]]]]:
    """The normed trunk [T, D] of all tokens of a batch, and by layer the teacher's `keys` and `values` [T, K * E] and
    the attention that each token receives [T]: by the stock model, padded, with its own attention weights."""
    backbone = swiftkv_backbone(model)
    first, seen = backbone.config.num_key_value_layers, {}
    there, keep = batch.attention_mask.bool(), supervised_positions(batch.labels)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)[batch.has_image.long()]

    def record(name: str) -> Any:
        return lambda module, arguments, output: seen.__setitem__(name, output)

    hooks = []
    for i in range(first, backbone.config.num_hidden_layers):
        attention = backbone.layers[i].self_attn
        for name in PARTS:
            hooks.append(getattr(attention, name).register_forward_hook(record(f"{i}.{name}")))
    hooks.append(
        backbone.layers[first].register_forward_pre_hook(lambda module, arguments: seen.update(trunk=arguments[0]))
    )
    model.set_attn_implementation("eager")
    with torch.no_grad(), toggled(model, on=False):
        out = model.base_model(**batch.model_inputs(model.config), use_cache=False, output_attentions=True)
        x = backbone.layers[first].input_layernorm(seen["trunk"])[there]
    model.set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()
    by_layer = {}
    for i in range(first, backbone.config.num_hidden_layers):
        paid = (out.attentions[i].double() * keep[:, None, :, None]).sum((1, 2)) * weights[:, None]  # [B, T]
        received = torch.cat([row[mask] + FLOOR * row[mask].mean() for row, mask in zip(paid, there, strict=True)])
        by_layer[i] = {name: seen[f"{i}.{name}"][there].double().numpy() for name in PARTS}
        by_layer[i]["received"] = received.numpy()
    return x.double().numpy(), by_layer


def least_squares(x: Any, y: Any, a: Any, copied: Any, ridge: float) -> NDArray[Any]:
    """W of the problem, by one call of numpy: the ridge as D more rows."""
    ridge = ridge * float(np.mean((a[:, None] * x * x).sum(0)))
    rows = np.concatenate([np.sqrt(a)[:, None] * x, np.sqrt(ridge) * np.eye(x.shape[1])])
    wanted = np.concatenate([np.sqrt(a)[:, None] * y, np.sqrt(ridge) * copied.T])
    solution: NDArray[Any] = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    return solution


def sums_of(model: Any, batches: list[Batch]) -> FitSums:
    total = FitSums.zeros(model)
    for batch in batches:
        of_batch = FitSums.zeros(model)
        add_batch(of_batch, model, batch, WEIGHTS)
        total += of_batch
    return total


@pytest.fixture
def mixed_up(student: Callable[..., Any]) -> Callable[..., Any]:
    """Builds a student in float64 that is untrained, of a teacher no two of whose weights are alike."""

    def build(text_model_type: str, group_size: int = 1) -> Any:
        options = {"num_key_value_layers": 2, "key_value_group_size": group_size}
        model = student(text_model_type, moved=False, **options).double()
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
        swiftkv_backbone(model).start_from_teacher()
        return model

    return build


@pytest.mark.parametrize("text_model_type", BACKBONES)
@pytest.mark.parametrize("group_size", [1, 2])
def test_equals_numpys_least_squares(
    mixed_up: Callable[..., Any], encoded: list[Encoded], float64_norms: None, text_model_type: str, group_size: int
) -> None:
    """However the samples are split over micro-batches; with images and text, biases, key norms and windows."""
    model = mixed_up(text_model_type, group_size)
    batch = in_float64(batch_of(encoded))
    x, by_layer = observed(model, batch)
    layers = list(by_layer)
    whole = sums_of(model, [batch])
    split = sums_of(model, [in_float64(batch_of([sample])) for sample in encoded])
    for unit, at in enumerate(range(0, len(layers), group_size)):
        received = sum(by_layer[layer]["received"] for layer in layers[at : at + group_size])
        members = groups_of(model)[unit]
        for member, (number, layer) in enumerate(zip(layers[at : at + group_size], members, strict=True)):
            for part, name in enumerate(PARTS):
                own = joined(getattr(layer.self_attn, name))
                inputs = x if own.shape[1] == x.shape[1] else np.pad(x, ((0, 0), (0, 1)), constant_values=1.0)
                wanted = least_squares(inputs, by_layer[number][name], received, own.numpy(), RIDGE)
                for sums in (whole, split):
                    got = solve(sums, unit, members, RIDGE)[part][member]
                    assert np.abs(got.numpy() - wanted).max() < 1e-6 * np.abs(wanted).max()
                if number > 2:  # what enters layer N is the trunk: there copies are exact
                    assert np.abs((got - own).numpy()).max() > 1e-2 * np.abs(wanted).max()
                    assert error(whole, unit, member, part, got) < error(whole, unit, member, part, own)


def test_what_is_chosen_is_never_farther_away_on_other_tokens(
    student: Callable[..., Any], encoded: list[Encoded]
) -> None:
    model = student("llama", moved=False)
    sums, held_out = sums_of(model, [batch_of(encoded[:1])]), sums_of(model, [batch_of(encoded[1:])])
    chosen = choose(model, sums, held_out)
    weights = fit(model, sums, chosen)
    for unit, layer in enumerate(swiftkv_backbone(model).layers[2:]):
        for part, name in enumerate(PARTS):
            projection = getattr(layer.self_attn, f"{name}_swiftkv")
            before = joined(projection)
            set_weights(model, weights)
            after = joined(projection)
            assert error(held_out, unit, 0, part, after) <= error(held_out, unit, 0, part, before) + 1e-6
            assert (chosen[name][unit] is None) == torch.equal(before, after)
            swiftkv_backbone(model).start_from_teacher()


# ---------------------------------------------------------------------------------------------------- layers that share
def test_shared_values_lose_the_least_of_what_layers_add(mixed_up: Callable[..., Any], encoded: list[Encoded]) -> None:
    """By numpy's least squares over all that the layers' output projections make of them."""
    model = mixed_up("llama", 2)
    layers = groups_of(model)[1]
    own = [torch.randn(joined(layer.self_attn.v_proj).shape).double() for layer in layers]
    got = shared_values([layer.self_attn for layer in layers], own).numpy()
    size = layers[0].self_attn.head_dim
    group = layers[0].self_attn.num_key_value_groups
    for head in range(len(own[0]) // size):
        rows, wanted = [], []
        for layer, weight in zip(layers, own, strict=True):
            output = layer.self_attn.o_proj.weight.detach().numpy()
            for query_head in range(head * group, (head + 1) * group):
                columns = output[:, query_head * size : (query_head + 1) * size]
                rows.append(columns)
                wanted.append(columns @ weight[head * size : (head + 1) * size].numpy())
        solution = np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted), rcond=None)[0]
        assert np.abs(got[head * size : (head + 1) * size] - solution).max() < 1e-6 * np.abs(solution).max()


@pytest.mark.parametrize("text_model_type", ["llama", "qwen2"])
def test_shared_keys_lose_the_least_of_all_layers_keys(
    mixed_up: Callable[..., Any], encoded: list[Encoded], text_model_type: str
) -> None:
    """As much as a singular value decomposition of the keys of all tokens says; queries make up for what they became:
    a score of what is kept of the keys is the same."""
    model = mixed_up(text_model_type, 2)
    batch = in_float64(batch_of(encoded))
    x, by_layer = observed(model, batch)
    sums, unit = sums_of(model, [batch]), 1
    layers = groups_of(model)[unit]
    attentions = [layer.self_attn for layer in layers]
    received = sum(by_layer[layer.layer_idx]["received"] for layer in layers)
    own = solve(sums, unit, layers, RIDGE)[0]
    keys, queries = shared_keys(attentions, own, sums.gram[unit], sums.queries[unit])
    inputs = x if own[0].shape[1] == x.shape[1] else np.pad(x, ((0, 0), (0, 1)), constant_values=1.0)
    heads = sums.queries.shape[2]
    of_layers = np.stack([as_complex(weight, heads).numpy() @ inputs.T for weight in own])  # [M, K, E / 2, T]
    shared = as_complex(keys, heads).numpy() @ inputs.T
    power = np.sqrt(sums.queries[unit].numpy())
    asked = [as_complex(joined(attention.q_proj), heads * attention.num_key_value_groups) for attention in attentions]
    for head in range(heads):
        for frequency in range(shared.shape[1]):
            weighted = np.sqrt(received) * power[:, head, frequency, None] * of_layers[:, head, frequency]
            left, singular, _ = np.linalg.svd(weighted, full_matrices=False)
            at = head * attentions[0].num_key_value_groups
            turned = [
                as_complex(weight, heads * attentions[0].num_key_value_groups)[at, frequency].numpy()
                / before[at, frequency].numpy()
                for weight, before in zip(queries, asked, strict=True)
            ]  # conj(c) of each layer, in all columns alike
            c = np.array([column[0].conj() for column in turned])
            assert all(np.allclose(column, column[0]) for column in turned)
            kept = np.sqrt(received) * power[:, head, frequency, None] * (c[:, None] * shared[head, frequency])
            lost = np.linalg.norm(weighted - kept)
            assert abs(lost - np.linalg.norm(singular[1:])) < 1e-6 * np.linalg.norm(singular)


def test_keys_that_are_normed_are_the_mean_of_the_layers(mixed_up: Callable[..., Any], encoded: list[Encoded]) -> None:
    model = mixed_up("qwen3", 2)
    sums = sums_of(model, [in_float64(batch_of(encoded))])
    attentions = [layer.self_attn for layer in groups_of(model)[0]]
    own = solve(sums, 0, groups_of(model)[0], RIDGE)[0]
    keys, queries = shared_keys(attentions, own, sums.gram[0], sums.queries[0])
    assert torch.equal(keys, (own[0] + own[1]) / 2)
    assert all(torch.equal(mine, joined(a.q_proj)) for mine, a in zip(queries, attentions, strict=True))


def test_the_whole_fit_of_shared_layers_is_nearer_than_copies(
    mixed_up: Callable[..., Any], encoded: list[Encoded]
) -> None:
    """Of a student that shares keys and values, by the KL from its teacher."""
    model = mixed_up("llama", 2)
    batch = in_float64(batch_of(encoded))
    sums = sums_of(model, [batch])
    keep = supervised_positions(batch.labels)
    head = model.get_output_embeddings()

    def kl() -> float:
        with torch.no_grad():
            states = shared_pass(model, batch)
            return float(kl_divergence(head(states.student), head(states.teacher), 1.0)[0].mean())

    copied = kl()
    set_weights(model, fit(model, sums, choose(model, sums, sums)))
    assert keep.any() and kl() < 0.9 * copied


def in_float64(batch: Batch) -> Batch:
    return replace(batch, pixels={name: x.double() for name, x in batch.pixels.items()})


# ------------------------------------------------------------------------------------------------------ what it takes
def test_sums_add_little_to_a_forward_of_the_teacher(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    """To the last operation; with what is not the sums themselves, in float64, it is less than 1.15 forwards."""
    model = student("llama", moved=False)
    batch = batch_of(encoded)
    keep = supervised_positions(batch.labels)
    with flop_counter() as forward:
        frozen_states(model, batch, [2])
    sums = FitSums.zeros(model)
    with flop_counter() as whole:
        add_batch(sums, model, batch)
    layers, text = len(groups_of(model)), model.config.text_config
    heads, size = text.num_attention_heads, text.head_dim
    lengths, asked = batch.attention_mask.sum(1).tolist(), keep.sum(1).tolist()
    tokens, queries = sum(lengths), sum(asked)
    products = 2 * tokens * text.hidden_size * (text.hidden_size + 2 * text.num_key_value_heads * size)
    pairs = sum(length * n for length, n in zip(lengths, asked, strict=True))
    scores = 2 * pairs * heads * size + 2 * pairs  # of queries with keys, and their sum by weights
    power = 2 * heads * size * queries
    extra = whole.get_total_flops() - forward.get_total_flops()
    assert extra == layers * (products + scores + power)
    assert extra - layers * products < 0.15 * forward.get_total_flops()


@pytest.mark.parametrize("group_size", [1, 2])
def test_one_factor_of_the_tokens_matrix_for_each_ridge(
    student: Callable[..., Any], encoded: list[Encoded], group_size: int
) -> None:
    """Whatever the number of layers and parts that are solved with it."""
    model = student("llama", moved=False, key_value_group_size=group_size)
    sums = sums_of(model, [batch_of(encoded)])
    with Counted() as counted:
        chosen = choose(model, sums, sums)
    assert counted.calls["linalg_cholesky_ex"] == len(groups_of(model)) * len(RIDGES)
    with Counted() as counted:
        fit(model, sums, chosen)
    assert counted.calls["linalg_cholesky_ex"] <= len(groups_of(model)) * len(PARTS)


class Counted(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
