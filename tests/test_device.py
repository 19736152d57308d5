"""Another device than the CPU: all that a run computes with is moved there, and what it writes comes back.

There is no GPU here. What is tested is everything but its own arithmetic, on a stand-in (tests/stand_in.py).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import batch_of
from runs import batches, final_weights, lines, run_of
from stand_in import stand_in
from torch import Tensor

from vlskv_ray import evaluate, generate
from vlskv_ray.data.chat import Limits
from vlskv_ray.data.collate import Batch, Encoded
from vlskv_ray.data.questions import HeldOut
from vlskv_ray.data.shapes import ShapesSource
from vlskv_ray.data.teacher_cache import TeacherCache
from vlskv_ray.evaluation.savings import measure_savings
from vlskv_ray.model.build import device_of, find_model
from vlskv_ray.model.processor import load_processor
from vlskv_ray.storage.checkpoint import newest_checkpoint, save_checkpoint
from vlskv_ray.train_loop import train_worker
from vlskv_ray.training.run import Run, Worker
from vlskv_ray.training.step import autocast

Encodings = list[Encoded]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`cluster.use_gpu` and `--device cuda` mean the stand-in, which must meet no tensor that was left behind."""
    with stand_in() as device:
        for module in ("training.objective", "evaluation.loading"):
            monkeypatch.setattr(
                f"vlskv_ray.{module}.device_of", lambda name: torch.device("cpu" if name == "cpu" else device)
            )
        monkeypatch.setattr("vlskv_ray.storage.saving.save_checkpoint", save_what_is_here)
        quick = partial(measure_savings, lengths=(64,), repeats=1)  # each operation takes its time there
        for module in ("train_loop", "report.remeasure"):
            monkeypatch.setattr(f"vlskv_ray.{module}.measure_savings", quick)
        yield


def save_what_is_here(root: Path, step: int, tensors: dict[str, dict[str, Tensor]], *others: Any) -> Path:
    """What is written beside the training takes no room on the device meanwhile."""
    assert {type(tensor) for named in tensors.values() for tensor in named.values()} == {Tensor}
    return save_checkpoint(root, step, tensors, *others)


def runs_of(teacher: Path, folder: Path, steps: int, **options: Any) -> tuple[Run, Run]:
    """The same run here and elsewhere, measured on two held-out samples."""
    both = []
    for name, use_gpu in (("here", False), ("elsewhere", True)):
        cluster = {"num_workers": 0, "threads_per_worker": 1, "use_gpu": use_gpu}
        run = run_of(teacher, folder / name, cluster=cluster, checkpoint={"every_steps": 1}, **options)
        held_out = HeldOut((ShapesSource("test", 2),), 2, Limits(), batch_size=2, max_new_tokens=2)
        both.append(replace(run, total_steps=steps, held_out=held_out))
    return both[0], both[1]


def assert_alike(here: Run, elsewhere: Run) -> None:
    """Steps, state on file, weights and answers; but for the last bits, since attention is another function there."""
    for ours, its in zip(lines(here.folder / "metrics.jsonl"), lines(elsewhere.folder / "metrics.jsonl"), strict=True):
        assert its["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        assert its["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)
        assert its.get("cached_samples") == ours.get("cached_samples")
    saved = [newest_checkpoint(run.checkpoints, warn=pytest.fail) for run in (here, elsewhere)]
    assert saved[0] and saved[1] and saved[0].step == saved[1].step
    for stem in ("trainable", "optimizer"):
        assert_close(saved[0].tensors(stem), saved[1].tensors(stem))
    assert_close(final_weights(here), final_weights(elsewhere))


def assert_close(ours: dict[str, Tensor], its: dict[str, Tensor]) -> None:
    assert ours.keys() == its.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(its[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_distillation_elsewhere_is_the_one_here(
    teacher_folder: Callable[..., Path], encoded: Encodings, tmp_path: Path, elsewhere: None
) -> None:
    """From the model's move to what is exported and measured, on the way too; states of the teacher cache are kept and
    come back."""
    runs = runs_of(teacher_folder(), tmp_path, steps=2, hidden_loss_weight=0.5, evaluation={"every_steps": 1})
    for run in runs:
        run = replace(run, cache=TeacherCache(tmp_path / f"cache-{run.folder.name}", {}))
        keyed = [replace(sample, key=f"{i:040}") for i, sample in enumerate(encoded)]

        def cached(step: int, keyed: Encodings = keyed, run: Run = run) -> Iterator[Batch]:
            for batch in batches(keyed)(step):
                assert run.cache is not None
                known = [run.cache.get(key, uid) for key, uid in zip(batch.keys, batch.sample_ids, strict=True)]
                if batch.step and all(known):
                    yield batch_of(
                        [sample for sample in known if sample], step=batch.step, micro_batch=batch.micro_batch
                    )
                else:
                    yield batch

        assert train_worker(run, Worker(), cached).status == "done"
    here, there = runs
    assert lines(here.folder / "metrics.jsonl")[-1]["cached_samples"] > 0
    assert_alike(here, there)
    ours, its = (json.loads((run.folder / "evaluation.json").read_text()) for run in runs)
    for side in ("teacher", "student_before", "student"):
        assert its[side]["kl_mean"] == pytest.approx(ours[side]["kl_mean"], rel=1e-3, abs=1e-9)
    assert [ours["savings"]["device"], its["savings"]["device"]] == ["cpu", "meta"]
    assert its["savings"]["prefill_flops_ratio"] == ours["savings"]["prefill_flops_ratio"]


def test_a_teacher_is_made_elsewhere_as_here(
    teacher_folder: Callable[..., Path], encoded: Encodings, tmp_path: Path, elsewhere: None
) -> None:
    model = {"name_or_path": str(teacher_folder()), "gradient_checkpointing": True}
    here, there = runs_of(teacher_folder(), tmp_path, steps=1, objective="sft", model=model, optimizer={"lr": 1e-3})
    for run in (here, there):
        assert train_worker(run, Worker(), batches(encoded)).status == "done"
    assert_alike(here, there)


@pytest.mark.parametrize("first", ["here", "elsewhere"])
def test_a_run_goes_on_on_the_other_device(
    teacher_folder: Callable[..., Path], encoded: Encodings, tmp_path: Path, elsewhere: None, first: str
) -> None:
    here, there = runs_of(teacher_folder(), tmp_path, steps=2)
    halves = (there, here) if first == "elsewhere" else (here, there)
    whole = replace(here, folder=tmp_path / "whole", held_out=None)
    whole.checkpoints.mkdir(parents=True)
    train_worker(whole, Worker(), batches(encoded))
    for run, steps in zip(halves, (1, 2), strict=True):
        run = replace(run, folder=tmp_path / "halves", total_steps=steps, held_out=None)
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        assert train_worker(run, Worker(), batches(encoded)).step == steps
    assert_alike(whole, replace(here, folder=tmp_path / "halves"))


def test_the_commands_answer_elsewhere_as_here(
    student: Callable[..., Any],
    teacher_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    elsewhere: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    student().save_pretrained("student")
    load_processor(find_model(str(teacher_folder()))).save_pretrained("student")
    here, there = [], []
    for device, said in (("cpu", here), ("cuda", there)):
        asked = ["--model", str(teacher_folder()), "--teacher", "--prompt", "2+2?", "--max-new-tokens", "4"]
        assert generate.main([*asked, "--device", device]) == 0
        said.append(capsys.readouterr().out.splitlines()[:-1])
        asked = ["--model", "student", "--num-samples", "1", "--max-new-tokens", "2", "--output", f"{device}.json"]
        assert evaluate.main([*asked, "--device", device]) == 0
        capsys.readouterr()
    assert here == there and here
    ours, its = (json.loads(Path(f"{device}.json").read_text()) for device in ("cpu", "cuda"))
    assert its["student"]["kl_mean"] == pytest.approx(ours["student"]["kl_mean"], rel=1e-3)
    assert its["savings"]["device"] == "meta"


def has_moved(ours: Tensor, its: Tensor) -> bool:
    return its.device.type == "meta" and (its.shape, its.dtype) == (ours.shape, ours.dtype)


def test_a_batch_moves_with_all_that_it_has(encoded: Encodings) -> None:
    """Every field that is a tensor, whichever there are, and no other."""
    batch = replace(batch_of(encoded, rejected=[{"id": "x"}]), trunk=torch.ones(3, 2), teacher=torch.ones(1, 2))
    batch = replace(batch, teacher_input=torch.ones(1, 2))
    moved = batch.to("meta")
    for field in fields(Batch):
        ours, its = getattr(batch, field.name), getattr(moved, field.name)
        kept = getattr(batch.to("cpu"), field.name)
        if field.name in ("sizes", "pixels"):  # of images, by names that their family gives
            assert ours and ours.keys() == its.keys()
            assert all(has_moved(ours[name], its[name]) and kept[name] is ours[name] for name in ours), field.name
        elif isinstance(ours, Tensor):
            assert has_moved(ours, its) and kept is ours, field.name
        else:
            assert ours is its and not isinstance(its, Tensor) and its is not None, field.name
    assert replace(batch, trunk=None).to("meta").trunk is None


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_autocast_goes_by_where_the_weights_are() -> None:
    for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.bfloat16), ("cuda", torch.float32)):
        weight = SimpleNamespace(device=torch.device(device), dtype=dtype)
        context = autocast(SimpleNamespace(parameters=lambda weight=weight: iter([weight])))
        assert getattr(context, "device", None) == (device if dtype == torch.bfloat16 else None)


def test_the_stand_in_is_strict(elsewhere: None) -> None:
    """It would tell of a tensor that was left behind, and hand none back by accident."""
    there, here = torch.ones(2, 3).to("meta"), torch.ones(3)
    assert (there * 2.0 + torch.ones(2, 3, device=there.device)).cpu().tolist() == [[3.0] * 3] * 2
    with pytest.raises(AssertionError, match="tensors on two devices"):
        there + here
    with pytest.raises(AssertionError, match="tensors on two devices"):
        here[torch.zeros(1, dtype=torch.int64).to("meta")]
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()


def test_without_a_gpu() -> None:
    assert device_of().type == device_of("cpu").type == "cpu"
    with pytest.raises(ValueError, match=r"^cluster.use_gpu: torch .* finds no GPU here; wanted an NVIDIA GPU"):
        device_of("cuda")
