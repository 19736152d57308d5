"""The benchmarks on a tiny model: equality and counted operations, which no noisy machine can change; no seconds."""

import json
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import conversation, tiny_config

from benchmarks import memory, real_step, same_numbers, step, trl_step, workloads
from benchmarks.arithmetic import lengths_of, step_flops, tower_flops
from vlskv_ray.data.collate import Batch, supervised_positions
from vlskv_ray.model.wrappers import llava_next
from vlskv_ray.training.profiling import flop_counter


def expected_flops(model: Any, batch: Batch) -> tuple[int, int]:
    """Of our step, as the design has it, and of one from the teacher cache."""
    trunk_and_teacher, student = step_flops(model.config.text_config, *lengths_of(batch))
    return tower_flops(model, batch) + trunk_and_teacher + student, student


OPTIONS = ("--model", "mid", "--micro-batch", "1", "4", "--repeats", "1", "--threads", "1")
NO_TABLE = "<!-- speed: begin -->\n<!-- speed: end -->\n"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the command prints of a tiny model, and the folder of the page and the figures that it writes."""
    folder = tmp_path_factory.mktemp("step")
    (folder / "page.md").write_text(NO_TABLE)
    files = ("--json", str(folder / "step.json"), "--into", str(folder / "page.md"))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setitem(workloads.CONFIGS, "mid", tiny_config)
        assert step.main([*OPTIONS, *files]) == 0
    return printed.getvalue(), folder


@pytest.mark.parametrize("workload", workloads.WORKLOADS)
@pytest.mark.parametrize("size", [1, 4])
def test_the_step_is_the_reference_recipes_at_the_work_it_must_take(
    measured: tuple[str, Path], workload: str, size: int
) -> None:
    """To the last operation: a trunk run twice, padding, or logits that nothing needs would show."""
    figures = json.loads((measured[1] / "step.json").read_text())["cells"][f"mid, {workload}, {size}"]
    assert figures["loss"] > 1e-4 and figures["loss_difference"] < 1e-6 and figures["gradient_difference"] < 1e-6
    counted = {name: round(gflop * 1e9) for name, gflop in figures["gflop"].items()}
    model = workloads.build(tiny_config())
    batch = workloads.micro_batch(model.config, workload, size)
    assert (counted["ours"], counted["cached"]) == expected_flops(model, batch)
    assert counted["reference"] > 1.5 * counted["ours"] and counted["forward"] > counted["floor"]
    assert figures["memory_ours_over_reference"] < 0.9  # far less where the vocabulary is a real one


def test_the_command_writes_its_table(
    measured: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed, written = measured[0], (measured[1] / "page.md").read_text()
    assert "| samples a second |" in written and written.count("visual\\_qa") == 2
    figures = json.loads((measured[1] / "step.json").read_text())
    wanted = {"reference_over_ours", "ours_over_teacher_forward", "memory_ours_over_reference", "cached_epoch_speedup"}
    for workload in workloads.WORKLOADS:
        assert wanted <= figures[workload].keys()
        assert printed.count(f"| mid, {workload}, ") == 2
    page = tmp_path / "page.md"
    page.write_text(NO_TABLE)
    assert step.main([*OPTIONS, "--from", str(measured[1] / "step.json"), "--into", str(page)]) == 0
    assert capsys.readouterr().out in printed and page.read_text() == written  # shown again, not measured again
    if not trl_step.available():
        assert trl_step.SET_UP in printed and "trl_over_ours" not in figures["visual_qa"]


@pytest.mark.parametrize("objective", ["distill", "sft"])
def test_recomputing_saves_memory_and_no_bit(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(workloads.CONFIGS, "mid", tiny_config)
    options = ["--objective", objective, "--workload", "text_chat", "--threads", "1"]
    assert memory.main([*options, "--json", str(tmp_path / "memory.json")]) == 0
    assert f"| {objective}, mid, text_chat, 4 |" in capsys.readouterr().out
    (cell,) = json.loads((tmp_path / "memory.json").read_text())["cells"].values()
    assert cell["same_bits"] and cell["memory_ratio"] < 1


def test_workloads_are_what_they_are_said_to_be() -> None:
    """Lengths and supervised tokens of the micro-batch of one, on the mid-size model; what the tower takes."""
    config = workloads.CONFIGS["mid"]()
    for workload, low, high, supervised in (
        ("visual_qa", 700, 1200, 6),
        ("image_chat", 900, 1400, 200),
        ("text_chat", 512, 512, 256),
    ):
        batch = workloads.micro_batch(config, workload, 1)
        assert low <= batch.input_ids.shape[1] <= high
        assert int(supervised_positions(batch.labels).sum()) == supervised
        lengths = workloads.micro_batch(config, workload, 4).attention_mask.sum(1)
        assert lengths.max() <= 1.4 * high and lengths.min() >= 0.6 * low
    model, batch = workloads.build(config), workloads.micro_batch(config, "visual_qa", 1)
    with flop_counter() as tower:
        model.get_image_features(**llava_next.model_inputs(config, batch))
    with flop_counter() as all_of_it:
        model.base_model(**batch.model_inputs(config), use_cache=False)
    assert 0.05 <= tower.get_total_flops() / all_of_it.get_total_flops() <= 0.08


def test_numbers_that_differ_are_found_and_times_are_no_such(tmp_path: Path) -> None:
    def run(name: str, seconds: float, loss: float = 1.0, weight: bytes = b"abc", kl: float = 0.5) -> Path:
        (tmp_path / name / "final").mkdir(parents=True)
        metrics = {"step": 1, "loss": loss, "step_seconds": seconds, "tokens_per_second": 1 / seconds}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
        (tmp_path / name / "final" / "model.safetensors").write_bytes(weight)
        evaluation = {"student": {"kl_mean": kl}, "savings": {"prefill_time_ratio": seconds, "parameters": 7}}
        (tmp_path / name / "evaluation.json").write_text(json.dumps(evaluation))
        return tmp_path / name

    first = run("first", seconds=1.0)
    assert same_numbers.differences(first, run("later", seconds=2.0)) == []
    for changed in ({"loss": 1.0000001}, {"weight": b"abd"}, {"kl": 0.6}):
        name = "-".join(changed)
        assert len(same_numbers.differences(first, run(name, seconds=1.0, **changed))) == 1, changed


def test_a_step_of_a_real_model_is_set_beside_the_peak(
    tmp_path: Path, teacher_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A cached step makes fewer operations than a first one, of both types as many, and neither changes a weight."""
    answers, figures = tmp_path / "answers.jsonl", tmp_path / "figures.json"
    rows = [{"messages": conversation(f"what is {i}?", f"it is {i}, of course", images=0)} for i in range(3)]
    for row in rows:
        for turn in row["messages"]:
            turn["content"] = turn["content"][-1]["text"]
    answers.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--model", str(teacher_folder()), "--data", str(answers), "--layers", "3", "--samples", "3"]
    assert real_step.main([*arguments, "--repeats", "1", "--json", str(figures)]) == 0
    measured = json.loads(figures.read_text())
    assert set(measured) == {f"{what}, {dtype}" for what in ("cached", "first pass") for dtype in real_step.DTYPES}
    operations = {name: of_step["mflop_per_token"] for name, of_step in measured.items()}
    assert operations["cached, float32"] == operations["cached, bfloat16"] < operations["first pass, float32"]
    assert all(of_step["of_peak"] > 0 for of_step in measured.values())
    assert "| cached, float32 |" in capsys.readouterr().out
