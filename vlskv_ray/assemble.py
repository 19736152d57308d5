"""The command `vlskv-ray assemble`: a text model and a vision tower become one vision-language model."""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlskv_ray.command import DONE, command_parser, exit_status, name_option, number_up_to

MOST_TILES = 256
"""In which a picture may be seen; more are refused of any model."""
DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    return exit_status(lambda: assemble(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = command_parser(
        "assemble",
        "Makes a LLaVA-NeXT of a text model and a vision tower: image token, projector, processor and chat template. "
        "On texts it is the text model, which is checked. Of pictures it knows nothing until its projector is trained, "
        "unless the tower brings a trained one.",
    )
    parser.add_argument(
        "--text",
        required=True,
        metavar="MODEL",
        help="the text model: a folder, a hub id, or a GGUF file (of the hub: OWNER/NAME/FILE.gguf)",
    )
    parser.add_argument(
        "--vision",
        metavar="MODEL",
        help="a CLIP or SigLIP, or its vision tower: a folder or a hub id; a projector.safetensors beside it is the "
        "projector that was trained with it (default: a small new tower)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write, which is not there yet")
    new = parser.add_argument_group("a new tower")
    for option, largest, default, what in (
        ("--image-size", 4096, 64, "side of a picture in pixels"),
        ("--patch-size", 4096, 8, "side of a patch in pixels"),
        ("--vision-width", 4096, 192, "hidden size"),
        ("--vision-layers", 256, 6, "layers"),
    ):
        new.add_argument(option, type=number_up_to(largest), metavar="N", help=f"{what} (default {default})")
    parser.add_argument(
        "--grid",
        nargs="+",
        type=rows_and_columns,
        metavar="RxC",
        help="rows and columns of the tiles that a picture may be seen in (default: 1x2 2x1 2x2 1x3 3x1, of a new "
        "tower 1x1, of one with a projector those it was trained with)",
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="in place of the text model's own; `plain` writes USER: and ASSISTANT: (default: the text model's own, "
        "with <image> and a newline for a picture)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as the text model's are stored)")
    parser.add_argument(
        "--seed",
        type=lambda text: int(text) if text == "0" else number_up_to(2**31)(text),
        default=0,
        metavar="N",
        help="what is new is drawn from it (default %(default)s)",
    )
    options = parser.parse_args(arguments)
    given = [name for name in ("image_size", "patch_size", "vision_width", "vision_layers") if getattr(options, name)]
    if options.vision and given:
        parser.error(f"--{given[0].replace('_', '-')} goes with a new tower, without --vision")
    return options


def rows_and_columns(text: str) -> tuple[int, int]:
    """Reads RxC, for argparse."""
    found = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", text)
    if not found or int(found[1]) * int(found[2]) > MOST_TILES:
        raise argparse.ArgumentTypeError(
            f"wanted rows x columns of {MOST_TILES} tiles at most, such as 1x2, got {text!r}"
        )
    return int(found[1]), int(found[2])


def assemble(options: argparse.Namespace) -> int:
    """Makes the model, checks it as a run would, and writes it whole or not at all. ValueError for what the user can
    mend."""
    output, aside = places(options.output)
    template = options.chat_template
    if template is not None and template != "plain":
        template = read_template(template)
    import torch

    from vlskv_ray.assembly.assemble import assemble as join
    from vlskv_ray.assembly.assemble import check_written
    from vlskv_ray.assembly.text_model import read_text_model

    new_tower = None if options.vision else new_tower_of(options)
    with name_option("--text"):
        text = read_text_model(options.text, getattr(torch, options.dtype) if options.dtype else None)
    tower = tower_of(options, new_tower, text.model.dtype)
    print(f"text          {described(text.name, text.model)}, {text.config.vocab_size:,} tokens")
    print(f"vision        {described(tower.name, tower.model)}, pictures of {tower.config.image_size} px", flush=True)
    assembled = join(text, tower, grid=options.grid, template=template, seed=options.seed)
    config, processor = assembled.model.config, assembled.processor
    grown = config.text_config.vocab_size
    resized = f"; embeddings {assembled.num_tokens:,} -> {grown:,}" if grown != assembled.num_tokens else ""
    print(f"image token   {processor.image_token} is {config.image_token_id}{resized}")
    try:
        save(assembled, aside)
        with name_option("--text"):
            difference, notices = check_written(aside, assembled)
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for notice in notices:
        print(f"warning: {notice}")
    exactly = "exactly" if difference == 0 else f"but for {difference:.1g}"
    print(f"checked       its logits on texts are the text model's, {exactly}")
    weights = sum(parameter.numel() for parameter in assembled.model.parameters())
    untrained = "tower and projector are" if tower.is_new else "the projector is"
    seen = (
        f"{untrained} untrained, pictures mean nothing to it yet" if not tower.projector else "its projector is trained"
    )
    print(f"written       {options.output}: {weights / 1e6:.1f} million weights; {seen}")
    return DONE


def places(output: str) -> tuple[Path, Path]:
    """Where the folder goes, and where it is written first. ValueError where there is something already."""
    folder = Path(os.path.abspath(os.path.expanduser(output)))
    if os.path.lexists(folder):
        raise ValueError(f"--output: {output} is there already; name a new folder, or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: {folder.parent} cannot be made: {error.strerror}") from error
    aside = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return folder, aside


def save(assembled: Any, folder: Path) -> None:
    """Writes a model and its processor into a folder. OSError where that cannot be, as on a full disk."""
    from safetensors import SafetensorError

    from vlskv_ray.files import make_readable

    try:
        assembled.model.save_pretrained(folder)
        assembled.processor.save_pretrained(folder)
    except SafetensorError as error:  # of a disk too
        raise OSError(f"--output: the model cannot be written: {error}; nothing is left of it") from error
    make_readable(*folder.iterdir())


def read_template(path: str) -> str:
    """A chat template from a file. ValueError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"--chat-template: {path} cannot be read: {error}") from error


def new_tower_of(options: argparse.Namespace) -> Any:
    """The size of the new tower that is asked for. ValueError where there can be none."""
    from vlskv_ray.assembly.vision_tower import NewTower

    sizes = {
        "image_size": options.image_size,
        "patch_size": options.patch_size,
        "width": options.vision_width,
        "layers": options.vision_layers,
    }
    return NewTower(**{name: size for name, size in sizes.items() if size})


def tower_of(options: argparse.Namespace, new_tower: Any, dtype: Any) -> Any:
    """The vision tower that is asked for. ValueError where it cannot be had."""
    from vlskv_ray.assembly.vision_tower import draw_tower, read_tower

    if new_tower:
        return draw_tower(new_tower, options.seed, dtype)
    with name_option("--vision"):
        return read_tower(options.vision, dtype)


def described(name: str, model: Any) -> str:
    """A model in a few words."""
    config, weights = model.config, sum(parameter.numel() for parameter in model.parameters())
    layers = f"{config.num_hidden_layers} layers of {config.hidden_size}"
    return f"{name}: {config.model_type}, {layers}, {weights / 1e6:.1f} million weights in {model.dtype}"


if __name__ == "__main__":
    sys.exit(main())
