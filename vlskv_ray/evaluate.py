"""The command `vlskv-ray evaluate`: a student against its teacher, on held-out samples."""

import argparse
import sys
from collections.abc import Sequence

from vlskv_ray.command import (
    DONE,
    add_data_options,
    add_device_options,
    check_data_options,
    command_parser,
    exit_status,
    number_up_to,
)
from vlskv_ray.files import write_json
from vlskv_ray.words import short_path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    return exit_status(lambda: evaluate(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = command_parser(
        "evaluate", "Measures what a SwiftKV student kept of its teacher on held-out samples, and what it saves."
    )
    parser.add_argument("--model", required=True, help="a student: a folder such as RUN/final, or a hub id")
    parser.add_argument("--teacher", metavar="MODEL", help="another teacher than the student with SwiftKV off")
    parser.add_argument(
        "--data",
        action="append",
        metavar="SOURCE",
        help="a file, a pattern, a hub data set or `shapes`; may be repeated (default: the run's evaluation.sources, "
        "else shapes)",
    )
    parser.add_argument("--split", help="of a named data set (default test)")
    add_data_options(parser)
    parser.add_argument(
        "--num-samples",
        type=number_up_to(10**7),
        default=2000,
        metavar="N",
        help="the first N samples (default %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=number_up_to(10**6), default=32, metavar="N", help="samples at once (default %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=number_up_to(2**20), default=64, metavar="N", help="of an answer (default %(default)s)"
    )
    add_device_options(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where the figures go (default: evaluation.json of the run that the model lies in, whose report and model "
        "card are written anew; with --teacher and elsewhere, of the current folder)",
    )
    options = parser.parse_args(arguments)
    check_data_options(parser, options, default=["shapes"])
    return options


def evaluate(options: argparse.Namespace) -> int:
    """Measures, writes and shows. ValueError for what the user can mend."""
    import torch

    from vlskv_ray.report.finished import write_pages
    from vlskv_ray.report.remeasure import measure, num_samples_in, output_of
    from vlskv_ray.report.summary import evaluation_table

    if options.threads:
        torch.set_num_threads(options.threads)
    target, run = output_of(options)  # first: what takes long must not end in a file that cannot be written
    if run and (before := num_samples_in(target)) > options.num_samples:
        raise ValueError(
            f"--num-samples: {options.num_samples}, but {target}, which goes into the run's report and card, was "
            f"measured on {before}; ask for as many, or write another file with --output"
        )
    evaluation = measure(options)
    write_json(target, evaluation)
    print("\n".join(evaluation_table(evaluation)))
    written = [target]
    if run:
        written += write_pages(run)
    print(f"written: {', '.join(str(short_path(path)) for path in written)}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
