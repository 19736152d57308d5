"""The objective against a separate float64 reference, and what must not change it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from conftest import batch_of
from torch import Tensor

from vlskv_ray.data.collate import IGNORE_INDEX, Batch, Encoded, parts
from vlskv_ray.model.build import trainable_parameters
from vlskv_ray.model.swiftkv import BACKBONES, swiftkv_backbone
from vlskv_ray.training.distill import (
    BLOCK,
    DistillationLoss,
    DivergenceAtHead,
    LossSums,
    distillation_loss,
    frozen_states,
    highest_of,
    kl_divergence,
    rows_per_chunk,
    shared_pass,
    soften,
)
from vlskv_ray.training.objective import Loss
from vlskv_ray.training.profiling import peak_bytes
from vlskv_ray.training.step import autocast, recompute

OBJECTIVE = DistillationLoss(temperature=2.0, vision_loss_weight=0.7, text_loss_weight=1.3, hidden_loss_weight=0.4)


def loss_and_gradient(model: Any, batches: list[Batch], objective: Loss = OBJECTIVE) -> tuple[float, Tensor]:
    """Loss and gradient of a global batch: sums over micro-batches, divided once."""
    model.zero_grad(set_to_none=True)
    sums = LossSums()
    for batch in batches:
        loss, of_batch = objective(model, batch)
        if loss is not None:
            loss.backward()
        sums += of_batch
    count = sums.supervised_tokens
    return sums.loss / count, torch.cat([p.grad.flatten() for p in trainable_parameters(model).values()]) / count


def with_states(model: Any, batch: Batch) -> Batch:
    with torch.no_grad(), autocast(model):
        states = shared_pass(model, batch)
    return replace(batch, trunk=states.trunk, teacher=states.teacher, teacher_input=states.teacher_input)


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def as_float64(batch: Batch) -> Batch:
    return replace(batch, pixels={name: x.double() for name, x in batch.pixels.items()})


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("group", [1, 2])
def test_equals_the_reference_in_float64(
    student: Callable[..., Any], encoded: list[Encoded], float64_norms: None, backbone: str, group: int
) -> None:
    """The shared, gathered, chunked pass is two whole passes with all logits: loss, gradient and every metric."""
    model = student(backbone, dtype=torch.float64, key_value_group_size=group)
    batch = as_float64(batch_of(encoded))
    total, count, sums = reference.distillation(
        model, batch, temperature=2.0, vision_loss_weight=0.7, text_loss_weight=1.3, hidden_loss_weight=0.4
    )
    total.backward()
    wanted = torch.cat([p.grad.flatten() for p in trainable_parameters(model).values()]) / count
    loss, gradient = loss_and_gradient(model, [batch])
    assert loss == pytest.approx(total.item() / count, rel=1e-12)
    assert error(gradient, wanted) < 1e-12
    _, ours = distillation_loss(model, batch, OBJECTIVE)
    assert ours.supervised_tokens == count
    for name, value in sums.items():
        assert getattr(ours, name) == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_any_split_of_a_global_batch_gives_the_same(
    student: Callable[..., Any],
    encoded: list[Encoded],
    float64_norms: None,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """1 x 8, 2 x 4, 4 x 2 and 8 x 1 samples: the same loss and gradient."""
    model = student(dtype=dtype)

    def split(size: int) -> list[Batch]:
        batches = [batch_of(encoded[i : i + size]) for i in range(0, 8, size)]
        return [as_float64(b) for b in batches] if dtype == torch.float64 else batches

    loss, gradient = loss_and_gradient(model, split(8))
    for size in (4, 2, 1):
        other_loss, other_gradient = loss_and_gradient(model, split(size))
        assert other_loss == pytest.approx(loss, rel=tolerance)
        assert error(other_gradient, gradient) < tolerance


@pytest.mark.parametrize("max_tokens", [1, 60, 200, 10**6])
@pytest.mark.parametrize("known", [False, True])
def test_parts_of_a_micro_batch_add_up_to_it(
    student: Callable[..., Any], encoded: list[Encoded], float64_norms: None, max_tokens: int, known: bool
) -> None:
    """With known frozen states and without; rows that were left out are counted once."""
    model = student(dtype=torch.float64)
    batch = as_float64(batch_of(encoded, rejected=[{"id": "x", "reason": "y", "detail": "z"}]))
    if known:
        batch = with_states(model, batch)
    of_parts = list(parts(batch, max_tokens))
    assert [uid for part in of_parts for uid in part.sample_ids] == batch.sample_ids
    assert all(len(part.sample_ids) == 1 or part.attention_mask.sum() <= max_tokens for part in of_parts)
    assert sum(len(part.rejected) for part in of_parts) == 1
    loss, gradient = loss_and_gradient(model, [batch])
    in_parts, gradient_in_parts = loss_and_gradient(model, of_parts)
    assert in_parts == pytest.approx(loss, rel=1e-12)
    assert error(gradient_in_parts, gradient) < 1e-12


def test_padding_changes_nothing(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    """More padding, and other ids in it, leave loss and gradient as they are."""
    model = student()
    batch = batch_of(encoded[:4])
    loss, gradient = loss_and_gradient(model, [batch])
    pad = torch.randint(5, 200, (4, 13))
    padded = Batch(
        **{**vars(batch), "input_ids": torch.cat([batch.input_ids, pad], 1)}
        | {
            "attention_mask": torch.cat([batch.attention_mask, torch.zeros_like(pad)], 1),
            "labels": torch.cat([batch.labels, torch.full_like(pad, IGNORE_INDEX)], 1),
        }
    )
    padded_loss, padded_gradient = loss_and_gradient(model, [padded])
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    assert error(padded_gradient, gradient) < 1e-6


def test_chunks_of_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows of logits exist at once, and are gone over at once: KL, its gradient and the metrics are those
    of all rows together."""
    head = torch.nn.Linear(16, 500, bias=False, dtype=torch.float64).requires_grad_(False)
    teacher, targets = torch.randn(10, 16, dtype=torch.float64), torch.randint(0, 500, (10,))
    results = []
    for rows, few in ((100, 100), (100, 4), (3, 2), (1, 1)):
        monkeypatch.setattr("vlskv_ray.training.distill.ELEMENTS_IN_CACHE", 500 * few)
        student = torch.ones(10, 16, dtype=torch.float64, requires_grad=True)
        columns = DivergenceAtHead.apply(student, teacher, head, targets, 2.0, rows)
        (columns[0] * torch.arange(10)).sum().backward()
        results.append([*(column.detach().double() for column in columns), student.grad])
    for chunked in results[1:]:
        for got, wanted in zip(chunked, results[0], strict=True):
            assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-14)


def test_the_budget_sets_the_chunk() -> None:
    """256 MiB hold 1,046 rows of teacher's and student's float32 logits over 32,064 tokens; one row always fits."""
    assert rows_per_chunk(32064, 256) == 1046 == 256 * 2**20 // (2 * 4 * 32064)
    assert rows_per_chunk(2**40, 1) == 1


def test_weight_of_a_sample_is_its_own(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    """A text sample among image samples has the text weight: with that at 0 it adds nothing."""
    model = student()
    objective = DistillationLoss(text_loss_weight=0.0)
    mixed, text = batch_of([encoded[0], encoded[1]]), batch_of([encoded[1]])
    alone = batch_of([encoded[0]])
    sums = {
        name: distillation_loss(model, batch, objective)[1]
        for name, batch in (("mixed", mixed), ("text", text), ("image", alone))
    }
    assert sums["text"].loss == 0 and sums["text"].kl_text > 0
    assert sums["mixed"].loss == pytest.approx(sums["image"].loss, rel=1e-6)


def test_nothing_supervised_adds_exactly_nothing(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    """A sample without labels, alone or beside another, changes neither loss nor gradient by a bit."""
    model = student()
    silent = Encoded("silent", encoded[3].input_ids, encoded[3].labels * 0 + IGNORE_INDEX)
    loss, sums = distillation_loss(model, batch_of([silent]), OBJECTIVE)
    assert loss is None and sums.loss == 0 and sums.supervised_tokens == 0 and sums.samples == 1
    alone = loss_and_gradient(model, [batch_of([encoded[3]])])
    beside = loss_and_gradient(model, [batch_of([encoded[3], silent])])
    assert beside[0] == pytest.approx(alone[0], rel=1e-6) and error(beside[1], alone[1]) < 1e-6
    with_empty = loss_and_gradient(model, [batch_of([encoded[3]]), batch_of([silent]), batch_of([])])
    assert with_empty[0] == alone[0] and torch.equal(with_empty[1], alone[1])


def test_only_needed_work_is_done(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    """Counted: tower and trunk once, student MLPs, the teacher's last MLP and the head at supervised positions only,
    and no padding anywhere."""
    model = student()
    batch = batch_of(encoded)
    backbone, rows = swiftkv_backbone(model), {}

    def count(name: str) -> Callable[..., None]:
        return lambda module, args, output: rows.setdefault(name, []).append(args[0].shape[:-1].numel())

    hooks = [
        model.model.vision_tower.register_forward_hook(
            lambda module, args, output: rows.setdefault("tower", []).append(1)
        )
    ]
    hooks += [layer.mlp.register_forward_hook(count(f"mlp{i}")) for i, layer in enumerate(backbone.layers)]
    _, sums = distillation_loss(model, batch, OBJECTIVE)
    for hook in hooks:
        hook.remove()
    every, kept = int(batch.attention_mask.sum()), int(sums.supervised_tokens)
    assert every < batch.input_ids.numel() * 0.6
    assert rows["tower"] == [1]
    assert rows["mlp0"] == rows["mlp1"] == [every]
    assert [sorted(rows[f"mlp{i}"]) for i in (2, 3, 4)] == [[kept, every]] * 3
    assert rows["mlp5"] == [kept, kept]
    assert kept < every / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("known", [False, True])
def test_gradient_checkpointing_changes_nothing(
    student: Callable[..., Any], encoded: list[Encoded], dtype: torch.dtype, known: bool
) -> None:
    """Not a bit of loss and gradient, with frozen states known or not and attention dropout in the checkpoint; the
    layers that train run twice, the others once, and the model is left as it was."""
    model = student(key_value_group_size=2, dtype=dtype)
    backbone = swiftkv_backbone(model)
    for layer in backbone.layers:
        layer.self_attn.attention_dropout = 0.5
    batches = [batch_of(encoded[:3]), batch_of(encoded[3:])]
    if known:
        batches = [with_states(model, batch) for batch in batches]
    runs: Counter[int] = Counter()
    for i, layer in enumerate(backbone.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, i=i: runs.update([i]))

    def with_objective(objective: Any) -> tuple[float, Tensor, Counter[int]]:
        runs.clear()
        with autocast(model):
            return *loss_and_gradient(model, batches, objective), runs.copy()

    loss, gradient, once = with_objective(OBJECTIVE)
    again, same, twice = with_objective(recompute(OBJECTIVE))
    assert again == loss and torch.equal(same, gradient)
    trained = range(2, 6)
    assert {i: twice[i] - once[i] for i in range(6)} == {i: len(batches) * (i in trained) for i in range(6)}
    assert not any(m.training or getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_gradient_checkpointing_takes_less_memory(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    """Of a sample that is nearly all answer; where little is supervised there is little to save."""
    sample = replace(encoded[3], labels=encoded[3].input_ids)
    model, batch = student(), batch_of([sample] * 8)
    objective = DistillationLoss(logits_memory_mib=1)
    kept = peak_bytes(lambda: loss_and_gradient(model, [batch], objective))
    assert peak_bytes(lambda: loss_and_gradient(model, [batch], recompute(objective))) < 0.8 * kept


def test_kl_is_zero_when_student_equals_teacher() -> None:
    logits = torch.randn(7, 50) * 20
    kl, gradient = kl_divergence(logits, logits.clone(), 2.0)
    assert (kl == 0).all() and (gradient == 0).all()


def test_a_student_with_its_teachers_trunk_only_starts_at_zero(
    student: Callable[..., Any], encoded: list[Encoded]
) -> None:
    """With one SwiftKV layer the student starts as the teacher: its keys and values see what the teacher's see."""
    model = student(num_key_value_layers=5, moved=False)
    loss, gradient = loss_and_gradient(model, [batch_of(encoded)])
    assert loss < 1e-9
    assert gradient.abs().max() < 1e-4


def test_a_small_kl_is_accurate_in_float32() -> None:
    """Logits a hundredth apart: the textbook sum in float32 is off by far more than ours."""
    teacher = torch.randn(200, 32064, dtype=torch.float64) * 4
    student = teacher + 0.01 * torch.randn(200, 32064, dtype=torch.float64)
    student, teacher = student.float(), teacher.float()
    exact, _ = kl_divergence(student.double(), teacher.double(), 2.0)
    got, _ = kl_divergence(student, teacher, 2.0)
    log_p, log_q = (torch.log_softmax(x / 2.0, -1) for x in (teacher, student))
    textbook = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert error(got, exact) < 1e-3
    assert error(textbook, exact) > 10 * error(got, exact)


def test_what_is_not_a_number_stays_so() -> None:
    """A NaN among the logits of either must reach the loss, where it stops the run."""
    logits = torch.randn(3, 20)
    broken = logits.clone()
    broken[1, 4] = torch.nan
    for student, teacher in ((logits, broken), (broken, logits)):
        kl, _ = kl_divergence(student, teacher, 2.0)
        assert kl.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
def test_kl_and_gradient_equal_torchs(temperature: float) -> None:
    student, teacher = torch.randn(9, 40, dtype=torch.float64) * 3, torch.randn(9, 40, dtype=torch.float64) * 3
    student.requires_grad_()
    wanted = torch.nn.functional.kl_div(
        torch.log_softmax(student / temperature, -1),
        torch.log_softmax(teacher / temperature, -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    wanted.sum().backward()
    kl, gradient = kl_divergence(student.detach(), teacher, temperature)
    assert torch.allclose(kl, wanted.detach(), rtol=1e-12) and torch.allclose(gradient, student.grad, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_cross_entropies_are_those_at_temperature_1(temperature: float, dtype: torch.dtype, tolerance: float) -> None:
    """Though they are made from the softmax at another; also of tokens that are next to impossible."""
    logits, targets = torch.randn(30, 400, dtype=torch.float64) * 8, torch.randint(0, 400, (30,))
    targets[:5] = logits[:5].argmin(-1)
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    got = soften(logits.to(dtype), temperature).cross_entropy(targets, temperature)
    assert torch.allclose(got.double(), wanted, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
def test_the_largest_of_a_row_is_torchs(size: int) -> None:
    """Of ties the first, wherever the blocks end; what is not a number is found, and so is a row of nothing else."""
    logits = torch.randint(0, 4, (200, size), generator=torch.Generator().manual_seed(0)).float()
    logits[0, size // 2], logits[1], logits[2, -1] = float("nan"), float("-inf"), 5.0
    highest, likeliest = highest_of(logits)
    wanted = logits.max(-1, keepdim=True)
    assert torch.equal(highest.nan_to_num(9.0), wanted.values.nan_to_num(9.0))
    assert torch.equal(likeliest, wanted.indices[:, 0])


def test_a_bfloat16_head_rounds_logits_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """KL is that of the rounded logits in float64; only the gradient's products are rounded."""
    monkeypatch.setattr("vlskv_ray.training.distill.ELEMENTS_IN_CACHE", 3 * 500)
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 500).bfloat16().requires_grad_(False)
    student, teacher = torch.randn(20, 32).bfloat16().requires_grad_(), torch.randn(20, 32).bfloat16()
    targets = torch.randint(0, 500, (20,))
    kl, *_ = DivergenceAtHead.apply(student, teacher, head, targets, 2.0, 7)
    (by_student,) = torch.autograd.grad(kl.sum(), student)
    with torch.no_grad():
        logits = [torch.nn.functional.linear(states, head.weight, head.bias).double() for states in (student, teacher)]
    exact, by_logits = kl_divergence(*logits, 2.0)
    assert error(kl.double(), exact) < 1e-6
    assert error(by_student.double(), by_logits @ head.weight.double()) < 5e-3


def test_kl_is_finite_at_the_edges() -> None:
    """Logits of +-500, and rows with -inf where the teacher rules a token out, alone or together with the student."""
    extreme = torch.tensor([[500.0, -500.0, 0.0], [-500.0, 500.0, 0.0], [500.0, 500.0, -500.0]])
    for student, teacher in ((extreme, extreme.flip(0)), (extreme.flip(1), extreme)):
        kl, gradient = kl_divergence(student, teacher, 2.0)
        assert kl.isfinite().all() and gradient.isfinite().all() and (kl >= 0).all()
    ruled_out = torch.tensor([[0.0, -torch.inf, 1.0], [2.0, -torch.inf, -torch.inf]])
    for student in (torch.zeros(2, 3), ruled_out * 2):
        kl, gradient = kl_divergence(student, ruled_out, 2.0)
        assert kl.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("text_model_type", ["llama", "qwen3"])
def test_one_pass_serves_students_of_every_n(
    student: Callable[..., Any], encoded: list[Encoded], text_model_type: str
) -> None:
    """What each of them would have kept of the frozen part by a pass of its own, bit for bit."""
    batch = batch_of(encoded)
    together = frozen_states(student(text_model_type, num_key_value_layers=5), batch, [1, 2, 3, 5])
    assert list(together) == [1, 2, 3, 5]
    for layer, states in together.items():
        with torch.no_grad():
            alone = shared_pass(student(text_model_type, num_key_value_layers=layer), batch)
        for name in ("trunk", "teacher", "teacher_input"):
            assert torch.equal(getattr(states, name), getattr(alone, name)), (layer, name)
