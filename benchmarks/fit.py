"""What the fit of a real student takes beside a forward of its teacher over the same tokens: time, operations, memory.

    python -m benchmarks.fit --model DIR --data ANSWERS.jsonl [--layers N ...] [--group G] [--json FILE]

One thread, in CPU time; the forward and the pass with sums in turn. The solve does not depend on how many tokens there
are: it is that of a whole fit.
"""

import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.real_step import cpu_seconds, micro_batch, parser_of, show
from vlskv_ray.data.collate import Batch
from vlskv_ray.model.build import build_student, find_model
from vlskv_ray.training.distill import frozen_states
from vlskv_ray.training.fit import FitSums, add_batch, choose, fit, fit_bytes
from vlskv_ray.training.profiling import flop_counter
from vlskv_ray.training.step import autocast


def measure(model: Any, batch: Batch, layers: int, repeats: int) -> dict[str, float]:
    """Medians of CPU time over the tokens of a batch, after one of each that warms up, and counted operations."""
    sums = FitSums.zeros(model)
    with torch.no_grad(), autocast(model):
        work = {
            "forward": lambda: frozen_states(model, batch, [layers]),
            "pass": lambda: add_batch(sums, model, batch),
        }
        gflop = {}
        for name, of_work in work.items():
            with flop_counter() as counter:
                of_work()
            gflop[name] = counter.get_total_flops() / 1e9
        rounds = [{name: cpu_seconds(of_work) for name, of_work in work.items()} for _ in range(repeats)]
        solve = cpu_seconds(lambda: fit(model, sums, choose(model, sums, sums)))
    forward, whole = (median(of_round[name] for of_round in rounds) for name in work)
    tokens = int(batch.attention_mask.sum())
    return {
        "forward alone, CPU ms a token": forward / tokens * 1e3,
        "pass with sums, CPU ms a token": whole / tokens * 1e3,
        "pass over forward, CPU time": median(of_round["pass"] / of_round["forward"] for of_round in rounds),
        "pass over forward, operations": gflop["pass"] / gflop["forward"],
        "solve and choice of ridges, CPU s": solve,
        "sums of a worker alone, MiB": fit_bytes(model, 1) / 2**20,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("fit", __doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[20], metavar="N", help="N; default: 20")
    parser.add_argument("--group", type=int, default=1, help="layers that share keys and values; default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    batch, figures = micro_batch(options.model, options.data, options.samples), {}
    for layers in options.layers:
        model = build_student(find_model(options.model), layers, options.group, dtype=getattr(torch, options.dtype))
        figures[f"N = {layers}"] = measure(model, batch, layers, options.repeats)
    show(figures, f"{int(batch.attention_mask.sum())} tokens, {options.dtype}", options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
