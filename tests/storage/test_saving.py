"""Going on from a checkpoint takes the tensors of this run and no others; what was learnt from is counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import seal, with_state
from safetensors.torch import load_file, save_file

from vlskv_ray.config import Config
from vlskv_ray.storage.checkpoint import newest_checkpoint, save_checkpoint
from vlskv_ray.storage.saving import Counts, resume, state_of
from vlskv_ray.training.run import Run

CONFIG = Config.model_validate({"model": {"name_or_path": "x"}, "data": {"sources": ["shapes"]}})
FINGERPRINTS = {"model": "a", "data": "b", "versions": "c"}


def module() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Linear(3, 2)


def trained_and_optimizer() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    trained = dict(module().named_parameters())
    return trained, torch.optim.AdamW(trained.values(), fused=True)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """One whose checkpoints are of steps 1 and 2."""
    run = Run(CONFIG, tmp_path, 4, 10, 10, FINGERPRINTS)
    trained, optimizer = trained_and_optimizer()
    counts = Counts()
    for step in (1, 2):
        for parameter in trained.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        counts.seen, counts.supervised["text"] = 8 * step, 30 * step
        moments = {f"{name}.{key}": value for name, p in trained.items() for key, value in optimizer.state[p].items()}
        weights = {name: parameter.detach() for name, parameter in trained.items()}
        tensors = {"trainable": weights, "optimizer": moments}
        save_checkpoint(run.checkpoints, step, tensors, state_of(run, counts, {}), keep_last=2)
    return run


def test_it_goes_on_from_what_was_saved(run: Run) -> None:
    trained, optimizer = trained_and_optimizer()
    step, counts = resume(run, trained, optimizer)
    assert (step, counts.seen, counts.supervised["text"]) == (2, 16, 60)
    found = newest_checkpoint(run.checkpoints, warn=pytest.fail)
    assert found is not None and all(torch.equal(trained[n], w) for n, w in found.tensors("trainable").items())
    for name, moment in found.tensors("optimizer").items():
        parameter, _, kind = name.rpartition(".")
        assert torch.equal(optimizer.state[trained[parameter]][kind], moment)


NAN, INF = float("nan"), float("inf")
OTHER_TENSORS = {
    "another name": ("trainable", lambda t: {"evil": t["weight"], "bias": t["bias"]}, "'evil' and 1 more"),
    "one less": ("trainable", lambda t: {"weight": t["weight"]}, "'bias' and 0 more"),
    "one more": ("trainable", lambda t: t | {"a\x1b[2J": t["bias"].clone()}, r"a\x1b[2J"),
    "none": ("trainable", lambda t: {}, "'bias' and 1 more"),
    "another shape": (
        "trainable",
        lambda t: t | {"weight": t["weight"].T.contiguous()},
        "weight is torch.float32 of (3, 2)",
    ),
    "one that would spread": ("trainable", lambda t: t | {"bias": torch.zeros(1)}, "bias is torch.float32 of (1,)"),
    "another type": ("trainable", lambda t: t | {"bias": t["bias"].double()}, "bias is torch.float64 of (2,)"),
    "numbers that are none": ("trainable", lambda t: t | {"bias": torch.tensor([0.0, NAN])}, "bias is not finite"),
    "no bounds": ("trainable", lambda t: t | {"weight": t["weight"] * INF}, "weight is not finite"),
    "no moments": ("optimizer", lambda t: {}, "'bias.exp_avg' and 5 more"),
    "moments of another": ("optimizer", lambda t: {f"x.{k}": v for k, v in t.items()}, "and 11 more"),
    "one moment less": (
        "optimizer",
        lambda t: {k: v for k, v in t.items() if k != "bias.step"},
        "'bias.step' and 0 more",
    ),
    "moments of another shape": (
        "optimizer",
        lambda t: t | {"bias.exp_avg": torch.zeros(9)},
        "bias.exp_avg is torch.float32",
    ),
    "moments that are none": ("optimizer", lambda t: t | {"bias.exp_avg": torch.full((2,), NAN)}, "is not finite"),
    "negative squares": (
        "optimizer",
        lambda t: t | {"bias.exp_avg_sq": torch.full((2,), -1.0)},
        "exp_avg_sq is negative",
    ),
    "steps to come": ("optimizer", lambda t: t | {"bias.step": torch.tensor(3.0)}, "bias.step is 3, wanted 1 to 2"),
    "no step": ("optimizer", lambda t: t | {"bias.step": torch.tensor(0.0)}, "bias.step is 0, wanted 1 to 2"),
    "a step before all": (
        "optimizer",
        lambda t: t | {"bias.step": torch.tensor(-1.0)},
        "bias.step is -1, wanted 1 to 2",
    ),
}


@pytest.mark.parametrize("craft", OTHER_TENSORS)
def test_other_tensors_than_a_run_of_this_model_writes_are_refused(run: Run, craft: str) -> None:
    """Though every hash fits: one line with the file and the tensor, and how to go on without it. Nothing is taken."""
    stem, change, wrong = OTHER_TENSORS[craft]
    folder = run.checkpoints / "step-00000002"
    file = folder / f"{stem}.safetensors"
    save_file(change(load_file(file)), file)
    seal(folder)
    trained, optimizer = trained_and_optimizer()
    with pytest.raises(ValueError) as caught:
        resume(run, trained, optimizer)
    message = str(caught.value)
    assert message.startswith(f"{file}: is not what this run wrote: ") and wrong in message and message.isprintable()
    assert "move step-00000002 away" in message
    assert torch.equal(trained["weight"], module().weight) and not optimizer.state
    folder.rename(folder.with_name("aside"))
    assert resume(run, trained, optimizer)[0] == 1


def test_moments_may_lack_where_nothing_was_learnt_yet(run: Run) -> None:
    """An update is only made of samples."""
    folder = run.checkpoints / "step-00000002"
    save_file({}, folder / "optimizer.safetensors")
    with_state(folder, supervised={"vision": 0, "text": 0})
    assert resume(run, *trained_and_optimizer())[0] == 2


@pytest.mark.parametrize(
    ("supervised", "weights", "wrong"),
    [
        ({}, (1.0, 1.0), "all 8 samples had to be left out (8 x too_long). For one, f:3: too much"),
        ({"vision": 5}, (0.0, 1.0), "all its samples have images, and vision_loss_weight is 0"),
        ({"text": 5, "vision": 0}, (1.0, 0.0), "none of its samples has an image, and text_loss_weight is 0"),
        ({"text": 5, "vision": 1}, (0.5, 0.0), None),
        ({"text": 5, "vision": 1}, (0.0, 0.5), None),
        ({"text": 5, "vision": 1}, (1.0, 1.0, ["projector"]), None),
        ({"text": 5, "vision": 0}, (1.0, 1.0, ["projector", "text"]), None),
        ({"text": 5, "vision": 0}, (1.0, 1.0, ["swiftkv"]), None),
        (
            {"text": 5, "vision": 0},
            (1.0, 1.0, ["vision_tower", "projector"]),
            "none of its samples has an image, which vision_tower and projector would learn from",
        ),
    ],
)
def test_what_nothing_was_learnt_from_is_said(supervised: dict[str, int], weights: Any, wrong: str | None) -> None:
    counts = Counts()
    counts.seen, counts.example = 8, {"id": "f:3", "detail": "too much"}
    counts.reasons.update(too_long=8)
    counts.supervised.update(supervised)
    for counted in (counts, Counts(counts.to_json())):  # as it goes on from a checkpoint
        why = counted.nothing_learnt(*weights)
        assert why is None if wrong is None else why is not None and wrong in why


def test_a_checkpoint_of_an_earlier_version_counts_its_samples() -> None:
    before = {
        name: value
        for name, value in Counts().to_json().items()
        if name not in ("supervised", "empty_steps", "example")
    }
    assert Counts(before | {"seen": 8}).nothing_learnt(1.0, 1.0) is None
    assert "all 8 samples" in str(Counts(before | {"seen": 8, "rejected": {"x": 8}}).nothing_learnt(1.0, 1.0))
