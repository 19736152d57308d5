"""The command `vlskv-ray probe`: how far untrained students are from their teacher, copied and fitted, for every N and
group size: where to look, before anything is spent on training.

The teacher runs once over each batch, of those that students are fitted to and of those that they are measured on.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vlskv_ray.command import DONE, exit_status, number_up_to, print_info, run_parser
from vlskv_ray.config import Config, load_config
from vlskv_ray.files import write_json
from vlskv_ray.words import plural

NUM_SAMPLES = 256


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options, overrides = parse(arguments)
    return exit_status(lambda: run_command(options, overrides))


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of the command, and what is left: overrides of the config."""
    what = (
        "Measures untrained students, copied and fitted, for every N and group size. They are fitted to what a run of "
        "the config would begin with, and measured on evaluation.sources, or else on samples that they are not fitted "
        f"to: {NUM_SAMPLES} of them unless --num-samples says otherwise."
    )
    parser = run_parser("probe", what)
    parser.set_defaults(num_samples=NUM_SAMPLES)
    parser.add_argument(
        "--groups", type=numbers, default=[1, 2, 4], metavar="1,2,4", help="group sizes (default: 1,2,4)"
    )
    parser.add_argument("--layers", type=numbers, metavar="8,12,16", help="values of N (default: all)")
    parser.add_argument(
        "--start",
        choices=("fit", "copy"),
        help="copy: measure copied students only, which takes no pass to fit others (default: model.start, else fit)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--against", metavar="SWEEP", help="a finished sweep, whose order this one is compared with")
    parser.add_argument("--into", metavar="FILE", help="write the table into this page instead of printing it")
    parser.add_argument("--block", default="probe", metavar="NAME", help="its place there (default %(default)s)")
    return parser.parse_known_args(arguments)


def numbers(text: str) -> list[int]:
    """Reads 1,2,4 for argparse."""
    return [number_up_to(1000)(part) for part in text.split(",")]


def run_command(options: argparse.Namespace, overrides: list[str]) -> int:
    """Does what the options say. ValueError for what the user can mend."""
    config = load_config(options.config, overrides)
    return probe(config, options)


def probe(config: Config, options: argparse.Namespace) -> int:
    """Measures and shows. ValueError for what the user can mend."""
    from vlskv_ray.model.build import find_model
    from vlskv_ray.model.build import load_config as load_model_config
    from vlskv_ray.model.swiftkv import has_swiftkv
    from vlskv_ray.report.markdown import write_block
    from vlskv_ray.sweep.probing import agreement_with, distance_table, measure, read_trained, rows_of, settings_of
    from vlskv_ray.training.objective import objective_of

    if not objective_of(config).has_student:
        raise ValueError(f"objective: {config.objective} has no student; wanted distill")
    teacher = load_model_config(find_model(config.model.name_or_path, config.model.revision))
    if has_swiftkv(teacher):
        raise ValueError(f"model.name_or_path: {config.model.name_or_path} is a student already; wanted its teacher")
    last = teacher.text_config.num_hidden_layers
    settings = settings_of(last, options.layers or list(range(1, last)), options.groups)
    trained = read_trained(Path(options.against), settings) if options.against else []
    for option, file in (("--json", options.json), ("--into", options.into)):
        if file and not Path(file).absolute().parent.is_dir():
            raise ValueError(f"{option}: there is no folder {Path(file).absolute().parent}")
    began = time.monotonic()
    distances, count = measure(config, settings, options.num_samples, options.start)
    print_info(config, f"{count} samples, {plural(len(settings), 'setting')} in {time.monotonic() - began:.0f} s")
    if options.json:
        write_json(Path(options.json), rows_of(distances))
    text = distance_table(distances, last)
    if options.against:
        text += f"\n\n{agreement_with(Path(options.against).name, trained, distances)}"
    if options.into:
        write_block(Path(options.into), options.block, f"```text\n{text}\n```")
    else:
        print(text)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
