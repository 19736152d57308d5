"""Supervised fine-tuning: the loss is the plain one, all weights move, and a run of it goes on as if never stopped."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batch_of
from runs import MICRO_BATCHES, batches, lines, run_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from vlskv_ray.data.collate import IGNORE_INDEX, Batch, Encoded
from vlskv_ray.model.build import build_plain, find_model
from vlskv_ray.model.swiftkv import BACKBONES
from vlskv_ray.train_loop import train_worker
from vlskv_ray.training.objective import Loss
from vlskv_ray.training.profiling import peak_bytes
from vlskv_ray.training.run import Run, Worker
from vlskv_ray.training.sft import cross_entropy_loss
from vlskv_ray.training.step import recompute

QUERIES_OF_NEW_LAYER = "model.language_model.layers.7.self_attn.q_proj.weight"


@pytest.fixture
def run(teacher_folder: Callable[..., Path], tmp_path: Path) -> Run:
    return sft_run(teacher_folder(), tmp_path / "run")


def sft_run(model: Path, folder: Path) -> Run:
    return run_of(model, folder, objective="sft", model={"name_or_path": str(model)}, optimizer={"lr": 1e-3})


def test_the_loss_is_transformers_own(encoded: list[Encoded], teacher_folder: Callable[..., Path]) -> None:
    """Value and every gradient equal the stock model's mean over supervised tokens, times their number."""
    model = build_plain(find_model(str(teacher_folder())))
    batch = batch_of(encoded)
    loss, sums = cross_entropy_loss(model, batch)
    assert loss is not None
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(**batch.model_inputs(model.config)).logits[:, :-1].double()
    wanted = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-4)
    assert sums.supervised_tokens == int((batch.labels != IGNORE_INDEX).sum())
    assert sums.ce_vision + sums.ce_text == pytest.approx(sums.loss)
    alone = cross_entropy_loss(model, batch_of([sample for sample in encoded if not sample.images]))[1]
    assert alone.ce_text == pytest.approx(sums.ce_text, rel=1e-5) and alone.ce_vision == 0


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradient_checkpointing_changes_nothing_but_the_memory(
    backbone: str, encoded: list[Encoded], teacher_folder: Callable[..., Path]
) -> None:
    """Not a bit of the loss and of any gradient, vision tower included, and half of what is held at most."""
    model, batch = build_plain(find_model(str(teacher_folder(backbone)))), batch_of(encoded)
    gradients: list[dict[str, Tensor]] = []
    held = []
    for objective in (cross_entropy_loss, recompute(cross_entropy_loss)):
        model.zero_grad()

        def step(objective: Loss = objective) -> None:
            loss, _ = objective(model, batch)
            assert loss is not None
            loss.backward()

        step()  # which makes room for gradients
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        held.append(peak_bytes(step))
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() and all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert held[1] < 0.5 * held[0]
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_layers_on_top_change_nothing_at_first(
    backbone: str, encoded: list[Encoded], teacher_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Six layers become nine: the same logits, new weights by seed alone, and all of them learn within two steps."""
    files = find_model(str(teacher_folder(backbone)))
    old, model, again = build_plain(files), build_plain(files, 9, seed=5), build_plain(files, 9, seed=5)
    batch = batch_of(encoded)
    with torch.no_grad():
        assert torch.equal(
            model(**batch.model_inputs(model.config)).logits, old(**batch.model_inputs(model.config)).logits
        )
    held = model.state_dict()
    assert all(torch.equal(held[name], weight) for name, weight in again.state_dict().items())
    other = build_plain(files, 9, seed=6).state_dict()
    assert not torch.equal(other[QUERIES_OF_NEW_LAYER], held[QUERIES_OF_NEW_LAYER])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss, _ = cross_entropy_loss(model, batch)
        assert loss is not None
        loss.backward()
        optimizer.step()
    new = [(name, p) for name, p in model.named_parameters() if any(f".layers.{i}." in name for i in (6, 7, 8))]
    assert new and all(p.grad is not None and p.grad.abs().max() > 0 for _, p in new)
    model.save_pretrained(tmp_path)
    loaded = build_plain(find_model(str(tmp_path))).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


def test_a_preset_is_drawn_with_so_many_layers() -> None:
    files = find_model("small-llava-next")
    assert [len(build_plain(files, count).model.language_model.layers) for count in (2, 4, 5)] == [2, 4, 5]


def test_a_checkpoint_loses_no_layer(teacher_folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="model.num_hidden_layers: 5, but .* has 6 text layers; .* only be given more"):
        build_plain(find_model(str(teacher_folder())), 5)


def test_a_damaged_checkpoint_does_not_grow(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    """New layers excuse no other weight that is missing, and weights that are there are not made new."""
    folder = Path(shutil.copytree(teacher_folder(), tmp_path / "damaged"))
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="18 weights are too many, such as .*layers.4"):
        build_plain(find_model(str(folder)), 6)
    config["text_config"]["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    kept = {name: weight for name, weight in weights.items() if not re.search(r"\.layers\.[1-9]", name)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="16 weights are missing, such as .*vision_tower"):
        build_plain(find_model(str(folder)), 3)


def test_all_weights_train_and_the_result_is_a_stock_model(
    run: Run, encoded: list[Encoded], teacher_folder: Callable[..., Path]
) -> None:
    outcome = train_worker(run, Worker(), batches(encoded))
    assert outcome.status == "done"
    model = AutoModelForImageTextToText.from_pretrained(run.folder / "final")
    assert type(model.model.language_model).__name__ == "LlamaModel"
    before = AutoModelForImageTextToText.from_pretrained(teacher_folder()).state_dict()
    still = [name for name, weight in model.state_dict().items() if torch.equal(weight, before[name])]
    # the tower's last layer and norm lie behind the features that are taken; its class token is dropped
    assert all("layers.1." in name or "post_layernorm" in name for name in still), still
    first, *_, last = lines(run.folder / "metrics.jsonl")
    assert {"ce_vision", "ce_text", "token_accuracy", "loss"} <= {*first, *last}
    assert not {"kl_vision", "teacher_ce", "top1_agreement"} & {*first, *last}


def test_going_on_equals_not_stopping(run: Run, encoded: list[Encoded], teacher_folder: Callable[..., Path]) -> None:
    """Killed after step 3, with a checkpoint at 2: the same bits, and the same lines."""

    class Killed(BaseException):
        pass

    def until(stop: int) -> Callable[[int], Iterator[Batch]]:
        def from_step(start: int) -> Iterator[Batch]:
            for at, batch in enumerate(batches(encoded)(start)):
                if start + at // MICRO_BATCHES == stop:
                    raise Killed
                yield batch

        return from_step

    train_worker(run, Worker(), batches(encoded))
    broken = sft_run(teacher_folder(), run.folder.with_name("broken"))
    with pytest.raises(Killed):
        train_worker(broken, Worker(), until(3))
    train_worker(broken, Worker(), batches(encoded))
    whole, resumed = (load_file(r.folder / "final" / "model.safetensors") for r in (run, broken))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_preset_starts_from_the_seed(tmp_path: Path) -> None:
    files = find_model("shapes-llava-next")
    one, same, other = (build_plain(files, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_a_student_is_refused(run: Run, encoded: list[Encoded], student: Any, tmp_path: Path) -> None:
    student().save_pretrained(tmp_path / "student")
    config = run.config.model_copy(
        update={"model": run.config.model.model_copy(update={"name_or_path": str(tmp_path / "student")})}
    )
    outcome = train_worker(replace(run, config=config), Worker(), batches(encoded))
    assert (
        outcome.status == "refused" and "holds SwiftKV weights; objective=sft trains a plain model" in outcome.message
    )
