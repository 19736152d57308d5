"""The command `vlskv-ray train`: config -> checks -> Ray -> TorchTrainer -> summary."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vlskv_ray.command import DONE, exit_status, print_info, run_parser
from vlskv_ray.config import Config, dump_config, load_config_and_notices


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options, overrides = parse(arguments)
    return exit_status(lambda: run_command(options, overrides))


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


def run_command(options: argparse.Namespace, overrides: list[str]) -> int:
    """Does what the options say. ValueError for what the user can mend."""
    config, notices = load_config_and_notices(options.config, overrides)
    if options.print_config:
        print(dump_config(config), end="")
        return DONE
    if notices:
        print_info(config, "\n".join(notices))
    if options.dry_run:
        return try_out(config, options.num_samples)
    return train(config, num_samples=options.num_samples, resume=options.resume)


def train(
    config: Config,
    *,
    num_samples: int | None = None,
    resume: str = "auto",
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
) -> int:
    """A whole run, from config to `final/` and summary.json.

    Args:
        config: of the run.
        num_samples: use only the first so many samples of the mixture.
        resume: "auto", "never" or "must", as on the command line.
        on_metrics: told every line of metrics.jsonl, in the calling thread; what it raises ends the run.

    Returns:
        the exit status of the command.

    Raises:
        ValueError: for what the user can mend.
    """
    from vlskv_ray.launch import driver

    return driver.train(config, num_samples=num_samples, resume=resume, on_metrics=on_metrics)


def try_out(config: Config, num_samples: int | None) -> int:
    """Checks everything up to one step, and says what it takes. ValueError for what the user can mend."""
    from vlskv_ray.launch.cache_room import check_cache
    from vlskv_ray.launch.dry_run import dry_run
    from vlskv_ray.launch.prepare import prepare

    run, loader = prepare(config, num_samples=num_samples)
    if run.cache is not None:
        check_cache(run, loader)
    dry_run(run, replace(loader, cache=None))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
