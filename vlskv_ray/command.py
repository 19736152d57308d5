"""What the commands share: exit statuses, errors on one line, their options, what they print."""

import argparse
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from vlskv_ray.config import Config, SourceConfig, source_from_text
from vlskv_ray.errors import StoppedRun
from vlskv_ray.words import printable_lines

DONE, FAILED, WRONG_INPUT = 0, 1, 2


def exit_status(command: Callable[[], int]) -> int:
    """Runs a command's work, which returns a status; an error that the user can do something about is one line.

    Where the work itself takes no signals, SIGTERM ends it as Ctrl-C does: what it has begun is taken down.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return command()
    except ValueError as error:  # each of ours names the option, key or file, what was wanted and the remedy
        print_error(str(error))
        return WRONG_INPUT
    except StoppedRun as error:  # what was asked for cannot be done, though nothing is wrong with how it was asked
        print_error(f"error: {error}")
        return FAILED
    except BrokenPipeError:  # whoever reads what is printed has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:  # a full disk, a folder that went away
        print_error(f"error: {error}")
        return WRONG_INPUT if error.errno == errno.ENAMETOOLONG else FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def command_parser(command: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser of a command's options, which are never abbreviated: an override of the config could look like one."""
    return argparse.ArgumentParser(
        prog=f"vlskv-ray {command}", description=description, epilog=epilog, allow_abbrev=False
    )


def run_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The options of a command that takes a run's config; what it does not know are overrides of the config."""
    parser = command_parser(
        command,
        description,
        "Any option of the config can be given as section.key=value, for instance cluster.num_workers=4.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run, as YAML")
    parser.add_argument(
        "--num-samples", type=number_up_to(10**9), metavar="N", help="use the first N samples of the mixture"
    )
    return parser


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that run a model by themselves."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (default: a GPU if there is one)")
    parser.add_argument(
        "--threads", type=number_up_to(4096), metavar="N", help="compute threads (default: PyTorch's own)"
    )


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """What goes with the option `--data` of commands that read data without a run's config, see `sources_of_data`."""
    parser.add_argument("--image-root", metavar="DIR", help="what image paths in files are relative to")
    parser.add_argument(
        "--on-refused",
        choices=("stop", "skip"),
        default="stop",
        help="what to do with a row that asks for a file outside the folder of images, or a URL (default %(default)s)",
    )


def check_data_options(parser: argparse.ArgumentParser, options: argparse.Namespace, default: Sequence[str]) -> None:
    """Ends the command where options of `--data` are given that do not go with it; `default` is what it stands for."""
    if options.image_root and not options.data:
        parser.error("--image-root goes with --data")
    if options.split and not any("name" in source_from_text(text) for text in options.data or default):
        parser.error("--split goes with a named data set of --data, files have none")


def sources_of_data(texts: Sequence[str], options: argparse.Namespace, split: str) -> list[SourceConfig]:
    """What `--data` names, as a run's config would have it.

    Args:
        texts: files, patterns or named data sets.
        options: of the command: `split`, `num_samples`, `image_root`.
        split: of named data sets, where no other is asked for.

    Raises:
        ValueError: one of the texts can name no data.
    """
    specs = []
    for text in texts:
        fields: dict[str, Any] = source_from_text(text)
        if "name" in fields:
            fields["split"] = options.split or split
        if fields.get("name") == "shapes":
            fields["num_samples"] = options.num_samples
        if "path" in fields and options.image_root:
            fields["image_root"] = options.image_root
        try:
            specs.append(SourceConfig(**fields))
        except ValidationError as error:
            raise ValueError(f"--data: {text}: {error.errors()[0]['msg']}") from error
    return specs


def number_up_to(largest: int, smallest: int = 1) -> Callable[[str], int]:
    """Reads a number from 1, or another smallest one, to `largest`, for argparse."""

    def number(text: str) -> int:
        if not text.isdecimal() or not smallest <= int(text) <= largest:
            raise argparse.ArgumentTypeError(f"wanted a number from {smallest} to {largest}, got {text!r}")
        return int(text)

    return number


@contextmanager
def name_option(option: str, key: str = "model.name_or_path") -> Iterator[None]:
    """Errors about a model or data name the option they were given by, not the key of a run's config."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}: {str(error).removeprefix(f'{key}: ')}") from error


def print_info(config: Config, text: str) -> None:
    """Prints what a run says of itself, unless `output.level` asks for less."""
    if config.output.level in ("debug", "info"):
        print(printable_lines(text), flush=True)


def print_error(text: str) -> None:
    """Prints what is wrong."""
    print(printable_lines(text), file=sys.stderr)
