"""What limits a run as models and clusters grow: `python -m benchmarks.scaling --help`.

computed   from the shapes of three models, for 1 to 512 workers: weights, memory, traffic, checkpoints, seconds
exchange   gloo between processes of this machine: seconds, and whether it sends what was computed
hand-over  micro-batches that Ray deals in a second, and its pauses (benchmarks/hand_over.py)
plan       100 million samples dealt to 512 workers (benchmarks/deal.py)
data       what a data worker spends on a sample

The tables go between the marks of a page (`--into docs/scaling.md`): those that are computed each time, those that are
measured where `--measure` names them.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import deal
from benchmarks.arithmetic import (
    GIGABITS,
    MODELS,
    WORKERS,
    Needs,
    all_reduce_bytes,
    in_plan_order_bytes,
    in_plan_order_seconds,
    needs_of,
    seconds_on,
)
from benchmarks.exchange import exchange
from benchmarks.hand_over import hand_over, private_cluster, seconds_to_tell
from benchmarks.workloads import Conversation, conversation_of, encoded, sample_of
from vlskv_ray.command import exit_status
from vlskv_ray.data.collate import collate, to_row
from vlskv_ray.data.json_files import open_json
from vlskv_ray.data.pipeline import ROWS_PER_EXECUTION, ROWS_PER_TASK
from vlskv_ray.model import presets
from vlskv_ray.report.markdown import markdown_table, write_block
from vlskv_ray.words import format_bytes

PREFETCHED = 2
"""Micro-batches that a worker asks for ahead, see `ray_batches`."""
MILLION = 10**6
DAY = 24 * 3600.0


@dataclass(frozen=True)
class Assumed:
    """What no shape tells."""

    gigaflops: float
    """A second that a worker sustains."""
    samples: int
    """Of a worker in a step, one a micro-batch: `gradient_accumulation_steps`."""

    def seconds(self, flops: float) -> float:
        return flops / (1e9 * self.gigaflops)


# ------------------------------------------------------------------------------------------------------------ computed
def models(assumed: Assumed) -> str:
    """What one worker, one sample and one checkpoint take, by model."""
    needs = {name: needs_of(name) for name in MODELS}

    def work(flops: int) -> str:
        return f"{flops / 1e12:,.3g} TFLOP, {span(assumed.seconds(flops))}"

    def row(label: str, text: Callable[[Needs], str]) -> tuple[str, list[str]]:
        return label, [text(of) for of in needs.values()]

    rows = [
        row("weights", lambda of: f"{of.frozen + of.trained:,}"),
        row("trained, at N = half and groups of one", lambda of: f"{of.trained:,}"),
        row("a step on the sample", lambda of: work(of.flops)),
        row("the same from the teacher cache", lambda of: work(of.cached_flops)),
        row("a million samples, in days of one worker", lambda of: f"{assumed.seconds(of.flops) * MILLION / DAY:,.0f}"),
        row("frozen weights, bfloat16 or float32", lambda of: f"{amount(2 * of.frozen)}, {amount(4 * of.frozen)}"),
        row(
            "trained ones or gradients; moments",
            lambda of: f"{amount(of.gradient_bytes)}; {amount(2 * of.gradient_bytes)}",
        ),
        row("a checkpoint; the copy while it is saved", lambda of: amount(of.checkpoint_bytes)),
        row("a worker, frozen weights in bfloat16", lambda of: amount(of.worker_bytes(2, saving=False))),
        row("the first worker, while it saves", lambda of: amount(of.worker_bytes(2, saving=True))),
        row("the sample in the teacher cache, float32", lambda of: amount(of.teacher_cache_bytes())),
        row(
            "a worker reads from it a second",
            lambda of: amount(of.teacher_cache_bytes() / assumed.seconds(of.cached_flops)),
        ),
    ]
    return markdown_table(list(needs), rows)


def network(assumed: Assumed) -> str:
    """What the workers exchange in a step and how long that takes, by model and workers."""
    head = ["computing", "a worker sends", *(f"at {gigabits} Gbit/s" for gigabits in GIGABITS)]
    head += ["share of a step at 10", "bit_identical: a worker receives", "at 10 Gbit/s"]
    rows = []
    for name, workers in itertools.product(MODELS, WORKERS[1:]):  # one worker sends nothing
        of = needs_of(name)
        computing = assumed.samples * assumed.seconds(of.flops)
        sent = all_reduce_bytes(of.gradient_bytes, workers)
        share = seconds_on(sent, 10) / (computing + seconds_on(sent, 10))
        texts = [span(computing), amount(sent), *(span(seconds_on(sent, gigabits)) for gigabits in GIGABITS)]
        texts += [f"{share:.1%}", amount(in_plan_order_bytes(of.gradient_bytes, workers, assumed.samples))]
        texts.append(span(in_plan_order_seconds(of.gradient_bytes, workers, assumed.samples, 10)))
        rows.append((f"{name}, {workers}", texts))
    return markdown_table(head, rows, corner="model, workers")


def sizes(assumed: Assumed) -> str:
    """What is kept of very many samples, wherever they are: sentences."""
    json_row = bytes_of_json_row()
    texts = []
    for count in (MILLION, 100 * MILLION):
        lengths, index, counts = (amount(of_a_row * count) for of_a_row in (2, json_row, 4 + 8))
        texts.append(
            f"{count:,} samples: {lengths} of lengths; from JSON files {index} in each data worker, "
            f"else {counts} in the command."
        )
    return "\n".join(texts)


def bytes_of_json_row() -> int:
    """What the index of JSON files keeps of a row."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "data.jsonl"
        path.write_text(
            json.dumps({"messages": conversation_of(Conversation(4, 4), np.random.default_rng(0))[0]}) + "\n"
        )
        return int(open_json("data", 1.0, [path], ["jsonl"], None, None).index.itemsize)


# ------------------------------------------------------------------------------------------------------------ measured
def measure_exchange(options: argparse.Namespace) -> Any:
    return [exchange(count, mebibytes, options.repeats) for count in (2, 4) for mebibytes in options.mebibytes]


def exchange_table(figures: Any, on: str, assumed: Assumed) -> str:
    head = [
        "all-reduce",
        "bytes a second",
        "sent over computed",
        "bit_identical, a micro-batch of each",
        "sent over computed",
    ]
    rows = []
    for of in figures:
        rate = all_reduce_bytes(of["mebibytes"] * 2**20, of["processes"]) / of["seconds"]
        texts = [span(of["seconds"]), f"{rate / 1e9:.2f} GB", f"{of['bytes_over_computed']:.3f}"]
        texts += [span(of["in_plan_order_seconds"]), f"{of['in_plan_order_bytes_over_computed']:.3f}"]
        rows.append((f"{of['processes']}, {of['mebibytes']} MiB", texts))
    return markdown_table(head, rows, corner=f"processes, gradient; {on}")


def measure_hand_over(options: argparse.Namespace) -> Any:
    with tempfile.TemporaryDirectory() as name:
        results = []
        for consumers in options.consumers:
            print(f"consumers: {consumers} ...", file=sys.stderr, flush=True)
            with private_cluster(2):
                results.append(hand_over(consumers, options.rows, options.executions, Path(name)))
        with private_cluster(2):
            seconds = [seconds_to_tell(Path(name)) for _ in range(options.repeats)]
    return {"by_consumers": results, "seconds_to_tell": median(seconds)}


def hand_over_table(figures: Any, on: str, assumed: Assumed) -> str:
    head = [
        "micro-batches a second",
        "of the coordinator's CPU, for each",
        "to the first",
        "pause between parts",
        "in turn",
    ]
    rows = []
    for of in figures["by_consumers"]:
        texts = [f"{median(of['rows_per_second']):.0f}", span(of["coordinator_seconds"]), span(of["first_seconds"])]
        texts += [span(median(of["pause_seconds"])), "yes" if of["in_turn"] else "NO"]
        rows.append((str(of["consumers"]), texts))
    measured = markdown_table(head, rows, corner=f"consumers; {on}")
    measured += f"\n\nTelling Ray of the {ROWS_PER_EXECUTION:,} rows of a part: {span(figures['seconds_to_tell'])}.\n\n"
    return measured + wanted_table(limits_of(figures), assumed)


def limits_of(figures: Any) -> tuple[float, float]:
    """Micro-batches a second that can be relied on, and that could be had at best: the fewest that were handed over, by
    whatever number of consumers, and what a coordinator gets through that has a core to itself and nothing to wait for.
    """
    measured = figures["by_consumers"]
    return (
        min(median(of["rows_per_second"]) for of in measured),
        1 / max(of["coordinator_seconds"] for of in measured),
    )


def wanted_table(limits: Sequence[float], assumed: Assumed) -> str:
    """Computed: the micro-batches of one sample that workers get through, and how large they have to be."""
    rows = []
    for name in MODELS:
        of, texts = needs_of(name), list[str]()
        for flops in (of.flops, of.cached_flops):
            rates = [workers / assumed.seconds(flops) for workers in WORKERS[-2:]]
            least = [f"{max(1, -(-rates[-1] // limit)):.0f}" for limit in limits]
            texts += [", ".join(f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}" for rate in rates), ", ".join(least)]
        rows.append((name, texts))
    ways = f"micro_batch_size for {WORKERS[-1]}, at " + " and ".join(f"{limit:.0f} a second" for limit in limits)
    head = [f"a second, {WORKERS[-2]} and {WORKERS[-1]} workers", ways, "from the teacher cache", ways]
    return markdown_table(head, rows, corner="micro-batches of one sample (computed)")


def measure_plan(options: argparse.Namespace) -> Any:
    with tempfile.TemporaryDirectory() as name:
        return deal.measure(Path(name), options.samples, max(WORKERS), options.random_steps, options.repeats)


def plan_table(of: Any, on: str, assumed: Assumed) -> str:
    epoch, exactly = of["epoch"], of["epoch"]["dealt"] == of["epoch"]["different"] == of["rows"]
    rows = [
        ("any step by itself, median and 99th percentile", ", ".join(map(span, of["step_seconds"]))),
        ("the same in seconds of a CPU", ", ".join(map(span, of["step_cpu_seconds"]))),
        ("growth of a new process, its lengths in the file apart", amount(of["resident_bytes"])),
        ("most that Python and NumPy hold at once", amount(of["peak_bytes"])),
        ("the plan as it travels; the file", f"{of['pickled_bytes']:,} bytes; {amount(of['file_bytes'])}"),
        (f"an epoch of {of['steps_per_epoch']:,} steps, all dealt", span(of["epoch_seconds"])),
        (
            "samples dealt, different ones: each once",
            f"{epoch['dealt']:,}, {epoch['different']:,}: {'yes' if exactly else 'NO'}",
        ),
        ("samples of the workers with most, with fewest", f"{epoch['most']:,}, {epoch['least']:,}"),
        (
            "gone on at 100 random steps, by as many or half as many",
            "the same" if of["same_after_resume"] else "NOT the same",
        ),
    ]
    what = f"{of['rows']:,} samples, {of['workers']} workers, {of['micro_batch_size']} samples a micro-batch; {on}"
    return markdown_table([""], [(label, [text]) for label, text in rows], corner=what)


def measure_data(options: argparse.Namespace) -> Any:
    torch.set_num_threads(1)
    return {name: seconds_of_data(name, 3 * options.repeats) for name in MODELS}


def seconds_of_data(name: str, repeats: int) -> float:
    """Of a CPU, that a data worker spends on the sample: decoding, tiles, tokens, collation, the row made of them."""
    config = MODELS[name]()
    sample, processor = sample_of("image_chat", 0), presets.llava_next_processor(config)
    seconds = []
    for attempt in range(repeats + 1):
        began = time.process_time()
        to_row(collate([encoded(sample, processor, config)], 0))
        if attempt:  # the first one warms up
            seconds.append(time.process_time() - began)
    return median(seconds)


def data_table(figures: Any, on: str, assumed: Assumed) -> str:
    rows = []
    most = max(WORKERS)
    for name, seconds in figures.items():
        of = needs_of(name)
        share = seconds / assumed.seconds(of.flops)
        in_flight = (PREFETCHED + ROWS_PER_TASK) * of.row_bytes
        rows.append(
            (name, [span(seconds), f"{share:.4f}", f"{most * share:.1f}", amount(of.row_bytes), amount(in_flight)])
        )
    head = [
        "of a CPU, a sample (measured)",
        "CPUs for a worker",
        f"for {most} workers",
        "a row",
        "rows on their way, a worker",
    ]
    return markdown_table(head, rows, corner=f"model; {on}")


MEASURES: dict[str, tuple[Callable[[argparse.Namespace], Any], Callable[[Any, str, Assumed], str]]] = {
    "exchange": (measure_exchange, exchange_table),
    "hand-over": (measure_hand_over, hand_over_table),
    "plan": (measure_plan, plan_table),
    "data": (measure_data, data_table),
}
COMPUTED: dict[str, Callable[[Assumed], str]] = {"models": models, "network": network, "sizes": sizes}


# ------------------------------------------------------------------------------------------------------------- numbers
UNITS = ((2 * DAY, DAY, "d"), (7200.0, 3600.0, "h"), (120.0, 60.0, "min"), (1.0, 1.0, "s"), (1e-3, 1e-3, "ms"))
"""From how many seconds on a unit is used, and how long it is."""


def span(seconds: float) -> str:
    """Three digits, in the unit that suits."""
    if seconds == 0:
        return "0"
    length, unit = next(((length, unit) for least, length, unit in UNITS if seconds >= least), (1e-6, "µs"))
    value = seconds / length
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def amount(count: float) -> str:
    """Bytes, in the unit that suits."""
    if count >= 2**40:
        return f"{count / 2**40:,.1f} TiB"
    return format_bytes(count) if count else "0"


def measured_on() -> str:
    return f"measured {date.today()}, {os.cpu_count()} cores"


# --------------------------------------------------------------------------------------------------------- the command
def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", nargs="*", choices=list(MEASURES), help="what to measure; all where none is named")
    parser.add_argument(
        "--gflops", type=float, default=2000, help="GFLOP/s that a worker sustains; default %(default)s"
    )
    parser.add_argument(
        "--accumulation", type=int, default=4, help="samples of a worker in a step; default %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=7, help="default %(default)s")
    parser.add_argument("--mebibytes", type=int, nargs="+", default=[16, 256], help="gradients to exchange")
    parser.add_argument("--consumers", type=int, nargs="+", default=[1, 2, 4, 16, 64], help="divisors of 64")
    parser.add_argument("--rows", type=int, default=512, help="of a part that is handed over; default %(default)s")
    parser.add_argument("--executions", type=int, default=3, help="parts that are handed over; default %(default)s")
    parser.add_argument("--samples", type=int, default=100 * MILLION, help="of the plan; default %(default)s")
    parser.add_argument("--random-steps", type=int, default=2000, help="of the plan; default %(default)s")
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="write the tables into this page, not only print them"
    )
    parser.add_argument("--measured", type=Path, metavar="FILE", help="show what was measured before, see --json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all that was measured")
    return parser.parse_args(arguments)


def run_command(options: argparse.Namespace) -> int:
    """ValueError for what the user can mend."""
    assumed = Assumed(options.gflops, options.accumulation)
    blocks = {name: text(assumed) for name, text in COMPUTED.items()}
    measured = json.loads(options.measured.read_text()) if options.measured else {}
    wanted = [] if options.measure is None else options.measure or list(MEASURES)
    for name in wanted:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        measured[name] = {"figures": MEASURES[name][0](options), "on": measured_on()}
    for name, of in measured.items():
        blocks[name] = MEASURES[name][1](of["figures"], of["on"], assumed)
    for name, text in blocks.items():
        print(f"{name}\n\n{text}\n")
        if options.into:
            write_block(options.into, name, text)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=2) + "\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: run_command(options))


if __name__ == "__main__":
    sys.exit(main())
