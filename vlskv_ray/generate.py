"""The command `vlskv-ray generate`: asks a SwiftKV checkpoint, or its teacher, a question about images."""

import argparse
import sys
from collections.abc import Sequence

from vlskv_ray.command import DONE, add_device_options, command_parser, exit_status, number_up_to


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    return exit_status(lambda: generate(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = command_parser(
        "generate", "Asks a SwiftKV checkpoint a question, greedily answered, and says how fast the answer came."
    )
    parser.add_argument(
        "--model", required=True, help="a folder such as RUN/final, a hub id, or a shipped model's name"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    parser.add_argument(
        "--image", nargs="+", action="extend", default=[], metavar="FILE", help="what it is about, shown in this order"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--teacher", action="store_true", help="answer with SwiftKV off")
    which.add_argument("--compare", action="store_true", help="answer with SwiftKV off, then on, and compare")
    parser.add_argument(
        "--max-new-tokens",
        type=number_up_to(2**20),
        default=64,
        metavar="N",
        help="where an answer is cut at the latest, if not by the model's positions (default %(default)s)",
    )
    add_device_options(parser)
    return parser.parse_args(arguments)


def generate(options: argparse.Namespace) -> int:
    """Answers the question and says how fast. ValueError for what the user can mend."""
    import torch

    from vlskv_ray.evaluation.ask import answer, compare, comparison, open_image, prompt_tokens, read_question
    from vlskv_ray.evaluation.loading import device_asked_for, load

    if options.threads:
        torch.set_num_threads(options.threads)
    images = [open_image(path) for path in options.image]
    device = device_asked_for(options.device)
    model, processor = load(options.model, teacher=options.teacher)
    inputs, room = read_question(model.config, processor, options.prompt, images)
    model.to(device)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    max_new_tokens = min(options.max_new_tokens, room)
    if options.compare:
        print(comparison(*compare(model, processor, inputs, max_new_tokens=max_new_tokens)))
        print(prompt_tokens(model.config, inputs))
        return DONE
    stream = sys.stdout.isatty()
    answered = answer(model, processor, inputs, max_new_tokens=max_new_tokens, stream=stream)
    if not stream:
        print(answered.text)
    rate = "" if answered.tokens_per_second is None else f"{answered.tokens_per_second:.1f} tokens/s after it, "
    print(f"first token after {answered.first_token_seconds:.3f} s, {rate}{prompt_tokens(model.config, inputs)}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
