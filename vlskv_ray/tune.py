"""The command `vlskv-ray tune`: trials over a space of options on Ray Tune, and the frontier they draw.

Each trial is a run like any other, by the driver function of `vlskv_ray.train`, in a folder named by its values. That
is all that a sweep is resumed from: trials that have come to their end are not made again, others go on from their
checkpoints; Ray's own records are thrown away.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from vlskv_ray.command import DONE, exit_status, print_info, run_parser
from vlskv_ray.config import Config, dump_config, load_config_and_notices
from vlskv_ray.config.sweep import check_sweep
from vlskv_ray.files import write_text
from vlskv_ray.storage.run_folder import move_aside, run_folder
from vlskv_ray.storage.run_lock import own_run_folder
from vlskv_ray.words import plural, short_path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options, overrides = parse(arguments)
    return exit_status(lambda: run_command(options, overrides))


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of the command, and what is left: overrides of the config."""
    parser = run_parser("tune", "Tries settings (tune.space of the config), and says which to take.")
    parser.add_argument("--dry-run", action="store_true", help="list the trials and end")
    parser.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="auto: go on with an interrupted sweep of this name if there is one; never: start anew, an older one is "
        "moved aside; must: fail where there is nothing to go on with",
    )
    return parser.parse_known_args(arguments)


def run_command(options: argparse.Namespace, overrides: list[str]) -> int:
    """Does what the options say. ValueError for what the user can mend."""
    config, notices = load_config_and_notices(options.config, overrides)
    if notices:
        print_info(config, "\n".join(notices))
    check_sweep(config)
    return tune(config, options, overrides)


def tune(config: Config, options: argparse.Namespace, overrides: list[str]) -> int:
    """A whole sweep, or the list of its trials; the exit status. ValueError for what the user can mend."""
    from vlskv_ray.sweep.run_sweep import run_sweep, train_command
    from vlskv_ray.sweep.space import possible_trials
    from vlskv_ray.sweep.sweep import Sweep, settle_dtype

    trials, impossible = possible_trials(config, options.config, overrides)
    folder = run_folder(config)
    is_drawn = config.tune.search == "optuna"
    count = f"up to {plural(config.tune.draws, 'trial')}" if is_drawn else plural(len(trials), "trial")
    print_info(config, f"sweep         {count} over {', '.join(config.tune.space)}, into {short_path(folder)}")
    for name, reason in impossible.items():
        print_info(config, f"left out      {name}: {reason}")
    if options.dry_run:
        print("\n".join(trial.name for trial in trials) or "optuna draws them as trials end")
        return DONE
    if options.resume == "never" and folder.exists():
        print_info(config, f"moved the older sweep to {short_path(move_aside(folder))}")
    if options.resume == "must" and not (folder / "trials").exists():
        raise ValueError(f"{folder}: --resume must was given, but there is no sweep to go on with")
    with own_run_folder(folder):
        if (folder / "metrics.jsonl").exists():
            raise ValueError(f"{folder}: holds a run, which a sweep does not touch; use another output.name")
        config = settle_dtype(config, folder / "config.yaml")
        write_text(folder / "config.yaml", dump_config(config))
        sweep = Sweep(folder, config.tune.metric, options.num_samples, working_dir=os.getcwd())
        sweep.trials.mkdir(exist_ok=True)
        sweep.stop_file.unlink(missing_ok=True)
        return run_sweep(config, sweep, trials, lambda trial: train_command(options, overrides, config, trial))


if __name__ == "__main__":
    sys.exit(main())
