"""The command `vlskv-ray configs`: the configs that come with the package."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlskv_ray.command import DONE, command_parser, exit_status

FOLDER = Path(__file__).parent / "config" / "shipped"
"""In a checkout a link to `configs/`, in a wheel a folder with the same files."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    return exit_status(lambda: show(options.name))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = command_parser(
        "configs",
        "Lists the configs that come with the package, or prints one.",
        "To start from one: vlskv-ray configs quickstart > run.yaml; vlskv-ray train --config run.yaml",
    )
    parser.add_argument("name", nargs="?", help="the config to print")
    return parser.parse_args(arguments)


def show(name: str | None) -> int:
    """Prints one config, or the names of all with the first line of each. ValueError for a name that is none."""
    configs = {file.stem: file.read_text() for file in sorted(FOLDER.glob("*.yaml"))}
    if not configs:  # the link of a checkout was not copied with it
        raise ValueError(f"{FOLDER}: holds no configs; this copy of the package lacks them, install it by pip")
    if name is None:
        width = max(map(len, configs))
        for known, text in configs.items():
            print(f"{known:<{width}}  {text.splitlines()[0].removeprefix('# ')}")
    elif name in configs:
        print(configs[name], end="")
    else:
        raise ValueError(f"{name}: there is no such config; wanted one of {', '.join(configs)}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
