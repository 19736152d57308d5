"""The command `python -m vlskv_ray.doctor`: whether a run would start here, and what is in its way if not."""

import argparse
import sys
from collections.abc import Sequence

from vlskv_ray.command import exit_status
from vlskv_ray.launch.diagnosis import examine_all


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 if there is a problem, 2 for wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m vlskv_ray.doctor",
        description="Tells whether a run would start here: this machine, versions, Ray, and each node of the cluster.",
        epilog="With a config, any option of it can be given as section.key=value, and model and data are looked at.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="the run, as YAML")
    options, overrides = parser.parse_known_args(arguments)
    if overrides and options.config is None:
        parser.error(f"{overrides[0]}: only a config has options that can be given; add --config FILE")
    return exit_status(lambda: examine_all(options.config, overrides))


if __name__ == "__main__":
    sys.exit(main())
