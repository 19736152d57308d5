"""The probe: the distances of untrained students, copied and fitted, all of them by one pass of the teacher."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import batch_of
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import vlskv_ray.fit
from vlskv_ray.config import load_config
from vlskv_ray.data.collate import Encoded, supervised_positions
from vlskv_ray.launch.prepare import prepare
from vlskv_ray.model.build import build_student
from vlskv_ray.model.swiftkv import SwiftKVModel
from vlskv_ray.probe import main
from vlskv_ray.sweep.fits import bytes_of, copied_as, fit_settings, passes_of, zeros
from vlskv_ray.sweep.probing import (
    all_samples,
    fitting_config,
    measure,
    measure_batch,
    measure_distances,
    measuring_config,
    settings_of,
    spearman,
    unseen_samples,
)
from vlskv_ray.training.distill import kl_divergence, shared_pass
from vlskv_ray.training.fit import add_to_all, projections_of
from vlskv_ray.training.start import CANDIDATES, read_about


@pytest.mark.parametrize("text_model_type", ["llama", "qwen2"])
def test_a_probe_measures_what_a_student_built_so_has(
    student: Callable[..., Any], encoded: list[Encoded], text_model_type: str
) -> None:
    """KL and agreement of an untrained student of that N and group size by a pass of its own."""
    batch = batch_of(encoded)
    keep = supervised_positions(batch.labels)
    settings = [(1, 1), (2, 1), (2, 2), (2, 4), (4, 2), (5, 1)]
    model = student(text_model_type, num_key_value_layers=1, moved=False)
    probed = list(measure_batch(model, batch, [(setting, {}) for setting in settings], logits_memory_mib=1))
    for (n, g), (kl, agrees) in zip(settings, probed, strict=True):
        alone = student(text_model_type, num_key_value_layers=n, key_value_group_size=g, moved=False)
        with torch.no_grad():
            states = shared_pass(alone, batch)
            head = alone.get_output_embeddings()
            mine, its = head(states.student), head(states.teacher)
        wanted = kl_divergence(mine, its, temperature=1.0)[0]
        assert len(kl) == int(keep.sum())
        torch.testing.assert_close(kl, wanted, rtol=1e-4, atol=1e-6)
        assert torch.equal(agrees, mine.argmax(-1) == its.argmax(-1))
    assert probed[0][0].mean() > 0.01  # else nothing would have been compared
    config = next(m for m in model.modules() if isinstance(m, SwiftKVModel)).config
    assert (config.num_key_value_layers, config.key_value_group_size) == (1, 1)


def test_each_setting_is_measured_with_its_own_weights_in_bfloat16(
    student: Callable[..., Any], encoded: list[Encoded]
) -> None:
    """Rounded weights of one setting are not taken for those of the next, which differ where layers share them."""
    model, batch = student(dtype=torch.bfloat16, num_key_value_layers=1, moved=False), batch_of(encoded)
    [(first, _), (second, _)] = measure_batch(model, batch, [((2, 1), {}), ((2, 4), {})], 256)
    [(alone, _)] = measure_batch(model, batch, [((2, 4), {})], 256)
    assert torch.equal(second, alone)
    assert not torch.equal(second, first)


def test_the_teacher_runs_once_a_batch(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    model, calls = student(num_key_value_layers=1, moved=False), []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append("tower"))
    model.model.language_model.layers[0].register_forward_hook(lambda *_: calls.append("layer 0"))
    students = [(setting, {}) for setting in settings_of(6, range(1, 6), [1, 2])]
    assert len(list(measure_batch(model, batch_of(encoded), students, 256))) == 7
    assert calls == ["tower", "layer 0"]


def test_the_head_runs_once_for_the_teacher_and_once_for_each_setting(
    student: Callable[..., Any], encoded: list[Encoded]
) -> None:
    """And no gradient is made: of all matrix products with the head's weights, these are all."""
    model, batch = student(num_key_value_layers=1, moved=False), batch_of(encoded)
    settings = settings_of(6, range(1, 6), [1, 2])
    weight = model.get_output_embeddings().weight
    products: Counter[str] = Counter()

    class CountHead(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(argument is weight for argument in args) and func in (
                torch.nn.functional.linear,
                torch.Tensor.matmul,
            ):
                products[func.__name__] += len(args[0])
            return func(*args, **(kwargs or {}))

    with CountHead():
        list(measure_batch(model, batch, [(setting, {}) for setting in settings], 256))
    kept = int(supervised_positions(batch.labels).sum())
    assert products == {"linear": kept * (1 + len(settings))}


def test_settings_that_a_model_cannot_have_are_left_out() -> None:
    assert settings_of(6, [1, 2], [1, 2, 4]) == [(1, 1), (2, 1), (2, 2), (2, 4)]
    with pytest.raises(ValueError, match="none of these pairs can be, in a model of 6 text layers"):
        settings_of(6, [3], [2])
    with pytest.raises(ValueError, match="--layers: 9, but the model has 6 text layers; wanted 1 to 5"):
        settings_of(6, [3, 9], [1])


def test_ranks_are_compared_as_spearman_did() -> None:
    """Against numbers worked out by hand; equal values share a rank."""
    assert spearman([1, 2, 3, 4], [10, 200, 300, 4000]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    assert spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)


def test_the_command_shows_a_table_and_compares_it_with_a_sweep(
    teacher_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into a page too; what is wrong is told in one line."""
    config = {
        "micro_batch_size": 4,
        "model": {"name_or_path": str(teacher_folder()), "fit_tokens": 500},
        "data": {"sources": [{"name": "shapes", "num_samples": 30}]},
    }
    file, sweep, page = tmp_path / "run.yaml", tmp_path / "sweep", tmp_path / "page.md"
    file.write_text(yaml.dump(config))
    sweep.mkdir()
    points = [
        {"num_key_value_layers": n, "key_value_group_size": 1, "kl": kl, "accuracy": 1 - kl}
        for n, kl in ((1, 0.3), (3, 0.2), (5, 0.1))
    ]
    (sweep / "frontier.json").write_text(json.dumps({"points": points}))
    page.write_text("<!-- probe: begin -->\n<!-- probe: end -->\n")
    arguments = ["--config", str(file), "--num-samples", "12", "--groups", "1,2", "--json", str(tmp_path / "p.json")]
    assert main([*arguments, "--against", str(sweep), "--into", str(page)]) == 0
    text = page.read_text()
    assert "N  skipped  group  KL copied  KL fitted" in text and "1  5 of 6   1" in text
    found = json.loads((tmp_path / "p.json").read_text())
    assert [(row["num_key_value_layers"], row["key_value_group_size"]) for row in found] == settings_of(
        6, range(1, 6), [1, 2]
    )
    assert {row["copied"]["parts"] for row in found} == {"neither"}
    assert {row["fitted"]["parts"] for row in found} <= {*CANDIDATES}
    for how in ("copied", "fitted"):
        kl = {row["num_key_value_layers"]: row[how]["kl_mean"] for row in found if row["key_value_group_size"] == 1}
        order = spearman([kl[1], kl[3], kl[5]], [0.3, 0.2, 0.1])
        assert f"KL {how}: {order:.2f} with their KL" in text
    assert main([*arguments, "--start", "copy"]) == 0
    assert "fitted" not in (shown := capsys.readouterr().out) and "KL copied" in shown
    (sweep / "frontier.json").write_text(json.dumps({"points": points[:2]}))
    capsys.readouterr()
    for more, said in (
        (["--against", str(sweep)], "has 2 trials with a setting that is probed; wanted 3 or more"),
        (["--json", "/nowhere/x.json"], "--json: there is no folder /nowhere"),
        (["--against", str(tmp_path)], "holds no finished sweep"),
        (["objective=sft", "model.fit_tokens=null"], "objective: sft has no student"),
        (["--layers", "6"], "--layers: 6, but the model has 6 text layers"),
        (["data.max_length=2", "--start", "copy"], "none of the samples tried can be used"),
        (["data.max_length=2"], "none of the samples that students would be fitted to can be used"),
        (["model.fit_tokens=100000"], "students would be fitted to all 30 samples of data.sources"),
    ):
        assert main([*arguments, *more]) == 2
        assert said in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- the fit
FIT = {
    "micro_batch_size": 2,
    "data": {"sources": [{"name": "shapes", "num_samples": 40}]},
    "evaluation": {"sources": [{"name": "shapes", "split": "test", "num_samples": 12}], "max_new_tokens": 1},
    "cluster": {"num_workers": 0, "threads_per_worker": 1},
}


TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Of a mean KL: batches of the two have other sizes, and products of bfloat16 are rounded by them."""


@pytest.fixture
def config_file(teacher_folder: Callable[..., Path], tmp_path: Path) -> Path:
    (file := tmp_path / "run.yaml").write_text(
        yaml.dump(
            FIT
            | {
                "model": {"name_or_path": str(teacher_folder("qwen2")), "fit_tokens": 1000},
                "output": {"dir": str(tmp_path / "runs"), "name": "run", "tensorboard": False},
            }
        )
    )
    return file


def fitting(config_file: Path, *overrides: str) -> tuple[Any, Any, Any]:
    """Run and loader of what the students of a config are fitted to, and the model for all settings."""
    config = load_config(config_file, overrides)
    run, loader = prepare(fitting_config(config, prepare(measuring_config(config))[0]))
    return run, loader, build_student(run.model_files, 1, 1, dtype=getattr(torch, run.config.model.dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fitted_student_of_a_setting_is_that_of_the_fit_command(config_file: Path, dtype: str) -> None:
    """Among others of other N and groups: what is chosen, its weights, and what is measured with them."""
    setting = ["model.num_key_value_layers=2", "model.key_value_group_size=2"]
    assert vlskv_ray.fit.main(["--config", str(config_file), *setting, f"model.dtype={dtype}"]) == 0
    folder = config_file.parent / "runs" / "run-fit"
    wanted, about = load_file(folder / "start.safetensors"), read_about(folder / "start.safetensors")
    run, loader, model = fitting(config_file, f"model.dtype={dtype}")
    settings = settings_of(6, [1, 2, 4], [1, 2, 4])
    student = fit_settings(run, loader, model, settings)[2, 2]
    assert student.parts == about["fitted"] != "neither"
    moved = 0.0
    with copied_as(model, (2, 2)):
        for name, weight in projections_of(model).items():
            if name in wanted:
                got = student.weights.get(name, weight)
                torch.testing.assert_close(got, wanted[name], rtol=1e-4, atol=1e-5)
                moved += (got - weight).abs().max().item()
    assert student.weights.keys() <= wanted.keys() and moved > 0.1
    config = load_config(config_file, [f"model.dtype={dtype}"])
    distances, count = measure(config, [(2, 2)], 12, None)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert count == 12
    assert distances[2, 2]["fitted"].kl_mean == pytest.approx(evaluation["student"]["kl_mean"], rel=TOLERANCE[dtype])
    assert distances[2, 2]["copied"].kl_mean == pytest.approx(
        evaluation["student_before"]["kl_mean"], rel=TOLERANCE[dtype]
    )


def test_the_fit_of_all_settings_costs_one_teacher(config_file: Path) -> None:
    """Tower and layers run once for each micro-batch; operations are as many as for one setting, but for the sums."""
    run, loader, model = fitting(config_file)
    settings = settings_of(6, range(1, 6), [1, 2, 4])
    calls: Counter[str] = Counter()
    model.model.vision_tower.register_forward_hook(lambda *_: calls.update(["tower"]))
    for name in ("k_proj", "mlp.up_proj"):
        for i, layer in enumerate(model.model.language_model.layers):
            module = layer.get_submodule(name if "." in name else f"self_attn.{name}")
            module.register_forward_hook(lambda *_, name=f"{name} {i}": calls.update([name]))
    sums = {setting: zeros(model, setting) for setting in settings}
    images = 0
    for samples in run.fit.samples:
        batch = loader.batch_of(samples)
        add_to_all(sums, model, batch)
        images += bool(batch.has_image.any())
    count = len(run.fit.samples)
    assert calls.pop("tower") == images > 0
    assert calls == {f"{name} {i}": count for name in ("k_proj", "mlp.up_proj") for i in range(6)}
    batch = loader.batch_of(run.fit.samples[0])
    operations = {}
    for some in ([(1, 1)], settings):
        with FlopCounterMode(display=False) as counter:
            add_to_all({setting: zeros(model, setting) for setting in some}, model, batch)
        operations[len(some)] = counter.get_total_flops() - sum(sums_cost(model, setting, batch) for setting in some)
    assert operations[1] == operations[len(settings)] > 0


def sums_cost(model: Any, setting: tuple[int, int], batch: Any) -> int:
    """Operations of the products that go into a setting's sums."""
    sums, tokens = zeros(model, setting), int(batch.attention_mask.sum())
    return 2 * tokens * (sums.gram.numel() + sums.cross.numel())


def test_settings_that_do_not_fit_into_memory_are_fitted_one_after_the_other(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the same figures; what it takes is told before it begins."""
    run, loader, model = fitting(config_file)
    settings = settings_of(6, [1, 2, 4], [1, 2])
    samples = all_samples(loader)[:2]
    memory = 1.5 * max(bytes_of(model, setting) for setting in settings)
    assert passes_of(model, settings, memory) == [[(1, 1)], [(2, 1), (2, 2)], [(4, 1), (4, 2)]]
    assert "fit: 5 settings in 3 passes of the teacher, for which sums take" in capsys.readouterr().out
    assert len(passes_of(model, settings, 0)) == 5
    assert passes_of(model, settings) == [settings]
    together, apart = (measure_distances(run, loader, samples, settings, (run, loader), m) for m in (None, memory))
    assert together == apart and list(together) == settings
    assert together[2, 1]["fitted"].kl != together[2, 1]["copied"].kl


def test_samples_that_are_fitted_to_are_not_measured(config_file: Path) -> None:
    run, loader, _ = fitting(config_file)
    fitted_to = {number for samples in run.fit.samples for number in samples}
    measured = [number for samples in unseen_samples(run, loader, 1000) for number in samples]
    assert sorted([*fitted_to, *measured]) == list(range(40))
    assert sum(map(len, unseen_samples(run, loader, 5))) == 5
