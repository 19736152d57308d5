"""The probe: the distances of untrained students, all of them by one pass of the teacher."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import batch_of
from torch.overrides import TorchFunctionMode

from vlskv_ray.data.collate import Encoded, supervised_positions
from vlskv_ray.model.swiftkv import SwiftKVModel
from vlskv_ray.probe import main
from vlskv_ray.sweep.probing import measure_batch, settings_of, spearman
from vlskv_ray.training.distill import kl_divergence, shared_pass


@pytest.mark.parametrize("text_model_type", ["llama", "qwen2"])
def test_a_probe_measures_what_a_student_built_so_has(
    student: Callable[..., Any], encoded: list[Encoded], text_model_type: str
) -> None:
    """KL and agreement of an untrained student of that N and group size by a pass of its own."""
    batch = batch_of(encoded)
    keep = supervised_positions(batch.labels)
    settings = [(1, 1), (2, 1), (2, 2), (2, 4), (4, 2), (5, 1)]
    model = student(text_model_type, num_key_value_layers=1, moved=False)
    probed = list(measure_batch(model, batch, settings, logits_memory_mib=1))
    assert [setting for setting, _, _ in probed] == settings
    for (n, g), kl, agrees in probed:
        alone = student(text_model_type, num_key_value_layers=n, key_value_group_size=g, moved=False)
        with torch.no_grad():
            states = shared_pass(alone, batch)
            head = alone.get_output_embeddings()
            mine, its = head(states.student), head(states.teacher)
        wanted = kl_divergence(mine, its, temperature=1.0)[0]
        assert len(kl) == int(keep.sum())
        torch.testing.assert_close(kl, wanted, rtol=1e-4, atol=1e-6)
        assert torch.equal(agrees, mine.argmax(-1) == its.argmax(-1))
    assert probed[0][1].mean() > 0.01  # else nothing would have been compared
    config = next(m for m in model.modules() if isinstance(m, SwiftKVModel)).config
    assert (config.num_key_value_layers, config.key_value_group_size) == (1, 1)


def test_each_setting_is_measured_with_its_own_weights_in_bfloat16(
    student: Callable[..., Any], encoded: list[Encoded]
) -> None:
    """Rounded weights of one setting are not taken for those of the next, which differ where layers share them."""
    model, batch = student(dtype=torch.bfloat16, num_key_value_layers=1, moved=False), batch_of(encoded)
    together = {setting: kl for setting, kl, _ in measure_batch(model, batch, [(2, 1), (2, 4)], 256)}
    [(_, alone, _)] = measure_batch(model, batch, [(2, 4)], 256)
    assert torch.equal(together[2, 4], alone)
    assert not torch.equal(together[2, 4], together[2, 1])


def test_the_teacher_runs_once_a_batch(student: Callable[..., Any], encoded: list[Encoded]) -> None:
    model, calls = student(num_key_value_layers=1, moved=False), []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append("tower"))
    model.model.language_model.layers[0].register_forward_hook(lambda *_: calls.append("layer 0"))
    assert len(list(measure_batch(model, batch_of(encoded), settings_of(6, range(1, 6), [1, 2]), 256))) == 7
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
        list(measure_batch(model, batch, settings, 256))
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
        "model": {"name_or_path": str(teacher_folder())},
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
    assert "N  skipped  KL, group 1" in text and "1  5 of 6" in text
    found = json.loads((tmp_path / "p.json").read_text())
    assert [(row["num_key_value_layers"], row["key_value_group_size"]) for row in found] == settings_of(
        6, range(1, 6), [1, 2]
    )
    kl = {row["num_key_value_layers"]: row["kl_mean"] for row in found if row["key_value_group_size"] == 1}
    order = spearman([kl[1], kl[3], kl[5]], [0.3, 0.2, 0.1])
    assert f"correlation of the probe's KL with 3 trained students of sweep: {order:.2f} with their KL" in text
    (sweep / "frontier.json").write_text(json.dumps({"points": points[:2]}))
    capsys.readouterr()
    for more, said in (
        (["--against", str(sweep)], "has 2 trials with a setting that is probed; wanted 3 or more"),
        (["--json", "/nowhere/x.json"], "--json: there is no folder /nowhere"),
        (["--against", str(tmp_path)], "holds no finished sweep"),
        (["objective=sft"], "objective: sft has no student"),
        (["--layers", "6"], "--layers: 6, but the model has 6 text layers"),
        (["data.max_length=2"], "none of the samples tried can be used"),
    ):
        assert main([*arguments, *more]) == 2
        assert said in capsys.readouterr().err
