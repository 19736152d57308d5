"""One optimizer step of a distillation, measured side by side.

In one process, on the same weights and micro-batches, in turn:

    reference   teacher and student as two whole passes with all logits (benchmarks/reference.py)
    ours        vlskv_ray's step
    cached      the same from a teacher cache on disk, read and verified within the step: every epoch after the first
    forward     the teacher's forward pass alone, as anyone calls it: with all logits
    floor       the same with the logits of the supervised tokens only: what cannot be saved
    trl         TRL's loss step, where TRL is installed (benchmarks/trl_step.py)

The learning rate is 0, so that every step finds the same weights; the optimizer computes all the same.
"""

import argparse
import copy
import gc
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import trl_step
from benchmarks.reference import reference_loss
from benchmarks.workloads import CONFIGS, WORKLOADS, build, micro_batch
from vlskv_ray.data.collate import Batch, collate, supervised_positions
from vlskv_ray.data.teacher_cache import TeacherCache
from vlskv_ray.evaluation.evaluator import toggled
from vlskv_ray.model import presets
from vlskv_ray.report.markdown import markdown_table, write_block
from vlskv_ray.training.distill import DistillationLoss, distillation_loss
from vlskv_ray.training.profiling import flop_counter, peak_bytes
from vlskv_ray.training.step import GradientBuffer, train_step

TEMPERATURE = 2.0


@dataclass
class Side:
    """One of what is compared."""

    step: Callable[[], float]
    """Runs it once; the loss, 0 where there is none."""
    seconds: list[float] = field(default_factory=list)
    flops: int = 0
    peak_bytes: int = 0
    """Of memory beyond what was there before the step: weights, gradients and optimizer."""
    loss: float = 0.0
    gradient: Tensor | None = None

    def measure_once(self, gradients: GradientBuffer) -> None:
        """What needs no clock; also warms up."""
        gradients.flat.zero_()
        with flop_counter() as counter:
            self.loss = self.step()
        self.flops, self.gradient = counter.get_total_flops(), gradients.flat.clone()
        self.peak_bytes = peak_bytes(self.step)

    def time_once(self) -> None:
        gc.collect()
        began = time.perf_counter()
        self.step()
        self.seconds.append(time.perf_counter() - began)


def sides_of(
    model: Any, batch: Batch, cache: TeacherCache, trl_trainer: Any = None
) -> tuple[dict[str, Side], GradientBuffer]:
    """All that is compared, on one model, one micro-batch and one optimizer; the cache is filled."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = GradientBuffer(trained)
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    objective = DistillationLoss(temperature=TEMPERATURE)
    keep = supervised_positions(batch.labels)
    pad_token_id = presets.SPECIAL_TOKENS.index("<pad>")

    def reference() -> float:
        gradients.flat.zero_()
        loss = reference_loss(model, batch, TEMPERATURE)
        loss.backward()
        optimizer.step()
        return loss.item()

    def ours() -> float:
        result = train_step(model, optimizer, gradients, [batch], objective)
        return result.sums.loss / result.sums.supervised_tokens

    distillation_loss(model, batch, replace(objective, cache=cache))

    def cached() -> float:
        samples = [sample for key in batch.keys if (sample := cache.get(key, key))]
        known = collate(samples, pad_token_id)
        assert known.trunk is not None
        result = train_step(model, optimizer, gradients, [known], objective)
        return result.sums.loss / result.sums.supervised_tokens

    @torch.no_grad()
    def forward() -> float:
        with toggled(model, on=False):
            model(**batch.model_inputs(model.config), use_cache=False)
        return 0.0

    @torch.no_grad()
    def floor() -> float:
        with toggled(model, on=False):
            hidden = model.base_model(**batch.model_inputs(model.config), use_cache=False).last_hidden_state
        model.get_output_embeddings()(hidden[keep])
        return 0.0

    sides = {"reference": Side(reference), "ours": Side(ours), "cached": Side(cached)}
    sides |= {"forward": Side(forward), "floor": Side(floor)}
    if trl_trainer is not None:
        inputs = trl_step.trainer_inputs(batch, model.config, pad_token_id)

        def trl() -> float:
            gradients.flat.zero_()
            loss = trl_trainer.compute_loss(model, dict(inputs))
            loss.backward()
            optimizer.step()
            return float(loss.item())

        sides["trl"] = Side(trl)
    return sides, gradients


def measure(model: Any, batch: Batch, repeats: int, trl_trainer: Any = None) -> dict[str, Any]:
    """The figures of one cell: a model, a workload and a size of micro-batch."""
    with tempfile.TemporaryDirectory() as folder:
        return _measure(model, batch, repeats, TeacherCache(Path(folder), {}), trl_trainer)


def _measure(model: Any, batch: Batch, repeats: int, cache: TeacherCache, trl_trainer: Any) -> dict[str, Any]:
    sides, gradients = sides_of(model, batch, cache, trl_trainer)
    gradients.flat.zero_()
    exact = reference_loss(model, batch, TEMPERATURE, torch.float64)
    exact.backward()
    exact_loss, exact_gradient = exact.item(), gradients.flat.clone()
    for side in sides.values():
        side.measure_once(gradients)
    for _ in range(repeats):
        for side in sides.values():
            side.time_once()
    reference, ours, forward, floor = (sides[name] for name in ("reference", "ours", "forward", "floor"))
    seconds = {name: median(side.seconds) for name, side in sides.items()}
    figures = {
        "micro_batch_size": len(batch.labels),
        "tokens": batch.attention_mask.sum(1).tolist(),
        "supervised_tokens": int(supervised_positions(batch.labels).sum()),
        "seconds": seconds,
        "gflop": {name: side.flops / 1e9 for name, side in sides.items()},
        "gflop_per_second": {name: side.flops / 1e9 / seconds[name] for name, side in sides.items()},
        "peak_mib": {name: side.peak_bytes / 2**20 for name, side in sides.items()},
        "reference_over_ours": _ratio(reference, ours),
        "cached_epoch_speedup": _ratio(reference, sides["cached"]),
        "ours_over_teacher_forward": _ratio(ours, forward),
        "ours_over_floor": _ratio(ours, floor),
        "flops_reference_over_ours": reference.flops / ours.flops,
        "flops_cached_epoch_speedup": reference.flops / sides["cached"].flops,
        "flops_ours_over_teacher_forward": ours.flops / forward.flops,
        "flops_ours_over_floor": ours.flops / floor.flops,
        "memory_ours_over_reference": ours.peak_bytes / reference.peak_bytes,
        # to the reference recipe with its divergence in float64
        "loss": exact_loss,
        "loss_difference": abs(ours.loss - exact_loss) / exact_loss,
        "gradient_difference": max(
            _difference(side.gradient, exact_gradient) for side in (ours, sides["cached"]) if side.gradient is not None
        ),
    }
    if "trl" in sides:
        gradient = sides["trl"].gradient
        assert gradient is not None
        figures["trl_over_ours"] = _ratio(sides["trl"], ours)
        # its loss lacks the factor temperature^2
        figures["trl_gradient_difference"] = _difference(gradient * TEMPERATURE**2, exact_gradient)
    return figures


def _ratio(one: Side, other: Side) -> float:
    """The median of the ratios of neighbours in time, which saw the same machine."""
    return median(a / b for a, b in zip(one.seconds, other.seconds, strict=True))


def _difference(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).double().norm() / wanted.double().norm())


def peak_gflop_per_second(size: int = 2048, repeats: int = 7) -> float:
    """The best that this machine makes of a large float32 matrix product, with the threads that are set."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - began) / 1e9)
    return best


# ---------------------------------------------------------------------------------------------------------- the command
COLUMNS = (
    *(("reference / ours", "reference_over_ours"), ("operations", "flops_reference_over_ours")),
    *(("reference / cached", "cached_epoch_speedup"), ("operations", "flops_cached_epoch_speedup")),
    *(("ours / forward", "ours_over_teacher_forward"), ("operations", "flops_ours_over_teacher_forward")),
    *(("ours / floor", "ours_over_floor"), ("operations", "flops_ours_over_floor")),
    *(("memory", "memory_ours_over_reference"), ("TRL / ours", "trl_over_ours")),
)


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line for each cell."""
    names = ["model, workload, micro-batch", *(name for name, _ in COLUMNS), "ours, s", "of peak", "gradient differs"]
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    for name, cell in cells.items():
        ratios = [f"{cell[key]:.2f}" if key in cell else "-" for _, key in COLUMNS]
        rest = [f"{cell['seconds']['ours']:.2f}", f"{cell['ours_of_peak']:.0%}", f"{cell['gradient_difference']:.0e}"]
        lines.append("| " + " | ".join([name, *ratios, *rest]) + " |")
    return "\n".join(lines)


SPEED_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
    ("samples a second", lambda cell: cell["micro_batch_size"] / cell["seconds"]["ours"]),
    ("times as fast as the recipe as published", lambda cell: cell["reference_over_ours"]),
    ("the same, every epoch after the first, from a teacher cache", lambda cell: cell["cached_epoch_speedup"]),
    ("memory of a step, the recipe's being 1", lambda cell: cell["memory_ours_over_reference"]),
)


def speed_table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: what a reader wants to know first, a column for each cell."""
    rows = [(label, [f"{figure(cell):.2f}" for cell in cells.values()]) for label, figure in SPEED_ROWS]
    return markdown_table(list(cells), rows, corner="model, workload, samples a step")


def worst_of(cells: dict[str, dict[str, Any]], workload: str) -> dict[str, float]:
    """The figures of a workload on the mid-size model (or what was measured), the worse of its micro-batches each."""
    of_workload = {name: cell for name, cell in cells.items() if name.split(", ")[1] == workload}
    mid = [cell for name, cell in of_workload.items() if name.startswith("mid")] or list(of_workload.values())
    higher_is_better = ("reference_over_ours", "cached_epoch_speedup", "trl_over_ours", "ours_of_peak")
    lower_is_better = (
        *("ours_over_teacher_forward", "ours_over_floor", "memory_ours_over_reference"),
        *("loss_difference", "gradient_difference"),
    )
    worse = dict.fromkeys(higher_is_better, min) | dict.fromkeys(lower_is_better, max)
    return {key: pick(cell[key] for cell in mid) for key, pick in worse.items() if all(key in cell for cell in mid)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=list(CONFIGS), default=list(CONFIGS), help="default: both")
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="default: all")
    parser.add_argument("--micro-batch", nargs="+", type=int, choices=range(1, 5), default=[1, 4], help="default: 1 4")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds; default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores, %(default)s here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="stored", help="show what --json wrote, run nothing")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="put the short table into this page")
    options = parser.parse_args(arguments)
    figures = json.loads(options.stored.read_text()) if options.stored else measure_all(options)
    cells, about = cells_asked_for(figures["cells"], options), figures["about"]
    print(table(cells))
    where = "{date}, {processor}, {threads} threads, torch {torch}".format(**about)
    print(f"\n{where}, peak {about['peak_gflop_per_second']:.0f} GFLOP/s (float32 matrix product)")
    if options.into:
        write_block(options.into, "speed", f"{speed_table(cells)}\n\n{where}.")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of every cell that the options name, as `--json` writes them."""
    torch.set_num_threads(options.threads)
    if not trl_step.available():
        print(f"skipped: TRL {trl_step.VERSION} is not installed here. For its row, run this in an environment made by")
        print(f"    {trl_step.SET_UP}")
    peak = peak_gflop_per_second()
    cells: dict[str, dict[str, Any]] = {}
    for model_name in options.model:
        model = build(CONFIGS[model_name]())
        trl_trainer = None
        if trl_step.available():
            teacher = copy.deepcopy(model)
            teacher.config.text_config.swiftkv = False
            trl_trainer = trl_step.trainer(model, teacher, presets.llava_next_processor(model.config), TEMPERATURE)
        for workload in options.workload:
            for size in options.micro_batch:
                name = f"{model_name}, {workload}, {size}"
                print(f"{name} ...", file=sys.stderr, flush=True)
                cells[name] = measure(model, micro_batch(model.config, workload, size), options.repeats, trl_trainer)
                peak = max(peak, peak_gflop_per_second(repeats=3))
    for cell in cells.values():
        cell["ours_of_peak"] = cell["gflop_per_second"]["ours"] / peak
    about = {
        "date": str(date.today()),
        "processor": platform.processor() or platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
        "peak_gflop_per_second": peak,
    }
    return {workload: worst_of(cells, workload) for workload in options.workload} | {"cells": cells, "about": about}


def cells_asked_for(cells: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    names = [f"{m}, {w}, {size}" for m in options.model for w in options.workload for size in options.micro_batch]
    return {name: cells[name] for name in names if name in cells}


if __name__ == "__main__":
    sys.exit(main())
