"""From plan rows to micro-batches: rows that cannot be used are listed, their neighbours are unharmed."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import batch_of, picture
from waiting import HANG_SECONDS

from vlskv_ray.config import SourceConfig
from vlskv_ray.data.chat import Limits
from vlskv_ray.data.collate import IGNORE_INDEX, Batch, Encoded, from_row, tensors_of, to_row
from vlskv_ray.data.pipeline import (
    ROWS_PER_EXECUTION,
    Loader,
    begin_at,
    executions,
    local_batches,
    ray_batches,
    ray_dataset,
)
from vlskv_ray.data.plan import Plan, Table, Tokens
from vlskv_ray.data.sources import open_sources


def same(a: Batch, b: Batch) -> bool:
    mine, its = tensors_of(a), tensors_of(b)
    if mine.keys() != its.keys() or any(x.dtype != its[n].dtype or not torch.equal(x, its[n]) for n, x in mine.items()):
        return False
    return (a.step, a.micro_batch, a.sample_ids, a.rejected) == (b.step, b.micro_batch, b.sample_ids, b.rejected)


def test_collated_equals_one_by_one(encoded: list[Encoded]) -> None:
    batch = batch_of(encoded)
    image = 0
    for row, sample in enumerate(encoded):
        length = len(sample.input_ids)
        assert batch.input_ids[row, :length].tolist() == sample.input_ids.tolist()
        assert batch.labels[row, :length].tolist() == sample.labels.tolist()
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
        assert (batch.labels[row, length:] == IGNORE_INDEX).all()
        assert batch.has_image[row] == bool(sample.images)
        for one in sample.images:
            tiles = one.pixels["tiles"]
            assert torch.equal(batch.pixels["tiles"][image, : len(tiles)], torch.from_numpy(tiles))
            assert not batch.pixels["tiles"][image, len(tiles) :].any()
            assert batch.sizes["image_sizes"][image].tolist() == one.sizes["image_sizes"].tolist()
            image += 1
    assert image == len(batch.pixels["tiles"])
    assert batch.input_ids.shape[1] == max(len(sample.input_ids) for sample in encoded)


@pytest.mark.parametrize("which", [slice(0, 8), slice(1, 2), slice(0, 0)])
def test_the_row_format_loses_nothing(encoded: list[Encoded], which: slice) -> None:
    """Images, none, or no sample at all: dtypes, shapes and lists survive the way to a worker."""
    batch = batch_of(encoded[which], step=7, micro_batch=3, rejected=[{"id": "a:1", "reason": "x", "detail": "é"}])
    assert same(from_row(to_row(batch)), batch)


def rows_of(folder: Path) -> Path:
    (folder / "good.png").write_bytes(picture(50, 40))
    (folder / "broken.png").write_bytes(picture(50, 40)[:200])
    answer = {"role": "assistant", "content": "yes"}
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, answer]},
        {"messages": [{"role": "user", "content": "look"}, answer], "images": ["broken.png"]},
        {"messages": [{"role": "user", "content": "look"}, answer], "images": ["good.png"]},
        {"messages": [{"role": "user", "content": "long " * 200}, answer]},
        {"messages": [{"role": "user", "content": "look"}, answer], "images": ["missing.png"]},
        {"messages": [{"role": "user", "content": "look"}, answer], "images": ["../../etc/passwd"]},
    ]
    lines = [json.dumps(row) for row in rows] + ["{not json", json.dumps(rows[0])]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def loader_of(file: Path, model: Path, **options: int) -> Loader:
    sources = open_sources([SourceConfig(path=str(file))])
    tables = [Table(source.num_rows) for source in sources]
    lengths = np.concatenate([Tokens().of(source.num_images, source.text_bytes) for source in sources])
    plan = Plan(tables, lengths, seed=0, **{"micro_batch_size": 3, "micro_batches_per_step": 1} | options)
    return Loader(tuple(sources), plan, str(model), None, Limits(max_length=300))


def test_rows_left_out_are_listed_with_their_reason(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    loader = loader_of(rows_of(tmp_path), teacher_folder())
    batches = list(local_batches(loader, 0, loader.plan.steps_per_epoch))
    assert sorted(i for b in batches for i in b.sample_ids) == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:8"]
    rejected = {row["id"]: row["reason"] for b in batches for row in b.rejected}
    assert rejected == {
        "rows.jsonl:2": "image_truncated",
        "rows.jsonl:4": "too_long",
        "rows.jsonl:5": "image_missing",
        "rows.jsonl:6": "path_outside_root",
        "rows.jsonl:7": "json_line",
    }
    assert all(row["detail"] for b in batches for row in b.rejected)


def test_a_micro_batch_does_not_depend_on_its_neighbours(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A row's micro-batch is the same made first, last or again."""
    loader = loader_of(rows_of(tmp_path), teacher_folder())
    rows = list(loader.plan.rows(0, loader.plan.steps_per_epoch))
    forward, backward = [loader(row) for row in rows], [loader(row) for row in reversed(rows)][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))


@pytest.mark.ray
def test_data_want_no_cpu_but_their_own(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Where training holds all other CPUs, every micro-batch still comes, in the order of the plan, part by part."""
    import ray

    loader = loader_of(rows_of(tmp_path), teacher_folder())
    wanted = list(local_batches(loader, 0, 12))
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    come: list[Batch] = []
    try:
        data = ray_dataset(loader, 5, tmp_path / "first", cpus_per_task=1.0, num_tasks=1)
        data.context.execution_options.preserve_order = True  # as `vlskv_ray.train` has it
        [shard] = data.streaming_split(1)

        def consume() -> None:
            for first_step in (0, 5, 10):
                begin_at(tmp_path / "first", first_step)
                come.extend(ray_batches(shard))

        thread = threading.Thread(target=consume, daemon=True)
        thread.start()
        thread.join(HANG_SECONDS)  # what waits for a CPU waits forever
    finally:
        ray.shutdown()
    assert len(come) == 15  # the last part goes on, as the plan does; a run takes no more than it needs
    assert all(same(a, b) for a, b in zip(come, wanted, strict=False))


def test_a_long_run_is_told_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of at most ROWS_PER_EXECUTION micro-batches, all of one size, from the first step to the last."""
    assert list(executions(3, 3, 2)) == []
    assert list(executions(0, 150, 2)) == [0]
    for start, stop, per_step in [(0, 10**6, 2), (7, 32769, 1), (5, 10**5, 512), (0, 12, 2**16)]:
        parts = executions(start, stop, per_step)
        assert parts[0] == start and parts[-1] < stop <= parts[-1] + parts.step
        assert parts.step == 1 or parts.step * per_step <= ROWS_PER_EXECUTION


def test_where_an_execution_begins_is_told_in_place(tmp_path: Path) -> None:
    """The file keeps its size, so a disk that has become full takes it."""
    path = tmp_path / "first_step"
    for step in (0, 123456789, 7):
        begin_at(path, step)
        assert int(path.read_text()) == step and path.stat().st_size == 20
