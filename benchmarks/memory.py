"""What `model.gradient_checkpointing` saves in memory and costs in work: one optimizer step without it and with it.

Memory is the most that tensors made during a step hold at once, beyond weights, gradients and optimizer; work is
counted operations: neither depends on how busy the machine is. The learning rate is 0, so that every step finds the
same weights; loss and gradient are compared to the last bit.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import CONFIGS, WORKLOADS, build, micro_batch
from vlskv_ray.data.collate import Batch
from vlskv_ray.model import presets
from vlskv_ray.training.distill import DistillationLoss
from vlskv_ray.training.objective import Loss
from vlskv_ray.training.profiling import flop_counter, peak_bytes
from vlskv_ray.training.sft import cross_entropy_loss
from vlskv_ray.training.step import GradientBuffer, recompute, train_step


def model_and_loss(objective: str, config: Any) -> tuple[Any, Loss]:
    """A student to distil, or a plain model all of whose weights train, and its loss."""
    if objective == "distill":
        return build(config), DistillationLoss()
    return presets.build_teacher(config).eval().requires_grad_(True), cross_entropy_loss


def measure(model: Any, loss: Loss, batch: Batch) -> dict[str, Any]:
    """Figures of a micro-batch, all kept and recomputed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients, optimizer = GradientBuffer(trained), torch.optim.AdamW(trained, lr=0.0, fused=True)
    losses: list[float] = []
    results, peak_mib, gflop = {}, {}, {}

    def step(objective: Loss) -> None:
        losses.append(train_step(model, optimizer, gradients, [batch], objective).sums.loss)

    step(loss)  # makes the optimizer's moments
    for name, objective in (("kept", loss), ("recomputed", recompute(loss))):
        with flop_counter() as counter:
            peak_mib[name] = peak_bytes(partial(step, objective)) / 2**20
        gflop[name], results[name] = counter.get_total_flops() / 1e9, gradients.flat.clone()
    return {
        "peak_mib": peak_mib,
        "gflop": gflop,
        "memory_ratio": peak_mib["recomputed"] / peak_mib["kept"],
        "operations_ratio": gflop["recomputed"] / gflop["kept"],
        "same_bits": len(set(losses)) == 1 and torch.equal(results["kept"], results["recomputed"]),
    }


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line for each cell."""
    names = ["objective, model, workload, micro-batch", "kept, MiB", "recomputed, MiB"]
    names += ["memory", "operations", "same bits"]
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    for name, cell in cells.items():
        peaks = [f"{mib:.0f}" for mib in cell["peak_mib"].values()]
        ratios = [f"{cell[key]:.2f}" for key in ("memory_ratio", "operations_ratio")]
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
                cells[name] = measure(model, loss, micro_batch(model.config, workload, size))
    print(table(cells))
    processor = platform.processor() or platform.machine()
    print(f"\n{date.today()}, {processor}, {options.threads} threads, torch {torch.__version__}")
    if options.json:
        options.json.write_text(json.dumps({"cells": cells}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
