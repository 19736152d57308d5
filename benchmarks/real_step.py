"""A distillation step on a real model, in float32 and bfloat16, as a share of the peak of matrix products.

    python -m benchmarks.real_step --model DIR --data ANSWERS.jsonl [--layers N] [--json FILE]

One thread, in CPU time, so that others on the machine disturb little; the large matrix product that a step is compared
with is measured beside it in turn. For another commit: the same command in its checkout, with this file put there.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vlskv_ray.data.chat import Limits, encode
from vlskv_ray.data.collate import Batch, collate, supervised_positions
from vlskv_ray.data.sample import Sample
from vlskv_ray.model.build import build_student, find_model, load_config
from vlskv_ray.model.processor import load_processor
from vlskv_ray.report.markdown import markdown_table
from vlskv_ray.training.distill import DistillationLoss, shared_pass
from vlskv_ray.training.profiling import flop_counter
from vlskv_ray.training.step import GradientBuffer, autocast, train_step

DTYPES = ("float32", "bfloat16")
PEAK = 2048
"""Rows and columns of the matrices whose product is the peak."""


def micro_batch(model: str, data: Path, samples: int) -> Batch:
    """The first conversations of a file of messages, texts alone."""
    files, encoded = find_model(model), []
    config, processor = load_config(files), load_processor(files)
    with data.open() as lines:
        for number, line in zip(range(samples), lines, strict=False):
            messages = [
                {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]}
                for turn in json.loads(line)["messages"]
            ]
            limits = Limits(config.text_config.max_position_embeddings)
            encoded.append(encode(Sample(str(number), messages, []), processor, config, limits))
    return collate(encoded, pad_token_id=0)


def steps_of(model: Any, batch: Batch) -> dict[str, Callable[[], Any]]:
    """A step that runs teacher and trunk, and one from what a teacher cache holds; the weights stay as they are."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients, optimizer = GradientBuffer(trained), torch.optim.AdamW(trained, lr=0.0, fused=True)
    with torch.no_grad(), autocast(model):
        states = shared_pass(model, batch)
    known = replace(batch, trunk=states.trunk, teacher=states.teacher, teacher_input=states.teacher_input)
    loss = DistillationLoss()
    return {
        "cached": lambda: train_step(model, optimizer, gradients, [known], loss),
        "first pass": lambda: train_step(model, optimizer, gradients, [batch], loss),
    }


def cpu_seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(work: Callable[[], Any], dtype: torch.dtype, tokens: int, repeats: int) -> dict[str, float]:
    """Medians of a step and of the matrix product beside it, after one of each that warms up."""
    a, b = torch.randn(PEAK, PEAK).to(dtype), torch.randn(PEAK, PEAK).to(dtype)
    with flop_counter() as counter:
        work()
    gflop, rounds = counter.get_total_flops() / 1e9, []
    for _ in range(repeats + 1):
        peak = 2 * PEAK**3 / 1e9 / cpu_seconds(lambda: torch.nn.functional.linear(a, b))
        rounds.append((cpu_seconds(work), peak))
    seconds, peaks = zip(*rounds[1:], strict=True)
    return {
        "cpu_ms_per_token": median(seconds) / tokens * 1e3,
        "mflop_per_token": gflop / tokens * 1e3,
        "peak_gflop_per_second": median(peaks),
        "of_peak": median(gflop / s / p for s, p in zip(seconds, peaks, strict=True)),
    }


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options of what is measured on one micro-batch of a real model."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a teacher")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="its answers, as JSON lines")
    parser.add_argument("--samples", type=int, default=8, help="of the micro-batch; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    return parser


def show(figures: dict[str, dict[str, float]], corner: str, file: Path | None) -> None:
    """Prints figures, a column for each case, and writes all their digits into a file if one is given."""
    rows = [(key, [f"{of_case[key]:.3g}" for of_case in figures.values()]) for key in next(iter(figures.values()))]
    print(markdown_table(list(figures), rows, corner=corner))
    if file:
        file.write_text(json.dumps(figures, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("real_step", __doc__)
    parser.add_argument("--layers", type=int, default=20, metavar="N", help="N; default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    batch, figures = micro_batch(options.model, options.data, options.samples), {}
    tokens = int(supervised_positions(batch.labels).sum())
    for name in DTYPES:
        dtype = getattr(torch, name)
        model = build_student(find_model(options.model), options.layers, 1, dtype=dtype)
        for step, work in steps_of(model, batch).items():
            figures[f"{step}, {name}"] = measure(work, dtype, tokens, options.repeats)
    show(figures, f"N = {options.layers}, {tokens} supervised tokens", options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
