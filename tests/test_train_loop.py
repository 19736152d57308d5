"""One worker's life, in this process: what moves, what is written, what stops it, and going on as if never stopped."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from clusters import free_ports
from conftest import batch_of, norms_in_their_own_dtype
from runs import MICRO_BATCHES, batches, final_weights, lines, run_of
from transformers import AutoModelForImageTextToText
from waiting import wait_until

from vlskv_ray.config import changed
from vlskv_ray.data.chat import Limits
from vlskv_ray.data.collate import Batch, Encoded
from vlskv_ray.data.questions import HeldOut
from vlskv_ray.data.shapes import ShapesSource
from vlskv_ray.errors import StoppedRun
from vlskv_ray.model.build import build_plain, build_student, find_model, trainable_parameters
from vlskv_ray.storage.checkpoint import newest_checkpoint
from vlskv_ray.train_loop import train_worker
from vlskv_ray.training.distill import DistillationLoss
from vlskv_ray.training.objective import Loss
from vlskv_ray.training.outcome import Outcome
from vlskv_ray.training.run import Run, Worker
from vlskv_ray.training.sft import CrossEntropyLoss
from vlskv_ray.training.step import GradientBuffer, build_optimizer, learning_rate_schedule, train_step


@pytest.fixture
def run(teacher_folder: Callable[..., Path], tmp_path: Path) -> Run:
    """6 steps of 4 micro-batches of 2 samples, a checkpoint every 2 steps."""
    return run_of(teacher_folder(), tmp_path / "run")


def test_only_the_students_own_weights_move(
    run: Run, encoded: list[Encoded], teacher_folder: Callable[..., Path]
) -> None:
    """Frozen tensors are bit-identical after training, on file; each SwiftKV weight has moved."""
    outcome = train_worker(run, Worker(), batches(encoded))
    counts = dict(outcome.counts)
    assert counts.pop("seconds") > 0 and counts.pop("lengths") and counts.pop("images") == {"0": 24, "1": 18, "2": 6}
    assert counts.pop("supervised") == {"vision": 222, "text": 180} and counts.pop("empty_steps") == 0
    assert counts == {"seen": 48, "rejected": {}, "notices": {}, "example": {}}
    assert (outcome.status, outcome.step) == ("done", 6)
    before = build_student(find_model(str(teacher_folder())), 2).state_dict()
    model = AutoModelForImageTextToText.from_pretrained(run.folder / "final")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) == ("_swiftkv" not in name), name
    stock = AutoModelForImageTextToText.from_pretrained(teacher_folder())
    model.model.language_model.config.swiftkv = False
    inputs = batch_of(encoded).model_inputs(model.config)
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, stock.eval()(**inputs).logits)


def test_a_run_writes_what_it_promises(run: Run, encoded: list[Encoded]) -> None:
    train_worker(run, Worker(), batches(encoded))
    metrics = lines(run.folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 7))
    assert set(metrics[0]) >= {
        "step", "epoch", "loss", "kl_vision", "kl_text", "teacher_ce", "student_ce", "top1_agreement", "learning_rate",
        "grad_norm", "samples", "supervised_tokens", "tokens_per_second", "data_wait_seconds", "step_seconds",
    }  # fmt: skip
    assert metrics[-1]["loss"] < metrics[0]["loss"] and metrics[2]["epoch"] == 1
    assert [len(line["micro_batches"]) for line in lines(run.folder / "order.jsonl")] == [4] * 6
    assert [p.name for p in sorted(run.checkpoints.iterdir())] == ["step-00000004", "step-00000006"]
    assert list((run.folder / "tensorboard").iterdir())
    assert {p.name for p in (run.folder / "final").iterdir()} >= {
        "config.json", "model.safetensors", "generation_config.json", "processor_config.json", "tokenizer.json",
        "chat_template.jinja",
    }  # fmt: skip


def test_the_same_seed_gives_the_same_bits(run: Run, encoded: list[Encoded]) -> None:
    train_worker(run, Worker(), batches(encoded))
    again = replace(run, folder=run.folder.with_name("again"))
    again.checkpoints.mkdir(parents=True)
    train_worker(again, Worker(), batches(encoded))
    first, second = final_weights(run), final_weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def wait_for_checkpoint(run: Run, step: int) -> None:
    if step:
        wait_until((run.checkpoints / f"step-{step:08d}" / "COMMIT").exists)


@pytest.mark.parametrize("killed_in_step", [0, 1, 2, 3, 5])
def test_going_on_equals_not_stopping(
    teacher_folder: Callable[..., Path], encoded: list[Encoded], tmp_path: Path, killed_in_step: int
) -> None:
    """Killed in any step and started again: weights, moments and logs are those of the run that was left alone."""

    class Killed(BaseException):
        pass

    def killing(start: int) -> Iterator[Batch]:
        for batch in batches(encoded)(start):
            if batch.step == killed_in_step and batch.micro_batch == 2:
                wait_for_checkpoint(halves, killed_in_step // 2 * 2)  # written beside the training, by a thread
                raise Killed
            yield batch

    whole, halves = run_of(teacher_folder(), tmp_path / "whole"), run_of(teacher_folder(), tmp_path / "halves")
    train_worker(whole, Worker(), batches(encoded))
    with pytest.raises(Killed):
        train_worker(halves, Worker(), killing)
    started: list[int] = []
    train_worker(halves, Worker(), lambda step: started.append(step) or batches(encoded)(step))
    assert started == [killed_in_step // 2 * 2]
    first, second = final_weights(whole), final_weights(halves)
    assert all(torch.equal(first[name], second[name]) for name in first)
    a, b = (newest_checkpoint(run.checkpoints, warn=pytest.fail) for run in (whole, halves))
    assert a and b
    moments, others = a.tensors("optimizer"), b.tensors("optimizer")
    assert moments.keys() == others.keys() and all(torch.equal(moments[name], others[name]) for name in moments)
    timed = ("tokens_per_second", "data_wait_seconds", "step_seconds")
    plain = [
        [{k: v for k, v in m.items() if k not in timed} for m in lines(r.folder / "metrics.jsonl")]
        for r in (whole, halves)
    ]
    assert plain[0] == plain[1] and lines(whole.folder / "order.jsonl") == lines(halves.folder / "order.jsonl")


def test_asked_to_stop_it_saves_first(run: Run, encoded: list[Encoded]) -> None:
    def asking(start: int) -> Iterator[Batch]:
        for batch in batches(encoded)(start):
            if batch.step == 2:
                run.stop_file.touch()
            yield batch

    assert train_worker(run, Worker(), asking).status == "stopped"
    saved = newest_checkpoint(run.checkpoints, warn=pytest.fail)
    assert saved is not None and saved.step == 3
    run.stop_file.unlink()
    assert train_worker(run, Worker(), batches(encoded)).status == "done"


def test_asked_to_stop_while_answers_are_measured(run: Run, encoded: list[Encoded]) -> None:
    """Training is done and saved; the next start measures."""
    run = replace(run, held_out=HeldOut((ShapesSource("test", 3),), 3, Limits(), batch_size=1, max_new_tokens=2))

    def asking(start: int) -> Iterator[Batch]:
        for batch in batches(encoded)(start):
            if batch.step == 5:
                run.stop_file.touch()
            yield batch

    assert train_worker(run, Worker(), asking) == Outcome("stopped", 6)
    assert not (run.folder / "evaluation.json").exists()
    run.stop_file.unlink()
    assert train_worker(run, Worker(), batches(encoded)).status == "done"
    assert json.loads((run.folder / "evaluation.json").read_text())["samples"] == 3


def test_a_loss_that_is_not_finite_stops_before_the_update(run: Run, encoded: list[Encoded]) -> None:
    """It names the samples of the step; nothing of the step is saved."""

    def poisoned(start: int) -> Iterator[Batch]:
        for batch in batches(encoded)(start):
            if batch.step == 3 and batch.pixels:
                batch.pixels["normalise"][:, 1, 0] = torch.nan
            yield batch

    outcome = train_worker(run, Worker(), poisoned)
    assert outcome.status == "failed" and outcome.step == 3
    ids = sorted(i for batch in list_of(batches(encoded)(3), MICRO_BATCHES) for i in batch.sample_ids)
    assert f"step 4: the loss is nan; nothing was updated. Samples of this step: {', '.join(ids)}" in outcome.message
    saved = newest_checkpoint(run.checkpoints, warn=pytest.fail)
    assert saved is not None and saved.step == 2


def list_of(iterator: Iterator[Batch], count: int) -> list[Batch]:
    return [next(iterator) for _ in range(count)]


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(
    student: Callable[..., Any], encoded: list[Encoded]
) -> None:
    model = student()
    trained = trainable_parameters(model)
    gradients = GradientBuffer(trained.values())
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    before = {name: p.detach().clone() for name, p in trained.items()}
    next(iter(trained.values())).register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(StoppedRun, match=r"gradient norm is .*Samples of this step: a, b"):
        train_step(model, optimizer, gradients, [batch_of(encoded[:2])], DistillationLoss())
    assert all(torch.equal(p, before[name]) for name, p in trained.items())


def test_too_many_rows_left_out_stop_the_run(run: Run, encoded: list[Encoded]) -> None:
    """With a hundredth of a percent allowed, no row may be left out: the message says which and why."""
    strict = replace(
        run,
        config=changed(run.config, {"data.max_rejected_fraction": 0.0001}),
    )

    def with_rejects(start: int) -> Iterator[Batch]:
        for batch in batches(encoded)(start):
            rejected = [{"id": "x:7", "reason": "too_long", "detail": "900 tokens"}] if batch.step == 1 else []
            yield replace(batch, rejected=rejected)

    outcome = train_worker(strict, Worker(), with_rejects)
    assert outcome.status == "failed"
    assert "4 of the 20 samples so far had to be left out (4 x too_long)" in outcome.message
    assert "For one, x:7: 900 tokens" in outcome.message
    assert [line["id"] for line in lines(run.folder / "rejected.jsonl")] == ["x:7"] * 4

    def allowing(fraction: float) -> Outcome:
        folder = run.folder.with_name(f"allowing-{fraction}")
        (folder / "checkpoints").mkdir(parents=True)
        allowing = replace(run, folder=folder, config=changed(run.config, {"data.max_rejected_fraction": fraction}))
        return train_worker(allowing, Worker(), with_rejects)

    assert allowing(0.15).counts["rejected"] == {"too_long": 4}
    # four of the first hundred may be, but not of the 28 that an epoch has
    assert "4 of the 28 samples so far" in allowing(0.04).message


def test_a_step_with_nothing_left_changes_nothing(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    model = student()
    trained = trainable_parameters(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in trained.items()}
    result = train_step(model, optimizer, GradientBuffer(trained.values()), [batch_of([])], DistillationLoss())
    assert result.grad_norm == 0 and all(torch.equal(p, before[name]) for name, p in trained.items())


def test_clipping_bounds_the_gradient(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    model = student()
    trained = trainable_parameters(model)
    gradients = GradientBuffer(trained.values())
    optimizer = torch.optim.SGD(trained.values(), lr=0.0)
    whole = train_step(model, optimizer, gradients, [batch_of(encoded)], DistillationLoss())
    direction = gradients.flat / gradients.flat.norm()
    clipped = train_step(model, optimizer, gradients, [batch_of(encoded)], DistillationLoss(), max_grad_norm=0.01)
    assert clipped.grad_norm == whole.grad_norm > 0.01
    assert gradients.flat.norm().item() == pytest.approx(0.01, rel=1e-5)
    assert torch.allclose(gradients.flat / gradients.flat.norm(), direction, atol=1e-6)


def test_a_batch_can_be_overfitted(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    model = student()
    trained = trainable_parameters(model)
    gradients, optimizer = GradientBuffer(trained.values()), torch.optim.AdamW(trained.values(), lr=3e-3, fused=True)
    losses = [
        train_step(model, optimizer, gradients, [batch_of(encoded[:3])], DistillationLoss()).sums.loss
        for _ in range(120)
    ]
    assert losses[-1] < 0.1 * losses[0]


def test_the_schedule_warms_up_and_falls(run: Run) -> None:
    schedule = learning_rate_schedule(changed(run.config, {"scheduler.warmup_steps": 4}), 20)
    rates = [schedule(step) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.02


def test_weight_decay_spares_norms_and_biases(run: Run, student: Callable[..., Any]) -> None:
    optimizer = build_optimizer(run.config, student("qwen2"))
    decays = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}


# --------------------------------------------------------------------------------------------------------- two workers
def distributed_steps(rank: int, port: int, model_folder: str, encoded: list[Encoded], out: str) -> None:
    """One step of two gloo processes, four samples each, in micro-batches of two; of each of `STEPS`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mine = encoded[4 * rank : 4 * rank + 4]
    torch.save([one_step(model_folder, mine, 2, dtype, trained) for dtype, trained, _ in STEPS], f"{out}/{rank}.pt")
    dist.destroy_process_group()


STEPS = [
    (torch.float32, (), 1e-6),
    (torch.float64, (), 1e-12),
    (torch.float64, ("vision_tower", "projector"), 1e-12),
]
"""Types, the parts of a plain model that train, none of which learns from a text, or a student's weights where there
are none, and how near the step of one worker comes to that of two."""


def one_step(
    model_folder: str, encoded: list[Encoded], size: int, dtype: torch.dtype, trained_parts: Sequence[str]
) -> tuple[float, float, torch.Tensor]:
    """Mean loss, gradient norm and gradient of one global batch."""
    files = find_model(model_folder)
    objective: Loss = DistillationLoss(vision_loss_weight=0.7, text_loss_weight=1.3)
    model = build_student(files, 2, dtype=dtype)
    if trained_parts:
        model, objective = build_plain(files, trained=trained_parts).to(dtype), CrossEntropyLoss()
    trained = trainable_parameters(model)
    gradients = GradientBuffer(trained.values())
    parts = [batch_of(encoded[i : i + size]) for i in range(0, len(encoded), size)]
    parts = [replace(p, pixels={name: x.to(dtype) for name, x in p.pixels.items()}) for p in parts]
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            norms_in_their_own_dtype(patch)
        result = train_step(model, torch.optim.SGD(trained.values(), lr=0.0), gradients, parts, objective)
    return result.sums.loss / result.sums.supervised_tokens, result.grad_norm, gradients.flat


def test_two_workers_make_the_step_of_one(
    teacher_folder: Callable[..., Path], encoded: list[Encoded], tmp_path: Path
) -> None:
    """Over gloo, loss and gradient are those of one process with all samples; both workers hold the same bits."""
    torch.multiprocessing.start_processes(
        distributed_steps,
        args=(free_ports(1)[0], str(teacher_folder()), encoded, str(tmp_path)),
        nprocs=2,
        start_method="spawn",
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for i, (dtype, trained_parts, tolerance) in enumerate(STEPS):
        loss, norm, gradient = first[i]
        assert (loss, norm) == second[i][:2] and torch.equal(gradient, second[i][2])
        for size in (8, 1):
            wanted_loss, _, wanted = one_step(str(teacher_folder()), encoded, size, dtype, trained_parts)
            assert loss == pytest.approx(wanted_loss, rel=tolerance)
            assert ((gradient - wanted).norm() / wanted.norm()).item() < tolerance
