"""What `model.gradient_checkpointing` saves in memory and costs in time: one optimizer step without it and with it.

Memory is the most that tensors made during a step hold at once, beyond weights, gradients and optimizer. The learning
rate is 0, so that every step finds the same weights; loss and gradient are compared to the last bit.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.workloads import CONFIGS, WORKLOADS, build, micro_batch
from vlskv_ray.counting import peak_bytes
from vlskv_ray.data.collate import Batch
from vlskv_ray.distill import Objective
from vlskv_ray.model import presets
from vlskv_ray.sft import cross_entropy_loss
from vlskv_ray.step import GradientBuffer, Loss, recomputing, train_step


def model_and_loss(objective: str, config: Any) -> tuple[Any, Loss]:
    """A student to distil, or a plain model all of whose weights train, and its loss."""
    if objective == "distill":
        return build(config), Objective()
    return presets.build_teacher(config).eval().requires_grad_(True), cross_entropy_loss


def measure(model: Any, loss: Loss, batch: Batch, repeats: int) -> dict[str, Any]:
    """Figures of a micro-batch: MiB and seconds a step, all kept and recomputed, timed in turn."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients, optimizer = GradientBuffer(trained), torch.optim.AdamW(trained, lr=0.0, fused=True)

    def step_by(objective: Loss) -> Callable[[], float]:
        return lambda: train_step(model, optimizer, gradients, [batch], objective).sums.loss

    steps = {"kept": step_by(loss), "recomputed": step_by(recomputing(loss))}
    losses, results, peak_mib = {}, {}, {}
    for name, step in steps.items():
        losses[name], results[name] = step(), gradients.flat.clone()  # which also makes the optimizer's moments
        peak_mib[name] = peak_bytes(step) / 2**20
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return {
        "peak_mib": peak_mib,
        "seconds": {name: median(times) for name, times in seconds.items()},
        "memory_ratio": peak_mib["recomputed"] / peak_mib["kept"],
        "time_ratio": median(b / a for a, b in zip(*seconds.values(), strict=True)),
        "same_bits": losses["kept"] == losses["recomputed"] and torch.equal(results["kept"], results["recomputed"]),
    }


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line for each cell."""
    names = ("objective, model, workload, micro-batch", "kept, MiB", "recomputed, MiB", "memory", "time", "same bits")
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    for name, cell in cells.items():
        peaks = [f"{mib:.0f}" for mib in cell["peak_mib"].values()]
        ratios = [f"{cell[key]:.2f}" for key in ("memory_ratio", "time_ratio")]
        lines.append("| " + " | ".join([name, *peaks, *ratios, "yes" if cell["same_bits"] else "no"]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objective", nargs="+", choices=("distill", "sft"), default=["distill", "sft"])
    parser.add_argument("--model", choices=list(CONFIGS), default="mid", help="default: %(default)s")
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="default: all")
    parser.add_argument("--micro-batch", nargs="+", type=int, choices=range(1, 5), default=[4], help="default: 4")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds; default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores, %(default)s here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cells = {}
    for objective in options.objective:
        model, loss = model_and_loss(objective, CONFIGS[options.model]())
        for workload in options.workload:
            for size in options.micro_batch:
                name = f"{objective}, {options.model}, {workload}, {size}"
                print(f"{name} ...", file=sys.stderr, flush=True)
                cells[name] = measure(model, loss, micro_batch(model.config, workload, size), options.repeats)
    print(table(cells))
    processor = platform.processor() or platform.machine()
    print(f"\n{date.today()}, {processor}, {options.threads} threads, torch {torch.__version__}")
    if options.json:
        options.json.write_text(json.dumps({"cells": cells}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
