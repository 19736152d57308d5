"""The plan at scale, and the benchmark that says what limits a run: samples, bytes and operations, never seconds."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config

from benchmarks import arithmetic, deal, hand_over, scaling, workloads
from vlskv_ray.data.json_files import open_json
from vlskv_ray.report.markdown import write_block

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "scaling.md"
ROWS, WORKERS = 200_000, 64


def test_an_epoch_deals_every_sample_to_one_worker(tmp_path: Path) -> None:
    """And all workers as many, but for what the last step lacks."""
    plan = deal.plan_of(ROWS, WORKERS, tmp_path)
    dealt = deal.deal_an_epoch(plan, WORKERS, epoch=1)
    assert dealt["dealt"] == dealt["different"] == ROWS
    assert dealt["most"] - dealt["least"] <= plan.micro_batch_size
    assert plan.steps_per_epoch == -(-ROWS // (WORKERS * plan.micro_batch_size))


def test_any_step_is_the_same_wherever_a_run_goes_on_and_with_half_the_workers(tmp_path: Path) -> None:
    plan = deal.plan_of(ROWS, WORKERS, tmp_path)
    assert deal.same_after_resume(plan, deal.random_steps(plan, 50), WORKERS)
    by_all, by_half = (deal.hands(plan, 7, count) for count in (WORKERS, WORKERS // 2))
    assert by_half.shape == (WORKERS // 2, 2, plan.micro_batch_size)
    assert np.array_equal(by_half[3], [by_all[3, 0], by_all[3 + WORKERS // 2, 0]])


@pytest.mark.parametrize("rows", [ROWS, 20 * ROWS])
def test_a_plan_takes_the_same_little_memory_for_any_number_of_samples(tmp_path: Path, rows: int) -> None:
    """Its lengths stay in their file: what travels is a few hundred bytes, what a step holds is of its own size."""
    plan = deal.plan_of(rows, WORKERS, tmp_path)
    assert len(pickle.dumps(plan)) < 1000
    assert deal.peak_of_steps(plan, deal.random_steps(plan, 50)) < 2**20
    assert (tmp_path / "lengths.npy").stat().st_size == pytest.approx(2 * rows, abs=200)


def test_weights_and_operations_need_no_weights() -> None:
    """Those of the 7B model are those of its recipe; the tower's are the same on the meta device as on the CPU."""
    needs = arithmetic.needs_of("7B")
    comments = (ROOT / "configs" / "llava-v1.6-mistral-7b.yaml").read_text()
    assert f"{needs.frozen + needs.trained:,}, of them {needs.trained:,} trained" in comments
    model, batch = workloads.build(tiny_config()), workloads.micro_batch(tiny_config(), "image_chat", 2)
    on_meta = arithmetic.on_meta(tiny_config())
    assert arithmetic.tower_flops(on_meta, batch) == arithmetic.tower_flops(model, batch) > 0
    assert sum(arithmetic.weights_of(on_meta).values()) == sum(p.numel() for p in model.parameters())


def test_bytes_of_a_worker_are_those_of_its_tensors() -> None:
    """Trained weights, their gradients and two moments in float32; frozen ones as they are."""
    model = workloads.build(tiny_config())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    held = [*model.parameters(), *(p.grad for p in trained if p.grad is not None), *moments]
    needs = arithmetic.Needs(
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        trained=sum(p.numel() for p in trained),
        **dict.fromkeys(("hidden", "tokens", "supervised", "flops", "cached_flops", "row_bytes"), 0),
    )
    assert needs.worker_bytes(4, saving=False) == sum(tensor.nbytes for tensor in held)
    assert needs.checkpoint_bytes == sum(tensor.nbytes for tensor in [*trained, *moments])


def test_what_workers_exchange() -> None:
    assert arithmetic.all_reduce_bytes(1000, 1) == 0
    assert arithmetic.all_reduce_bytes(1000, 2) == 1000
    assert arithmetic.all_reduce_bytes(1000, 4) == 1500
    assert arithmetic.in_plan_order_bytes(1000, 4, accumulation=2) == 6000  # the six micro-batches of the others
    assert arithmetic.seconds_on(10**9, 8) == 1
    assert arithmetic.in_plan_order_seconds(10**9, 4, accumulation=2, gigabits=8) == 8 * 2  # two levels each


def test_the_index_of_json_files_travels_whole(tmp_path: Path) -> None:
    """Which is why the page advises Parquet for very many samples."""
    row = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
    sizes = []
    for rows in (1000, 3000):
        (tmp_path / "data.jsonl").write_text(rows * row)
        sizes.append(len(pickle.dumps(open_json("data", 1.0, [tmp_path / "data.jsonl"], ["jsonl"], None, None))))
    assert sizes[1] - sizes[0] == pytest.approx(2000 * scaling.bytes_of_json_row(), abs=100)


def test_rates_and_pauses_of_a_hand_over() -> None:
    """Two consumers, two parts of 256 rows: a row each 10 ms, 5 s before the second part."""

    def taken(rank: int) -> list[tuple[int, float]]:
        of_parts = [[(-1, 5 * part)] + [(i, 1 + 0.01 * i + 5 * part) for i in range(512)] for part in range(2)]
        return [
            (place, when)
            for part, entries in enumerate(of_parts)
            for place, when in entries
            if place < 0 or (place // 256 == part and place % 2 == rank)
        ]

    figures = hand_over.figures_of([taken(0), taken(1)], rows=256, executions=2)
    assert figures["in_turn"] and figures["rows_per_second"] == pytest.approx([100, 100])
    assert figures["pause_seconds"] == pytest.approx([5.01]) and figures["first_seconds"] == pytest.approx(1)
    assert not hand_over.figures_of([taken(1), taken(0)], rows=256, executions=2)["in_turn"]


def test_the_page_holds_what_the_command_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written anew, it is the same page; and every table that is measured is there."""
    copy = tmp_path / "scaling.md"
    copy.write_text(PAGE.read_text())
    assert scaling.main(["--into", str(copy)]) == 0
    assert copy.read_text() == PAGE.read_text()
    for name in scaling.MEASURES:
        block = re.search(rf"<!-- {name}: begin -->\n(.*?)<!-- {name}: end -->", PAGE.read_text(), re.DOTALL)
        assert block is not None and "measured 20" in block[1], name
    assert "NO" not in re.findall(r"\b[A-Z]{2,}\b", PAGE.read_text())
    with pytest.raises(ValueError, match="has no place for it"):
        write_block(copy, "nothing", "")


def test_the_plan_is_measured_on_a_few_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--measure", "plan", "--samples", "20000", "--random-steps", "5", "--repeats", "1"]
    assert scaling.main([*options, "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())["plan"]["figures"]
    assert figures["epoch"]["dealt"] == figures["epoch"]["different"] == 20000 and figures["same_after_resume"]
    measured = capsys.readouterr().out
    assert "| samples dealt, different ones: each once | 20,000, 20,000: yes |" in measured
    assert scaling.main(["--measured", str(tmp_path / "figures.json")]) == 0
    assert capsys.readouterr().out == measured
