"""The command `vlskv-ray fit`: a student fitted to its teacher in closed form, exported and measured, without training.

It is the run of the same config with no steps, in a folder of its own. A run that trains finds the fit there is.
"""

import argparse
import sys
from collections.abc import Sequence

from vlskv_ray.command import exit_status, print_info, run_parser
from vlskv_ray.config import Config, changed, load_config_and_notices


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options, overrides = parse(arguments)
    return exit_status(lambda: run_command(options, overrides))


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of the command, and what is left: overrides of the config."""
    what = (
        "Makes the student of a config by one pass of its teacher and a closed solution, without training: fitted, "
        "exported, measured. Its run is named like the config's, with -fit at the end."
    )
    parser = run_parser("fit", what)
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto: go on from what a killed command left; never: start anew, an older run of this name is moved aside",
    )
    return parser.parse_known_args(arguments)


def run_command(options: argparse.Namespace, overrides: list[str]) -> int:
    """Does what the options say. ValueError for what the user can mend."""
    config, notices = load_config_and_notices(options.config, overrides)
    if notices:
        print_info(config, "\n".join(notices))
    return fit(config, num_samples=options.num_samples, resume=options.resume)


def fit(config: Config, *, num_samples: int | None = None, resume: str = "auto") -> int:
    """A whole run without steps, from config to `final/` and summary.json.

    Args:
        config: of the run that would train.
        num_samples: use only the first so many samples of the mixture.
        resume: "auto" or "never", as on the command line.

    Returns:
        the exit status of the command.

    Raises:
        ValueError: for what the user can mend.
    """
    config = fit_config(config)

    from vlskv_ray.launch import driver

    return driver.train(config, num_samples=num_samples, resume=resume)


def fit_config(config: Config) -> Config:
    """The config of the run that only fits. ValueError where that is not what a config can ask for."""
    if config.objective != "distill":
        raise ValueError(f"objective: {config.objective} has no student that could be fitted; wanted distill")
    if config.model.start == "copy":
        raise ValueError("model.start: copy, where vlskv-ray fit fits; remove it")
    values = {"model.start": "fit", "model.teacher_cache": "off", "max_steps": 0}
    return changed(config, values | {"output.name": f"{config.output.name}-fit"})


if __name__ == "__main__":
    sys.exit(main())
