"""Supervised fine-tuning of parts of a model: the gradient is that of the whole, and what is frozen costs and does
nothing."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batch_of
from runs import MICRO_BATCHES, batches, lines, run_of
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from vlskv_ray.config import Config
from vlskv_ray.data.collate import Batch, Encoded, supervised_positions
from vlskv_ray.launch.driver import train
from vlskv_ray.model import presets
from vlskv_ray.model.build import build_plain, find_model, load_config, trainable_parameters
from vlskv_ray.model.parts import PLAIN_PARTS, part_of, part_sizes
from vlskv_ray.model.processor import load_processor
from vlskv_ray.model.swiftkv import BACKBONES, swiftkv_backbone
from vlskv_ray.report.figures import training_rows
from vlskv_ray.report.run_files import read_run
from vlskv_ray.train_loop import train_worker
from vlskv_ray.training.objective import objective_of
from vlskv_ray.training.profiling import flop_counter, peak_bytes
from vlskv_ray.training.run import Run, Worker
from vlskv_ray.training.sft import CrossEntropyAtHead, CrossEntropyLoss, cross_entropy_loss
from vlskv_ray.training.step import (
    GradientBuffer,
    autocast,
    build_optimizer,
    learning_rates_of,
    recompute,
    set_learning_rate,
    train_step,
)

FIRST_STAGE = ("vision_tower", "projector")
SOME_PARTS = (FIRST_STAGE, ("text",), ("projector",), ("vision_tower", "text"), PLAIN_PARTS)


def sft_run(teacher: Path, folder: Path, *trainable: str, **options: Any) -> Run:
    of_model = {"name_or_path": str(teacher), "trainable": [*trainable]} | options.pop("model", {})
    return run_of(teacher, folder, objective="sft", model=of_model, **{"optimizer": {"lr": 1e-3}} | options)


def as_float64(batch: Batch) -> Batch:
    return replace(batch, pixels={name: pixels.double() for name, pixels in batch.pixels.items()})


# ------------------------------------------------------------------------------------------------------------ the loss
@pytest.mark.parametrize(("backbone", "tied"), [*((backbone, False) for backbone in BACKBONES), ("llama", True)])
def test_the_gradient_of_parts_is_that_of_the_whole(
    teacher_folder: Callable[..., Path], encoded: list[Encoded], float64_norms: None, backbone: str, tied: bool
) -> None:
    """In float64, by all logits of the stock model; what is frozen has none. A head that is tied gets both shares."""
    files, batch = find_model(str(teacher_folder(backbone, tie_word_embeddings=tied))), as_float64(batch_of(encoded))
    whole = build_plain(files).double()
    logits = whole(**batch.model_inputs(whole.config)).logits[:, :-1]
    wanted = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    wanted.backward()
    reference = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for trained in SOME_PARTS:
        model = build_plain(files, trained=trained).double()
        loss, _ = cross_entropy_loss(model, batch)
        assert loss is not None and loss.item() == pytest.approx(wanted.item(), rel=1e-12)
        loss.backward()
        for name, parameter in model.named_parameters():
            if part_of("llava_next", name) not in trained or reference[name] is None:
                assert parameter.grad is None, name
            else:
                torch.testing.assert_close(parameter.grad, reference[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trained", [FIRST_STAGE, ("text",), ("projector", "text"), ("vision_tower",)])
def test_bfloat16_of_what_is_frozen_comes_near_float32(
    teacher_folder: Callable[..., Path], encoded: list[Encoded], trained: tuple[str, ...]
) -> None:
    """Trained weights and gradients stay float32; products are in bfloat16, as precise as that is."""
    files, batch, found = find_model(str(teacher_folder())), batch_of(encoded), []
    for dtype in (torch.float32, torch.bfloat16):
        model = build_plain(files, trained=trained, dtype=dtype)
        gradients = GradientBuffer(trainable_parameters(model).values())
        assert gradients.flat.dtype == torch.float32
        with autocast(model):
            loss, sums = cross_entropy_loss(model, batch)
        assert loss is not None
        loss.backward()
        found.append((sums.loss, gradients.flat))
    (loss, gradient), (rounded_loss, rounded) = found
    assert rounded_loss != loss and rounded_loss == pytest.approx(loss, rel=0.01)
    assert ((rounded - gradient).norm() / gradient.norm()).item() < 0.1


@pytest.mark.parametrize(
    "trains", [(True, True, True), (True, False, False), (False, True, False), (True, True, False)]
)
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_head_in_chunks_is_the_whole_head(rows: int, trains: tuple[bool, ...]) -> None:
    """Value, counts and every gradient that is asked for, in float64, scaled as what comes after scales them."""
    torch.manual_seed(1)
    hidden, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((50, 16), (5000, 16), (5000,)))
    given = [x.requires_grad_(trains) for x, trains in zip((hidden, weight, bias), trains, strict=True)]
    targets = torch.randint(5000, (50,))
    logits = F.linear(*given)
    wanted = F.cross_entropy(logits, targets, reduction="none")
    asked = [x for x in given if x.requires_grad]
    by_reference = torch.autograd.grad(3 * wanted.sum(), asked)
    total, per_token, is_right = CrossEntropyAtHead.apply(*given, targets, rows)
    assert torch.equal(is_right, logits.argmax(-1) == targets) and not per_token.requires_grad
    torch.testing.assert_close(per_token, wanted.detach(), rtol=1e-12, atol=1e-12)
    for ours, reference in zip(torch.autograd.grad(3 * total, asked), by_reference, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_logits_take_no_more_than_their_budget() -> None:
    """Forward and backward hold little beside one chunk of them, and none of the graph's, however many there are."""
    hidden, weight = torch.randn(2000, 8, requires_grad=True), torch.randn(4096, 8)
    targets = torch.randint(4096, (2000,))

    def step(rows: int) -> None:
        CrossEntropyAtHead.apply(hidden, weight, None, targets, rows)[0].backward()

    few, all_of_them = peak_bytes(lambda: step(100)), peak_bytes(lambda: step(2000))
    assert all_of_them > 2000 * 4096 * 4 and few < 4 * 100 * 4096 * 4


def test_memory_for_logits_changes_no_loss(encoded: list[Encoded]) -> None:
    model = build_plain(find_model("small-llava-next"), 1)
    batch = batch_of([sample for sample in encoded if not sample.images])
    rows = int(supervised_positions(batch.labels).sum())
    assert rows > 2**20 // (4 * 32064)  # so that a MiB holds a part of them
    found = []
    for loss_of in (CrossEntropyLoss(1), CrossEntropyLoss(256)):
        model.zero_grad()
        loss, sums = loss_of(model, batch)
        assert loss is not None
        loss.backward()
        found.append((sums, model.lm_head.weight.grad.clone()))
    (sums, by_weight), (whole, by_weight_whole) = found
    assert sums.loss == pytest.approx(whole.loss, rel=1e-6) and sums.top1 == whole.top1
    torch.testing.assert_close(by_weight, by_weight_whole, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- what it does not
def operations(model: Any, batch: Batch) -> tuple[int, int]:
    """Of a forward, and of the backward after it."""
    with flop_counter() as forward:
        loss, _ = cross_entropy_loss(model, batch)
    assert loss is not None
    with flop_counter() as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_nothing_is_computed_for_what_is_frozen(teacher_folder: Callable[..., Path], encoded: list[Encoded]) -> None:
    """A frozen tower has no graph and no backward; no product of a frozen text model is made for its weights."""
    files, batch = find_model(str(teacher_folder())), batch_of(encoded)
    shown: list[Tensor] = []
    forward, backward = {}, {}
    for trained in (PLAIN_PARTS, FIRST_STAGE, ("projector",), ("projector", "text"), ("text",)):
        model = build_plain(files, trained=trained)
        model.model.multi_modal_projector.register_forward_pre_hook(lambda module, given: shown.append(given[0]))
        forward[trained], backward[trained] = operations(model, batch)
        assert shown[-1].requires_grad == ("vision_tower" in trained)
    of_layers = sum(weight.numel() for weight in model.model.language_model.layers.parameters() if weight.ndim > 1)
    of_projector, of_text = backward["projector",], backward["projector", "text"]
    assert of_text - of_projector == 2 * batch.input_ids.numel() * of_layers
    supervised, head = int(supervised_positions(batch.labels).sum()), model.lm_head.weight.numel()
    assert forward[PLAIN_PARTS] - forward[FIRST_STAGE] == 2 * supervised * head  # the head's gradient is made there
    tower = backward[PLAIN_PARTS] - of_text
    assert backward[FIRST_STAGE] - of_projector == tower > 0 and backward["text",] < of_text


@pytest.mark.parametrize("trained", [FIRST_STAGE, ("text",)])
def test_gradient_checkpointing_of_parts_changes_no_bit(
    teacher_folder: Callable[..., Path], encoded: list[Encoded], trained: tuple[str, ...]
) -> None:
    model, batch, found = build_plain(find_model(str(teacher_folder())), trained=trained), batch_of(encoded), []
    for loss_of in (cross_entropy_loss, recompute(cross_entropy_loss)):
        model.zero_grad()
        loss, _ = loss_of(model, batch)
        assert loss is not None
        loss.backward()
        found.append([p.grad.clone() for p in trainable_parameters(model).values() if p.grad is not None])
    plain, recomputed = found
    assert len(plain) == len(recomputed) > 0 and all(map(torch.equal, plain, recomputed))


def test_a_text_teaches_the_projector_nothing(teacher_folder: Callable[..., Path], encoded: list[Encoded]) -> None:
    """It counts in the loss and among the tokens, and adds nothing to the gradient, in a batch or in one of its own."""
    texts = batch_of([sample for sample in encoded if not sample.images])
    with_images = batch_of([sample for sample in encoded if sample.images])
    model = build_plain(find_model(str(teacher_folder())), trained=FIRST_STAGE)
    loss, sums = cross_entropy_loss(model, texts)
    assert loss is None and sums.ce_text == sums.loss > 0 and sums.tokens_text == sums.supervised_tokens > 0
    trained = trainable_parameters(model)
    gradients, optimizer = GradientBuffer(trained.values()), torch.optim.SGD(trained.values(), lr=0.0)
    results = [
        train_step(model, optimizer, gradients, micro_batches, cross_entropy_loss)
        for micro_batches in ([texts, with_images], [batch_of(encoded)], [texts])
    ]
    (apart, together, alone) = results
    assert apart.grad_norm == pytest.approx(together.grad_norm, rel=1e-4) and apart.grad_norm > 0
    assert apart.sums.loss == pytest.approx(together.sums.loss, rel=1e-6)
    assert alone.grad_norm == 0 and alone.sums.loss == sums.loss


# ----------------------------------------------------------------------------------------------------- learning rates
def test_each_part_has_its_learning_rate(teacher_folder: Callable[..., Path]) -> None:
    """Its own or the one of all, of which the schedule takes the same fraction; weight decay spares vectors as ever."""
    model = build_plain(find_model(str(teacher_folder("qwen2"))))
    options = {"lr": 1e-3, "weight_decay": 0.1, "learning_rates": {"vision_tower": 4e-3, "projector": 2e-3}}
    config = Config.model_validate(
        {"objective": "sft", "model": {"name_or_path": "x"}, "data": {"sources": ["shapes"]}, "optimizer": options}
    )
    optimizer = build_optimizer(config, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    wanted = {"vision_tower": 4e-3, "projector": 2e-3, "text": 1e-3}
    for fraction in (1.0, 0.25, 0.5):
        set_learning_rate(optimizer, fraction)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert group["lr"] == wanted[part_of("llava_next", names[parameter])] * fraction
                assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    of_parts = {"learning_rate_vision_tower": 2e-3, "learning_rate_projector": 1e-3, "learning_rate_text": 5e-4}
    assert learning_rates_of(optimizer) == {"learning_rate": 2e-3, **of_parts}
    plain = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"learning_rates": None})})
    plain = Config.model_validate(plain.model_dump() | {"optimizer": {"lr": 1e-3}})
    assert learning_rates_of(build_optimizer(plain, model)) == {"learning_rate": 1e-3}


# -------------------------------------------------------------------------------------------------------------- a run
@pytest.mark.parametrize(
    ("trained", "dtype"), [(FIRST_STAGE, "bfloat16"), (("text",), "bfloat16"), (("projector",), "float32")]
)
def test_only_what_trains_moves(
    teacher_folder: Callable[..., Path], encoded: list[Encoded], tmp_path: Path, trained: tuple[str, ...], dtype: str
) -> None:
    """In final/, all of one type, frozen weights are the teacher's bit for bit; checkpoints hold the others alone."""
    run = sft_run(teacher_folder(), tmp_path / "run", *trained, model={"dtype": dtype})
    assert train_worker(run, Worker(), batches(encoded)).status == "done"
    before, after = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype))
        for folder in (teacher_folder(), run.folder / "final")
    )
    weights = dict(after.named_parameters())
    moved = {name for name, weight in before.named_parameters() if not torch.equal(weight, weights[name])}
    assert {part_of("llava_next", name) for name in moved} == {*trained}
    saved = load_file(max((run.folder / "checkpoints").iterdir()) / "trainable.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert {*saved} == {name for name in weights if part_of("llava_next", name) in trained}
    on_file = load_file(run.folder / "final" / "model.safetensors").values()
    assert {weight.dtype for weight in on_file} == {getattr(torch, dtype)}
    config = json.loads((run.folder / "final" / "config.json").read_text())
    assert config["dtype"] == dtype and config["text_config"]["model_type"] == "llama"


def test_a_first_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a LLaVA begins with: a tower and a projector that have learnt nothing, before a text model that stays what
    it is, learn to see. What the run says of its weights is true, and final/ is a teacher like any other."""
    files = find_model("shapes-teacher")
    model, drawn = build_plain(files), presets.build_teacher(load_config(files), seed=3).state_dict()
    for name, weight in model.named_parameters():
        if part_of("llava_next", name) in FIRST_STAGE:
            weight.data.copy_(drawn[name])
    text = {
        name: weight.clone() for name, weight in model.state_dict().items() if part_of("llava_next", name) == "text"
    }
    model.save_pretrained(tmp_path / "blind")
    load_processor(files).save_pretrained(tmp_path / "blind")
    run = {
        "objective": "sft",
        "micro_batch_size": 8,
        "model": {"name_or_path": str(tmp_path / "blind"), "trainable": ["vision_tower", "projector"]},
        "data": {"sources": [{"name": "shapes", "split": "lessons", "num_samples": 240}]},
        "optimizer": {"lr": 3e-3, "betas": (0.9, 0.98), "learning_rates": {"projector": 4e-3}},
        "cluster": {"num_workers": 0, "threads_per_worker": 1},
        "output": {"dir": str(tmp_path), "name": "run"},
    }
    assert train(Config.model_validate(run)) == 0
    losses = [line["loss"] for line in lines(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 30 and sum(losses[-5:]) < 0.75 * sum(losses[:5])
    after = build_plain(find_model(str(tmp_path / "run" / "final"))).state_dict()
    assert text and all(torch.equal(after[name], weight) for name, weight in text.items())
    sizes = part_sizes(model)
    trained, frozen = {part: sizes[part] for part in FIRST_STAGE}, {"text": sizes["text"]}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["parameters"] == {"trained": trained, "frozen": frozen}
    printed = capsys.readouterr().out
    assert "vision_tower and projector train on the answers, weights float32" in printed
    says = "{vision_tower:,} vision_tower, {projector:,} projector trained; {text:,} text frozen".format(**sizes)
    assert f"parameters    {model.num_parameters():,}: {says}" in printed
    rows = dict(training_rows(read_run(tmp_path / "run")))
    assert rows["frozen weights"] == [f"{sizes['text']:,} text"] and rows["learning rate"] == ["0.003, 0.004 projector"]


def test_going_on_equals_not_stopping(
    teacher_folder: Callable[..., Path], encoded: list[Encoded], tmp_path: Path
) -> None:
    """Killed after step 3, with a checkpoint at 2: the same bits and the same learning rates, which parts have."""

    class Killed(BaseException):
        pass

    def until(stop: int) -> Callable[[int], Iterator[Batch]]:
        def from_step(start: int) -> Iterator[Batch]:
            for at, batch in enumerate(batches(encoded)(start)):
                if start + at // MICRO_BATCHES == stop:
                    raise Killed
                yield batch

        return from_step

    options = {"optimizer": {"lr": 1e-3, "learning_rates": {"projector": 4e-3}}, "model": {"dtype": "bfloat16"}}
    run, broken = (sft_run(teacher_folder(), tmp_path / name, *FIRST_STAGE, **options) for name in ("run", "broken"))
    train_worker(run, Worker(), batches(encoded))
    with pytest.raises(Killed):
        train_worker(broken, Worker(), until(3))
    train_worker(broken, Worker(), batches(encoded))
    for file in ("final/model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"):
        assert (run.folder / file).read_bytes() == (broken.folder / file).read_bytes()
    rates = [
        [line["learning_rate_projector"] / line["learning_rate_vision_tower"] for line in metrics]
        for metrics in (lines(run.folder / "metrics.jsonl"), lines(broken.folder / "metrics.jsonl"))
    ]
    assert rates[0] == rates[1] == pytest.approx([4.0] * 6)


def test_a_run_without_images_does_not_end_well(
    teacher_folder: Callable[..., Path], encoded: list[Encoded], tmp_path: Path
) -> None:
    run = sft_run(teacher_folder(), tmp_path / "run", "projector")
    texts = [sample for sample in encoded if not sample.images] * 2
    outcome = train_worker(run, Worker(), batches(texts))
    assert outcome.status == "failed" and "none of its samples has an image, which projector would" in outcome.message


# ---------------------------------------------------------------------------------------------------------- a student
def test_a_students_weights_learn_answers(
    student: Callable[..., Any], encoded: list[Encoded], tmp_path: Path, teacher_folder: Callable[..., Path]
) -> None:
    """From where they are, by the cross-entropy of its answers; all else stays, and it is measured as a student."""
    student().save_pretrained(tmp_path / "student")
    run = sft_run(tmp_path / "student", tmp_path / "run", "swiftkv")
    objective = objective_of(run.config)
    assert objective.has_student and objective.prefix == "ce" and objective.score({"eval_accuracy": 0.5}) == -0.5
    for file in teacher_folder().iterdir():
        if not (tmp_path / "student" / file.name).exists():
            (tmp_path / "student" / file.name).write_bytes(file.read_bytes())
    assert train_worker(run, Worker(), batches(encoded)).status == "done"
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "student", run.folder / "final"))
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) == ("_swiftkv" not in name), name
    metrics = lines(run.folder / "metrics.jsonl")
    assert metrics[-1]["loss"] < metrics[0]["loss"] and "ce_text" in metrics[-1]
    assert "savings" in json.loads((run.folder / "evaluation.json").read_text())


def test_a_students_loss_is_that_of_its_whole_forward(
    student: Callable[..., Any], encoded: list[Encoded], float64_norms: None
) -> None:
    model, batch = student(dtype=torch.float64, key_value_group_size=2), as_float64(batch_of(encoded))
    found = []
    for whole in (True, False):
        model.zero_grad()
        if whole:
            logits = model(**batch.model_inputs(model.config)).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
        else:
            loss, _ = cross_entropy_loss(model, batch)
        assert loss is not None
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in trainable_parameters(model).values()])))
    (wanted, gradient), (ours, our_gradient) = found
    assert ours == pytest.approx(wanted, rel=1e-12) and swiftkv_backbone(model).config.swiftkv
    assert ((our_gradient - gradient).norm() / gradient.norm()).item() < 1e-12


@pytest.mark.parametrize("trainable", [(), ("text",), FIRST_STAGE])
def test_of_a_student_nothing_else_is_fine_tuned(
    student: Callable[..., Any], encoded: list[Encoded], tmp_path: Path, trainable: tuple[str, ...]
) -> None:
    student().save_pretrained(tmp_path / "student")
    outcome = train_worker(sft_run(tmp_path / "student", tmp_path / "run", *trainable), Worker(), batches(encoded))
    assert outcome.status == "refused"
    assert re.search(r"holds SwiftKV weights; .* or with model.trainable=\[swiftkv\] these weights", outcome.message)
