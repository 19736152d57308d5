"""The command `vlskv-ray`, also `python -m vlskv_ray`: lists the commands, or runs one of them."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from vlskv_ray import __version__
from vlskv_ray.command import DONE, exit_status

COMMANDS = {
    "train": "distils a model into its SwiftKV form, or trains a teacher",
    "fit": "makes a student in closed form, without training, and measures it",
    "tune": "tries settings on Ray Tune, and says which to take",
    "probe": "measures untrained students of every N and group size",
    "evaluate": "measures a student against its teacher on held-out samples",
    "answers": "has a teacher answer prompts, to distil on its answers",
    "generate": "asks a student, or its teacher, about a picture",
    "assemble": "makes a vision-language model of a text model and a vision tower",
    "compare": "shows finished runs side by side, as Markdown",
    "cache": "fills a teacher cache ahead of its run",
    "doctor": "tells whether a run would start here, and what is in its way",
    "configs": "lists the configs that come with the package, or prints one",
}
"""Modules of the package that hold a command, and what each does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that is named first; returns its exit status."""
    name, *options = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    return exit_status(lambda: run_command(name, options))


def run_command(name: str, options: Sequence[str]) -> int:
    """Does what is asked for. ValueError for a name that is none."""
    if name in COMMANDS:
        status: int = import_module(f"vlskv_ray.{name}").main(options)
        return status
    if name in ("-h", "--help"):
        print(usage(), flush=True)
    elif name == "--version":
        print(f"vlskv-ray {__version__}")
    else:
        meant = difflib.get_close_matches(name, COMMANDS, n=1)
        remedy = f", did you mean {meant[0]}?" if meant else f"; the commands are {', '.join(COMMANDS)}"
        raise ValueError(f"{name}: unknown command{remedy}")
    return DONE


def usage() -> str:
    """The commands with a line each."""
    lines = "\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())
    return f"usage: vlskv-ray COMMAND ...\n\n{lines}\n\n`vlskv-ray COMMAND --help` lists the options of a command."


if __name__ == "__main__":
    sys.exit(main())
