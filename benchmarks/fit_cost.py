"""CPU seconds until a student first comes as near to its teacher as a given KL: started as a copy, and fitted.

    python -m benchmarks.fit_cost --model DIR --data ANSWERS.jsonl --held-out HELD_OUT.jsonl [--steps N] [--json FILE]

Both starts train on the same micro-batches in the same order, in one process and one thread. What the teacher makes of
a micro-batch is kept in memory for both alike, and its first pass counts for both, in full. The fit counts with all
that it takes, reading and tokenising its samples too, which do not count for the steps. Measuring on held-out answers
does not count.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlskv_ray.config import Config
from vlskv_ray.data.collate import Batch, supervised_positions
from vlskv_ray.data.pipeline import Loader, local_batches
from vlskv_ray.launch.prepare import prepare
from vlskv_ray.model.build import build_student, trainable_parameters
from vlskv_ray.model.swiftkv import swiftkv_backbone
from vlskv_ray.report.markdown import markdown_table
from vlskv_ray.training.distill import DistillationLoss, cached_pass, distances_at_head, frozen_states, rows_per_chunk
from vlskv_ray.training.run import Run
from vlskv_ray.training.start import start_fitted
from vlskv_ray.training.step import (
    GradientBuffer,
    autocast,
    build_optimizer,
    learning_rate_schedule,
    set_learning_rate,
    train_step,
)
from vlskv_ray.training.watchdog import Watchdog

WANTED = {15: (0.38, 0.25), 20: (0.14, 0.08)}
"""By N the KL that is to be reached."""
EVERY = 4
"""Steps between two measurements."""


def prepared(options: argparse.Namespace, data: str, layers: int, folder: Path) -> tuple[Run, Loader]:
    """A run of that N over the conversations of a file."""
    config = {
        "max_steps": options.steps,
        "epochs": 1000,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "model": {"name_or_path": options.model, "num_key_value_layers": layers, "dtype": options.dtype},
        "data": {"sources": [{"path": data}]},
        "optimizer": {"lr": options.lr},
        "scheduler": {"type": "cosine", "warmup_ratio": 0.05},
        "cluster": {"num_workers": 0, "threads_per_worker": 1},
        "output": {"dir": str(folder), "name": f"N{layers}", "level": "warning"},
    }
    run, loader = prepare(Config.model_validate(config))
    run.folder.mkdir(parents=True, exist_ok=True)
    assert run.fit is not None
    return replace(run, fit=replace(run.fit, kept=folder / f"fit-{layers}")), loader


@torch.no_grad()
def with_states(model: Any, batch: Batch) -> Batch:
    """The micro-batch with all that its distillation needs of the frozen part."""
    with autocast(model):
        layer = swiftkv_backbone(model).config.num_key_value_layers
        states = frozen_states(model, batch, [layer])[layer]  # no student runs, whose time it would count
    return replace(batch, trunk=states.trunk, teacher=states.teacher, teacher_input=states.teacher_input)


@torch.no_grad()
def kl_mean(model: Any, held_out: Sequence[Batch]) -> float:
    """Of a student from its teacher, in nats per supervised token; micro-batches with states."""
    parts, head = [], model.get_output_embeddings()
    with autocast(model):
        for batch in held_out:
            states = cached_pass(model, batch)
            rows = rows_per_chunk(head.weight.shape[0], 96)
            ((kl, _),) = distances_at_head([states.student], states.teacher, head, rows)
            parts.append(kl.double())
    return float(torch.cat(parts).mean())


def curve(
    run: Run, loader: Loader, held_out: Sequence[Batch], known: dict[tuple[str, ...], tuple[Batch, float]], start: str
) -> list[tuple[int, float, float]]:
    """Steps, CPU seconds and KL of one student on its way.

    Args:
        run: with its fit.
        loader: of its micro-batches.
        held_out: with states.
        known: by its samples a micro-batch with states, and the seconds that the teacher took for it; added to.
        start: "copied" or "fitted".
    """
    options = run.config.model
    assert options.num_key_value_layers is not None
    dtype = getattr(torch, options.dtype)
    model = build_student(run.model_files, options.num_key_value_layers, dtype=dtype)
    optimizer = build_optimizer(run.config, model)
    gradients, loss = GradientBuffer(trainable_parameters(model).values()), DistillationLoss()
    schedule, spent, began = learning_rate_schedule(run.config, run.total_steps), 0.0, time.process_time()
    if start == "fitted":
        start_fitted(run, model, loader.batch_of, Watchdog(run.folder, 0, None))
        spent += time.process_time() - began
    points, seen = [(0, spent, kl_mean(model, held_out))], set()
    for step, batch in enumerate(local_batches(loader, 0, run.total_steps)):
        key = tuple(batch.sample_ids)
        if key not in known:
            began = time.process_time()
            made = with_states(model, batch)
            known[key] = made, time.process_time() - began
        cached, of_teacher = known[key]
        spent += 0.0 if key in seen else of_teacher
        seen.add(key)
        began = time.process_time()
        set_learning_rate(optimizer, schedule(step))
        train_step(model, optimizer, gradients, [cached], loss, max_grad_norm=run.config.optimizer.max_grad_norm)
        spent += time.process_time() - began
        if (step + 1) % EVERY == 0 or step + 1 == run.total_steps:
            points.append((step + 1, spent, kl_mean(model, held_out)))
            print(f"{run.folder.name} {start}: step {step + 1}, {spent:.0f} s, KL {points[-1][2]:.4f}", flush=True)
    return points


def reached(points: Sequence[tuple[int, float, float]], wanted: float) -> str:
    """When a student first came to a KL, or how near it came."""
    for step, seconds, kl in points:
        if kl <= wanted:
            return f"{seconds:.0f} s, step {step}"
    return f"not reached, {min(kl for _, _, kl in points):.3g} after {points[-1][1]:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fit_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a teacher")
    parser.add_argument("--data", required=True, metavar="FILE", help="its answers, as JSON lines")
    parser.add_argument("--held-out", required=True, metavar="FILE", help="others, to measure on")
    parser.add_argument("--layers", type=int, nargs="+", choices=WANTED, default=list(WANTED), help="default: 15 20")
    parser.add_argument("--steps", type=int, default=94, help="of each student; default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all curves")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    curves: dict[str, list[tuple[int, float, float]]] = {}
    rows = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as folder:
            run, loader = prepared(options, options.data, layers, Path(folder))
            others = prepared(options, options.held_out, layers, Path(folder) / "held-out")[1]
            model = build_student(run.model_files, layers, dtype=getattr(torch, options.dtype))
            batches = local_batches(others, 0, others.plan.steps_per_epoch)
            held_out = [with_states(model, batch) for batch in batches if supervised_positions(batch.labels).any()]
            known: dict[tuple[str, ...], tuple[Batch, float]] = {}
            for start in ("copied", "fitted"):
                curves[f"{layers} {start}"] = curve(run, loader, held_out, known, start)
        both = [curves[f"{layers} {start}"] for start in ("copied", "fitted")]
        rows += [(f"N = {layers}, KL {kl}", [reached(points, kl) for points in both]) for kl in WANTED[layers]]
    print(markdown_table(["copied start", "fitted start"], rows, corner=f"CPU seconds, {options.dtype}"))
    if options.json:
        options.json.write_text(json.dumps(curves, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
