"""Whole runs on real files, and one worker's life on batches that are at hand; what is compared of two of them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from conftest import batch_of, conversation, picture
from safetensors.torch import load_file

import vlskv_ray.train
from vlskv_ray.config import Config, changed
from vlskv_ray.data.collate import Batch, Encoded
from vlskv_ray.training.run import Run, Worker

LOCAL = ("cluster.num_workers=0", "gradient_accumulation_steps=4")
MICRO_BATCHES = 4
NO_ANSWERS = ("evaluation.sources=[]", "evaluation.every_steps=null", "output.tensorboard=false")


def write_files(folder: Path) -> tuple[list[str], list[str]]:
    """A JSONL with pictures beside it and a Parquet file with pictures in it; ids that are good, and that are not."""
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    formats = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
    rows: list[dict[str, Any]] = []
    for i in range(40):
        question, answer = f"what is in picture {i}?", f"thing {i % 7}"
        kind = i % 4
        names = []
        for k in range({0: 1, 1: 0, 2: 2, 3: 1}[kind]):
            format = list(formats)[(i + k) % 3]
            names.append(f"{i}-{k}.{formats[format]}")
            width, height = (int(x) for x in rng.integers(16, 200, 2))
            (images / names[-1]).write_bytes(picture(width, height, i, format))
        turns = [question, answer, "are you sure?", "yes"] if kind in (2, 3) else [question, answer]
        rows.append({"messages": conversation(*turns, images=len(names)), "images": names})
    rows[8]["images"] = ["missing.png"]
    rows[13]["messages"][1]["content"][0]["text"] = "long " * 300
    lines = [json.dumps(row) for row in rows]
    lines[21] = lines[21][:30]
    (folder / "chat.jsonl").write_text("\n".join(lines))
    table = [
        {
            "messages": [{"role": "user", "content": f"<image>say {i}"}, {"role": "assistant", "content": f"{i}"}],
            "images": [{"bytes": picture(30 + i, 40, i), "path": None}],
        }
        for i in range(12)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / "more.parquet")
    ids = [f"chat.jsonl:{i + 1}" for i in range(40)] + [f"more.parquet:{i + 1}" for i in range(12)]
    bad = ["chat.jsonl:9", "chat.jsonl:14", "chat.jsonl:22"]
    return [i for i in ids if i not in bad], bad


def write_config(folder: Path, model: Path, **options: Any) -> Path:
    config = {
        "epochs": 3,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "model": {"name_or_path": str(model), "num_key_value_layers": 3},
        "data": {
            "sources": [
                {"path": str(folder / "chat.jsonl"), "image_root": str(folder / "images")},
                {"path": str(folder / "more.parquet")},
            ],
            "max_length": 400,
            "cache_dir": str(folder / "cache"),
        },
        "optimizer": {"lr": 3e-3},
        "cluster": {"num_workers": 2, "threads_per_worker": 1},
        "checkpoint": {"every_steps": 4},
        "evaluation": {"sources": [{"path": str(folder / "more.parquet")}], "max_new_tokens": 4, "every_steps": 10},
        "output": {"dir": str(folder / "runs"), "name": "run", "order": True},
    }
    (folder / "run.yaml").write_text(yaml.dump(config | options))
    return folder / "run.yaml"


def main(config: Path, *arguments: str) -> int:
    return vlskv_ray.train.main(["--config", str(config), *LOCAL, *arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    write_config(folder, teacher_folder())
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run without those that a clock makes."""
    timed = ("tokens_per_second", "data_wait_seconds", "step_seconds")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines(run / "metrics.jsonl")]


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = (load_file(run / "final" / "model.safetensors") for run in (first, second))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same_run(run: Path, alone: Path) -> None:
    """Weights, moments, and everything that was logged, but for what a clock tells."""
    assert_same_weights(run, alone)
    last = max(path.name for path in (alone / "checkpoints").iterdir())
    for name in ("trainable", "optimizer"):
        file = f"checkpoints/{last}/{name}.safetensors"
        assert (run / file).read_bytes() == (alone / file).read_bytes()
    assert untimed(run) == untimed(alone)
    for name in ("order", "rejected"):
        assert lines(run / f"{name}.jsonl") == lines(alone / f"{name}.jsonl")


def assert_ended_as(run: Path, alone: Path) -> None:
    """And what was measured of the student."""
    assert_same_run(run, alone)
    assert (run / "checkpoints" / "step-00000021").is_dir()
    assert (
        json.loads((run / "evaluation.json").read_text())["student"]
        == (json.loads((alone / "evaluation.json").read_text())["student"])
    )


def run_of(teacher: Path, folder: Path, **options: Any) -> Run:
    config = Config.model_validate(
        {
            "micro_batch_size": 2,
            "model": {"name_or_path": str(teacher), "num_key_value_layers": 2},
            "data": {"sources": [{"name": "shapes"}]},
            "optimizer": {"lr": 1e-2, "weight_decay": 0.1},
            "cluster": {"num_workers": 0, "threads_per_worker": 1},
            "checkpoint": {"every_steps": 2},
            "output": {"dir": str(folder.parent), "name": folder.name, "order": True},
        }
        | options
    )
    if config.model.dtype == "auto":
        config = changed(config, {"model.dtype": "float32"})  # as `prepare` settles it for a small model
    (folder / "checkpoints").mkdir(parents=True)
    return Run(config, folder, MICRO_BATCHES, 3, 6, {})


def batches(encoded: list[Encoded], worker: Worker = Worker()) -> Callable[[int], Iterator[Batch]]:  # noqa: B008
    """Steps of 4 micro-batches of 2 of the eight samples, dealt in turn to the workers."""

    def from_step(start: int) -> Iterator[Batch]:
        for step in range(start, 100):
            for j in range(worker.rank, MICRO_BATCHES, worker.world_size):
                chosen = [encoded[(2 * j + step) % 8], encoded[(2 * j + 3 * step + 1) % 8]]
                yield batch_of(chosen, step=step, micro_batch=j)

    return from_step


def final_weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "final" / "model.safetensors")
