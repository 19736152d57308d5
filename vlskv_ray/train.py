"""The command `python -m vlskv_ray.train`: config -> checks -> Ray -> TorchTrainer -> summary."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from vlskv_ray.command import DONE, FAILED, exit_status, print_error, run_parser
from vlskv_ray.config import dump_config, load_config_and_notices
from vlskv_ray.errors import StoppedRun
from vlskv_ray.launch.caches import check_cache
from vlskv_ray.launch.driver import train
from vlskv_ray.launch.dry_run import dry_run
from vlskv_ray.launch.prepare import prepare


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options, overrides = parse(arguments)
    return exit_status(lambda: run_command(options, overrides))


def run_command(options: argparse.Namespace, overrides: list[str]) -> int:
    """Does what the options say. ValueError for what the user can mend."""
    config, notices = load_config_and_notices(options.config, overrides)
    if options.print_config:
        print(dump_config(config), end="")
        return DONE
    if config.output.level in ("debug", "info"):
        print("\n".join(notices), end="\n" if notices else "")
    if not options.dry_run:
        return train(config, num_samples=options.num_samples, resume=options.resume)
    try:
        run, loader = prepare(config, num_samples=options.num_samples)
        if run.cache is not None:
            check_cache(run, loader)
        dry_run(run, replace(loader, cache=None))
    except StoppedRun as error:
        print_error(f"error: {error}")
        return FAILED
    return DONE


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of the command, and what is left: overrides of the config."""
    parser = run_parser("train", "Distils a LLaVA-style vision-language model into its SwiftKV form.")
    parser.add_argument("--dry-run", action="store_true", help="check everything up to one step of one micro-batch")
    parser.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="auto: go on from the newest checkpoint if there is one; never: start anew, an older run of this name is "
        "moved aside; must: fail where there is nothing to go on from",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and end")
    return parser.parse_known_args(arguments)


# ------------------------------------------------------------------------------------------------------------ the run


if __name__ == "__main__":
    sys.exit(main())
