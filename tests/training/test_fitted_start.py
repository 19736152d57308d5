"""How a fitted student begins: the same whoever makes it, gone on with after an end, and made once for all runs."""

import functools
import json
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from clusters import free_ports
from conftest import batch_of, encoded_samples
from runs import batches, lines, run_of
from safetensors.torch import load_file
from waiting import HANG_SECONDS

from vlskv_ray.config import changed
from vlskv_ray.data.chat import Limits
from vlskv_ray.data.collate import Batch, Encoded
from vlskv_ray.data.questions import HeldOut
from vlskv_ray.data.shapes import ShapesSource
from vlskv_ray.errors import StoppedRun
from vlskv_ray.model.build import build_student, find_model
from vlskv_ray.report.figures import columns
from vlskv_ray.train_loop import train_worker
from vlskv_ray.training import start
from vlskv_ray.training.fit import projections_of
from vlskv_ray.training.run import FitPlan, Run, Worker
from vlskv_ray.training.start import means, nearest, read_about, start_fitted
from vlskv_ray.training.watchdog import Watchdog

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["vlskv_ray.train_loop", "transformers.models.llava_next.modeling_llava_next"])
SAMPLES = tuple((i % 8, (i + 3) % 8) for i in range(9))
"""Of 9 micro-batches; every other one is held out."""


prepared = functools.cache(encoded_samples)


def batch_of_numbers(numbers: Sequence[int]) -> Batch:
    return batch_of([prepared()[i] for i in numbers])


def fitted_run(teacher: Path, folder: Path, kept: Path) -> Run:
    """Its layers above N have something to fit: those above the first of them."""
    run = run_of(teacher, folder)
    config = changed(run.config, {"model.num_key_value_layers": 2, "vision_loss_weight": 0.5})
    return replace(run, config=config, fit=FitPlan(SAMPLES, kept))


def make(
    run: Run, batch_of: Callable[[Sequence[int]], Batch] = batch_of_numbers, rank: int = 0
) -> dict[str, torch.Tensor]:
    run.folder.mkdir(exist_ok=True, parents=True)
    dtype = getattr(torch, run.config.model.dtype)
    model = build_student(find_model(run.config.model.name_or_path), 2, dtype=dtype)
    start_fitted(run, model, batch_of, Watchdog(run.folder, rank, None))
    return {name: weight.detach().clone() for name, weight in projections_of(model).items()}


def make_five(run: Run) -> list[Sequence[int]]:
    """Begins a fit and ends it after five micro-batches; what these were."""
    seen: list[Sequence[int]] = []

    def ending(numbers: Sequence[int]) -> Batch:
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(numbers)
        return batch_of_numbers(numbers)

    with pytest.raises(KeyboardInterrupt):
        make(run, ending)
    return seen


def work(run: Run, rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    make(run, rank=rank)
    dist.destroy_process_group()


@pytest.fixture
def run(teacher_folder: Callable[..., Path], tmp_path: Path) -> Run:
    return fitted_run(teacher_folder(), tmp_path / "run", tmp_path / "cache" / "fit-1.safetensors")


def test_any_number_of_workers_gives_the_same_bits(run: Run, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    alone = make(run)
    copied = projections_of(build_student(find_model(run.config.model.name_or_path), 2))
    assert any(not torch.equal(alone[name], copied[name]) for name in alone)
    for world in (3,):
        theirs = replace(run, folder=tmp_path / str(world), fit=FitPlan(SAMPLES, tmp_path / str(world) / "fit-1"))
        port = free_ports(1)[0]
        processes = [FORKS.Process(target=work, args=(theirs, rank, world, port)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(HANG_SECONDS)
        assert [process.exitcode for process in processes] == [0] * world
        together = load_file(theirs.start_file)
        assert all(torch.equal(alone[name], together[name]) for name in alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_may_be_chosen_is_measured_each_with_its_own_weights(run: Run, dtype: str) -> None:
    run = replace(run, config=changed(run.config, {"model.dtype": dtype}))
    make(run)
    about = read_about(run.start_file)
    assert len(set(about["kl"].values())) == 3
    assert about["kl"][about["fitted"]] == min(about["kl"].values())
    assert (about["samples"], about["supervised_tokens"] > 0) == (2 * len(SAMPLES), True)


def test_it_goes_on_where_it_was_ended(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "KEEP_SECONDS", -1)  # keep the sums each time
    alone = make(replace(run, folder=tmp_path / "alone", fit=FitPlan(SAMPLES, tmp_path / "of-alone")))
    seen = make_five(run)
    rest: list[Sequence[int]] = []
    again = make(run, lambda numbers: rest.append(numbers) or batch_of_numbers(numbers))
    assert [*seen, *rest] == [*SAMPLES, *SAMPLES[1::2]]  # each once, and those held out once more to be measured on
    assert all(torch.equal(alone[name], again[name]) for name in alone)
    assert not (run.folder / "start.partial.safetensors").exists()


def test_sums_of_another_fit_are_not_gone_on_with(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "KEEP_SECONDS", -1)
    seen = make_five(run)
    seen.clear()
    other = replace(run, fit=FitPlan(SAMPLES[:4], tmp_path / "fit-2"))
    make(other, lambda numbers: seen.append(numbers) or batch_of_numbers(numbers))
    assert seen == [*SAMPLES[:4], *SAMPLES[1:4:2]]


def test_another_run_of_the_same_fit_has_it_at_no_cost(run: Run, tmp_path: Path) -> None:
    first = make(run)
    another = replace(run, folder=tmp_path / "another")

    def refusing(numbers: Sequence[int]) -> Batch:
        raise AssertionError("made again")

    second = make(another, refusing)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert another.fit is not None
    another.fit.kept.write_bytes(another.fit.kept.read_bytes()[:100])  # damaged: made again
    third = make(replace(run, folder=tmp_path / "third"))
    assert all(torch.equal(first[name], third[name]) for name in first)


def test_a_run_begins_with_it_and_measures_it(run: Run, encoded: list[Encoded]) -> None:
    """A stop in the middle of the fit is told as one at step 0, and the same command goes on to the end."""
    asked: list[Sequence[int]] = []

    def asking(numbers: Sequence[int]) -> Batch:
        asked.append(numbers)
        if len(asked) == 3:
            run.stop_file.touch()
        return batch_of_numbers(numbers)

    outcome = train_worker(run, Worker(), batches(encoded), asking)
    assert (outcome.status, outcome.step, len(asked)) == ("stopped", 0, 3)
    run.stop_file.unlink()
    fits: list[Sequence[int]] = []
    outcome = train_worker(
        run, Worker(), batches(encoded), lambda numbers: fits.append(numbers) or batch_of_numbers(numbers)
    )
    assert outcome.status == "done" and fits == [*SAMPLES[3:], *SAMPLES[1::2]]
    fitted = load_file(run.start_file)
    copied = build_student(find_model(run.config.model.name_or_path), 2).state_dict()
    final = build_student(find_model(str(run.folder / "final"))).state_dict()
    assert any(not torch.equal(weight, copied[name]) for name, weight in fitted.items())
    distance = {
        name: (sum(float((final[key] - of[key]).square().sum()) for key in fitted))
        for name, of in (("fitted", fitted), ("copied", copied))
    }
    assert distance["fitted"] < distance["copied"]  # a few steps from there
    assert len(lines(run.folder / "metrics.jsonl")) == 6


def test_the_fitted_student_is_measured_beside_the_others(run: Run, tmp_path: Path) -> None:
    """As the one that it begins with; it is left out where that is not there any more."""
    run = replace(run, held_out=HeldOut((ShapesSource("test", 4),), 4, Limits(), batch_size=4, max_new_tokens=2))
    assert train_worker(run, Worker(), batches(prepared()), batch_of_numbers).status == "done"
    evaluation = json.loads((run.folder / "evaluation.json").read_text())
    kl = [evaluation[side]["kl_mean"] for side in ("teacher", "student_before", "student_fitted", "student")]
    assert kl[0] == 0 and len(set(kl)) == 4
    shown = columns(evaluation)
    assert shown == ["teacher", "student copied", "student fitted", "student distilled"]
    (run.folder / "evaluation.json").unlink()
    run.start_file.unlink()
    assert train_worker(run, Worker(), batches(prepared()), batch_of_numbers).status == "done"
    assert "student_fitted" not in json.loads((run.folder / "evaluation.json").read_text())


def test_samples_that_cannot_be_used_leave_copies(run: Run) -> None:
    """Where steps follow, which say at their end what is wrong; without any it is told here."""
    copied = build_student(find_model(run.config.model.name_or_path), 2)
    assert run.fit is not None
    fitted = make(run, lambda numbers: batch_of([]))
    assert all(torch.equal(fitted[name], weight) for name, weight in projections_of(copied).items())
    assert "fitted        nothing" in run.waiting_file.read_text()
    for file in (run.start_file, run.fit.kept):
        file.unlink()
    with pytest.raises(StoppedRun, match="none of the samples that the student would be fitted to can be used"):
        make(replace(run, total_steps=0), lambda numbers: batch_of([]))


def test_a_student_is_fitted_where_it_is_nearer_by_more_than_chance() -> None:
    """Sums of KL of three students and tokens, of four micro-batches: the mean of one that a few tokens made smaller is
    chance, the next one is taken."""
    names = ["keys and values", "values alone", "neither"]
    alike = [[5.0, 3.5, 4.0, 9], [5.0, 3.6, 4.0, 9], [5.0, 3.4, 4.0, 9], [0.0, 11.5, 12.0, 9]]
    assert means(names, alike)["keys and values"] < means(names, alike)["values alone"]
    assert nearest(names, alike) == "values alone"
    assert nearest(names, [[first, last, last, n] for first, _, last, n in alike]) == "neither"
    assert nearest(names, [[1.0, 2.0, 3.0, 9]]) == "keys and values"
    assert nearest(names, []) == nearest(["neither"], []) == "neither"
