"""The command `vlskv-ray answers`: a teacher answers prompts, whose answers are then learnt from."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vlskv_ray.command import (
    DONE,
    add_data_options,
    check_data_options,
    command_parser,
    exit_status,
    number_up_to,
    sources_of_data,
)

COLDEST = 0.001
"""Temperature at which logits are still numbers when they are divided by it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    return exit_status(lambda: answer(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = command_parser(
        "answers",
        "Has a teacher answer prompts, rows that end with a question, and writes rows to distil on. Stopped or killed, "
        "the same command goes on.",
    )
    parser.add_argument(
        "--model", required=True, help="the teacher: a folder, a hub id or a shipped model's name; a student's too"
    )
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="SOURCE",
        help="a file, a pattern, a hub data set or `shapes`; may be repeated",
    )
    parser.add_argument("--split", help="of a named data set (default train)")
    add_data_options(parser)
    parser.add_argument("--num-samples", type=number_up_to(10**9), metavar="N", help="the first N rows (default: all)")
    parser.add_argument("--output", required=True, metavar="FILE", help="the rows with their answers, as .jsonl")
    parser.add_argument("--replace", action="store_true", help="answer rows anew that end with an answer already")
    parser.add_argument("--system", metavar="TEXT", help="a system turn for prompts that have none")
    parser.add_argument("--anew", action="store_true", help="answer all of it again, whatever is there of the output")
    add_sampling_options(parser)
    count = number_up_to(10**6)
    parser.add_argument(
        "--batch-size", type=count, default=16, metavar="N", help="prompts at once (default %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=number_up_to(10**5, 0),
        metavar="N",
        help="processes on Ray (default: one a CPU, as far as memory lasts); 0: this process, without Ray",
    )
    parser.add_argument(
        "--threads", type=number_up_to(4096), metavar="N", help="of each process (default: the CPUs shared out)"
    )
    options = parser.parse_args(arguments)
    check_data_options(parser, options, default=())
    if not options.temperature and (options.top_k or options.top_p < 1):
        parser.error("--top-p and --top-k go with a --temperature above 0; without one the likeliest token is taken")
    if 0 < options.temperature < COLDEST:
        parser.error(f"--temperature: wanted 0, for the likeliest token, or {COLDEST:g} at least")
    if not options.output.endswith(".jsonl"):
        parser.error(f"--output: wanted a name that ends in .jsonl, got {options.output!r}")
    return options


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How an answer is chosen."""
    parser.add_argument(
        "--max-new-tokens",
        type=number_up_to(2**20),
        default=256,
        metavar="N",
        help="where an answer is cut at the latest, if not by the model's positions (default %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=real_number(0, 100),
        default=0.0,
        metavar="T",
        help="of the distribution that tokens are drawn from; 0, the default, takes the likeliest",
    )
    parser.add_argument(
        "--top-p",
        type=real_number(1e-6, 1),
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that come to P together (default 1: all)",
    )
    parser.add_argument(
        "--top-k", type=number_up_to(2**31), metavar="K", help="draw from the K likeliest tokens (default: all)"
    )
    parser.add_argument(
        "--seed", type=number_up_to(2**63 - 1, 0), default=0, metavar="N", help="of what is drawn (default %(default)s)"
    )


def real_number(smallest: float, largest: float) -> Callable[[str], float]:
    """Reads a number within bounds, for argparse."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not smallest <= value <= largest:
            raise argparse.ArgumentTypeError(f"wanted a number from {smallest:g} to {largest:g}, got {text!r}")
        return value

    return number


def answer(options: argparse.Namespace) -> int:
    """Answers the prompts. ValueError for what the user can mend."""
    from dataclasses import replace

    from vlskv_ray.evaluation.answers import Sampling
    from vlskv_ray.launch.answer_prompts import answer_prompts, find_teacher, open_prompts
    from vlskv_ray.launch.answer_workers import Job

    output = checked_output(options)  # first: what takes long must not end in a file that cannot be written
    specs = sources_of_data(options.data, options, split="train")
    prompts = open_prompts(specs, output, options.num_samples)
    prompts = replace(prompts, replace=options.replace, system=options.system)
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.seed)
    job = Job(find_teacher(options.model), prompts, sampling, options.batch_size)
    answer_prompts(
        job,
        output,
        workers=options.workers,
        threads=options.threads,
        on_refused=options.on_refused,
        anew=options.anew,
    )
    return DONE


def checked_output(options: argparse.Namespace) -> Path:
    """The file for the rows. ValueError where there can be no such file."""
    output = Path(options.output)
    folder = output.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        problem = "nothing may be written into" if folder.is_dir() else "there is no folder"
        raise ValueError(f"--output: {problem} {folder}; wanted a file in a folder that can be written to")
    if output.exists() and not output.is_file():
        raise ValueError(f"--output: {output} is no regular file; wanted a file")
    return output


if __name__ == "__main__":
    sys.exit(main())
