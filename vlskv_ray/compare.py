"""The command `vlskv-ray compare`: the figures of finished runs as Markdown, also straight into a page."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlskv_ray.command import DONE, command_parser, exit_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    return exit_status(lambda: compare(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = command_parser("compare", "Shows the figures of finished runs side by side, as a Markdown table.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--result", action="store_true", help="what each run said at its end instead")
    instead.add_argument("--summary", action="store_true", help="the main rows of each run's result instead")
    parser.add_argument("--into", metavar="FILE", help="write it into this page instead of printing it")
    parser.add_argument(
        "--block",
        default="figures",
        metavar="NAME",
        help="between its lines <!-- NAME: begin --> and <!-- NAME: end --> (default %(default)s)",
    )
    return parser.parse_args(arguments)


def compare(options: argparse.Namespace) -> int:
    """Shows or writes what was asked for. ValueError for what the user can mend."""
    from vlskv_ray.report.comparison import closing_texts, comparison, finished, summaries
    from vlskv_ray.report.markdown import write_block

    runs = [finished(Path(folder)) for folder in options.runs]
    show = closing_texts if options.result else summaries if options.summary else comparison
    text = show(runs)
    if options.into:
        write_block(Path(options.into), options.block, text)
    else:
        print(text)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
