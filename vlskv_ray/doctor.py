"""The command `vlskv-ray doctor`: whether a run would start here, and what is in its way if not."""

import argparse
import sys
from collections.abc import Sequence

from vlskv_ray.command import command_parser, exit_status
from vlskv_ray.config import load_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 if there is a problem, 2 for wrong input."""
    options, overrides = parse(arguments)
    return exit_status(lambda: run_command(options, overrides))


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of the command, and what is left: overrides of the config."""
    parser = command_parser(
        "doctor",
        "Tells whether a run would start here: this machine, versions, Ray, and each node of the cluster.",
        "With a config, any option of it can be given as section.key=value, and model and data are looked at.",
    )
    parser.add_argument("--config", metavar="FILE", help="the run, as YAML")
    options, overrides = parser.parse_known_args(arguments)
    if overrides and options.config is None:
        parser.error(f"{overrides[0]}: only a config has options that can be given; add --config FILE")
    return options, overrides


def run_command(options: argparse.Namespace, overrides: list[str]) -> int:
    """Does what the options say. ValueError for a config with which no run would come to its workers."""
    config = load_config(options.config, overrides) if options.config else None

    from vlskv_ray.launch.diagnosis import examine_all

    return examine_all(config)


if __name__ == "__main__":
    sys.exit(main())
