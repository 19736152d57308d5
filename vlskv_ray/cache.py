"""The command `vlskv-ray cache`: fills the teacher cache of a run ahead of it, on all CPUs."""

import argparse
import sys
from collections.abc import Sequence

from vlskv_ray.command import DONE, exit_status, number_up_to, run_parser
from vlskv_ray.config import Config, load_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options, overrides = parse(arguments)
    return exit_status(lambda: run_command(options, overrides))


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of the command, and what is left: overrides of the config."""
    what = "Fills the teacher cache of a run (model.teacher_cache=disk) ahead of it, on all CPUs."
    parser = run_parser("cache", what)
    parser.add_argument("--workers", type=number_up_to(10**5), metavar="N", help="processes; default: one a CPU")
    return parser.parse_known_args(arguments)


def run_command(options: argparse.Namespace, overrides: list[str]) -> int:
    """Does what the options say. ValueError for what the user can mend."""
    config = load_config(options.config, ["model.teacher_cache=disk", *overrides])
    if config.model.teacher_cache != "disk":
        raise ValueError(f"model.teacher_cache: {config.model.teacher_cache}; only one on disk outlives this command")
    return fill(config, options)


def fill(config: Config, options: argparse.Namespace) -> int:
    """Makes what is missing; returns the exit status. ValueError for what the user can mend."""
    from vlskv_ray.cluster.start import ray_cluster
    from vlskv_ray.launch.cache_room import check_cache
    from vlskv_ray.launch.fill_cache import SeveralCaches, fill_ahead
    from vlskv_ray.launch.prepare import prepare

    run, loader = prepare(config, num_samples=options.num_samples)
    assert run.cache is not None
    check_cache(run, loader)
    caches = SeveralCaches({run.config.model.num_key_value_layers or 0: run.cache})
    with ray_cluster(config.cluster.address, quiet=config.output.level != "debug") as cluster:
        fill_ahead(run, loader, caches, cluster, options.workers)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
