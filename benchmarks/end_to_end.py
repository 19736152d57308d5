"""A run through Ray against the bare loop, and two workers against one: `python -m benchmarks.end_to_end --help`.

The mid-size model on pictures and questions in files, one thread a worker:

    bare    train_step on micro-batches that lie ready in memory, by one process, and by two with gloo between them
    train   `vlskv_ray.train` with the same two workers: Ray, reading, decoding, preprocessing and hand-over included
    dry run what `--dry-run` expects a step of that run to take
"""

import argparse
import io
import json
import multiprocessing
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.workloads import CONFIGS, WORKLOADS, Conversation, build, conversation_of
from vlskv_ray.config import Config
from vlskv_ray.data.pipeline import local_batches
from vlskv_ray.launch.driver import train
from vlskv_ray.launch.dry_run import dry_run
from vlskv_ray.launch.prepare import prepare
from vlskv_ray.model import presets
from vlskv_ray.model.build import trainable_parameters
from vlskv_ray.training.objective import build_model
from vlskv_ray.training.step import GradientBuffer, build_optimizer, loss_of, train_step

WARM_UP = 4
"""Steps that do not count: workers, data tasks and memory get going."""


def write_data(folder: Path, count: int) -> None:
    """JSONL with pictures beside it: conversations of all sizes between those of the workloads, in equal parts."""
    with open(folder / "data.jsonl", "w") as file:
        for i in range(count):
            rng = np.random.default_rng(i)
            kinds = WORKLOADS[("visual_qa", "image_chat", "text_chat")[i % 3]]
            question, answer = (
                int(rng.integers(min(sizes), max(sizes) + 1))
                for sizes in ([kind.question for kind in kinds], [kind.answer for kind in kinds])
            )
            messages, pictures = conversation_of(Conversation(question, answer, kinds[i % 4].picture), rng)
            names = [f"{i}.jpg" for _ in pictures]
            for name, picture in zip(names, pictures, strict=True):
                (folder / name).write_bytes(picture)
            file.write(json.dumps({"messages": messages, "images": names}) + "\n")


def config_of(folder: Path, workers: int, steps: int, name: str) -> Config:
    return Config.model_validate(
        {
            "epochs": 1,
            "max_steps": steps,
            "micro_batch_size": 2,
            "model": {"name_or_path": str(folder / "model")},
            "data": {"sources": [{"path": str(folder / "data.jsonl")}], "cache_dir": str(folder / "cache")},
            "cluster": {"num_workers": workers, "threads_per_worker": 1, "address": "local"},
            "output": {"dir": str(folder / "runs"), "name": name, "level": "error", "tensorboard": False},
        }
    )


def bare(folder: Path, workers: int, steps: int) -> float:
    """Samples a second of so many processes, on micro-batches that lie ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    rates = context.SimpleQueue()
    processes = [
        context.Process(target=bare_worker, args=(folder, rank, workers, steps, port, rates)) for rank in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return float(rates.get())


def bare_worker(folder: Path, rank: int, workers: int, steps: int, port: int, rates: Any) -> None:
    torch.set_num_threads(1)
    run, loader = prepare(config_of(folder, workers, steps, "bare"))
    batches = [batch for batch in local_batches(loader, 0, steps) if batch.micro_batch % workers == rank]
    model = build_model(run)
    trained = trainable_parameters(model)
    optimizer, gradients = build_optimizer(run.config, model), GradientBuffer(trained.values())
    objective = loss_of(run.config)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    seconds = []
    for batch in batches:
        began = time.perf_counter()
        train_step(model, optimizer, gradients, [batch], objective)
        seconds.append(time.perf_counter() - began)
    if rank == 0:
        rates.put(rate([2 * workers] * len(seconds), seconds))


def expected(folder: Path, workers: int, steps: int) -> float:
    """Seconds of a step by a dry run."""
    with redirect_stdout(io.StringIO()):
        return dry_run(*prepare(config_of(folder, workers, steps, "dry")))


def through_ray(folder: Path, workers: int, steps: int, name: str) -> tuple[float, float, float]:
    """Samples a second of a whole run, seconds of a step, and the share of it that is spent waiting for data."""
    with redirect_stdout(io.StringIO()):
        assert train(config_of(folder, workers, steps, name)) == 0
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["step_seconds"] for line in lines]
    waits = [line["data_wait_seconds"] for line in lines[WARM_UP:]]
    of_all = sum(seconds[WARM_UP:])
    return rate([line["samples"] for line in lines], seconds), of_all / len(waits), sum(waits) / of_all


def rate(samples: Sequence[int], seconds: Sequence[float]) -> float:
    return sum(samples[WARM_UP:]) / sum(seconds[WARM_UP:])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(CONFIGS), default="mid")
    parser.add_argument("--steps", type=int, default=24, help=f"of which {WARM_UP} do not count")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    options = parser.parse_args(arguments)
    rates: dict[str, list[float]] = {"bare 1": [], "bare 2": [], "train 2": []}
    waits, foretold = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, 4 * options.steps)
        model = build(CONFIGS[options.model]())
        model.save_pretrained(folder / "model")
        presets.llava_next_processor(model.config).save_pretrained(folder / "model")
        for i in range(options.repeats):
            rates["bare 1"].append(bare(folder, 1, options.steps))
            rates["bare 2"].append(bare(folder, 2, options.steps))
            prediction = expected(folder, 2, options.steps)
            samples, seconds, waited = through_ray(folder, 2, options.steps, f"run-{i}")
            rates["train 2"].append(samples)
            waits.append(waited)
            foretold.append(prediction / seconds)
            print(f"{i + 1} of {options.repeats} rounds", file=sys.stderr, flush=True)
    scaling = median(b / a for a, b in zip(rates["bare 1"], rates["bare 2"], strict=True))
    share = median(b / a for a, b in zip(rates["bare 2"], rates["train 2"], strict=True))
    medians = {name: median(values) for name, values in rates.items()}
    print("| | samples a second |\n|---|---:|")
    for name, value in medians.items():
        print(f"| {name} worker{'s' * name.endswith('2')} | {value:.2f} |")
    print(f"\ntwo workers over one {scaling:.2f}, train over the bare loop {share:.2f}, ", end="")
    print(f"waiting for data {median(waits):.1%} of a step, dry run over train {median(foretold):.2f}")
    print(f"{date.today()}, {options.model} model, torch {torch.__version__}, one thread a worker")
    if options.json:
        figures = {
            "samples_per_second": medians,
            "two_workers_over_one": scaling,
            "train_over_bare": share,
            "data_wait_share": median(waits),
            "dry_run_over_train": median(foretold),
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
