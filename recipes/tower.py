"""A vision tower that learns to name drawings, without running the language model behind it.

What a language model reads is embeddings of tokens. So the tower and its projector learn to write, at the place of each
patch, the embedding of a token of what a drawing shows: its name, then its kind, then its colour. That costs a
hundredth of training through the language model, which a short `objective: sft` finishes.

The tower is a stock CLIP one, begun as a matcher of pictures: each head of its first layer looks at one patch, so that
every token knows the whole picture from there on, whitened as a linear discriminant would have it.

Shapes: B drawings, S side of a picture in pixels, P patches, K slots, V tokens that any slot may have, D hidden size,
W width of the tower.
"""

import argparse
import json
import math
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from recipes.emoji import Wording, main_colour, read_hand
from vlskv_ray.assembly.assemble import assemble
from vlskv_ray.assembly.text_model import read_text_model
from vlskv_ray.assembly.vision_tower import VisionTower, write_tower
from vlskv_ray.command import DONE, exit_status
from vlskv_ray.model.build import build_plain, find_model
from vlskv_ray.model.processor import load_processor

SLOTS = (("name", 6, (1.5, 1.5, 1.0, 1.0, 0.5, 0.5)), ("kind", 5, (0.4,) * 5), ("colour", 1, (0.6,)))
"""What stands at the first patches, in how many of them, and what each weighs in the loss."""
DIRECTED = re.compile(r"left|right|clock|flag|pointing|arrow|letter|map")
"""Names of what is another thing when mirrored."""
SUFFIXES = (".png", ".webp")
SIDE, ROWS, WIDTH, LAYERS = 64, 4, 192, 4
"""Of the tower: pictures in pixels, rows of patches in each, hidden size, layers."""
CONTENT = 48
"""Of its width, what a patch's own content has at first; the rest says where the patch is."""
ADAM_RATE, MUON_RATE, WARMUP_STEPS, CONSTANT = 1.5e-3, 3e-3, 100, 0.2
"""Learning rates; of all steps this share is at the full rate, the rest goes down in a line."""


@dataclass(frozen=True)
class Drawings:
    """Named drawings, RGBA, of one size."""

    pixels: Tensor
    """uint8[B, 4, S, S]."""
    names: list[str]
    colours: list[str | None]

    def named(self) -> Iterator[tuple[str, str | None]]:
        """The name and the colour of each."""
        return zip(self.names, self.colours, strict=True)

    def __len__(self) -> int:
        return len(self.names)


def code_of(file: Path) -> str:
    """The code points that a drawing's file is called by; a variation selector tells nothing."""
    return file.stem.lower().replace("-fe0f", "").lstrip("0")


def read_drawings(folders: Iterable[Path], names: Mapping[str, str], side: int) -> Drawings:
    """All drawings of things that have a name.

    Args:
        folders: of PNG and WebP files called by their code points.
        names: by code, as `code_of` gives it.
        side: in pixels; others are resized.

    Raises:
        ValueError: a folder has none of them.
    """
    pixels, found, colours = [], [], []
    for folder in folders:
        files = [file for file in sorted(folder.glob("*")) if file.suffix in SUFFIXES and code_of(file) in names]
        if not files:
            raise ValueError(f"{folder}: holds no drawing called by its code points, such as 1f34e.png")
        for file in files:
            with Image.open(file) as image:
                rgba = image.convert("RGBA")
            if rgba.size != (side, side):
                rgba = rgba.resize((side, side), Image.Resampling.LANCZOS)
            pixels.append(torch.from_numpy(np.array(rgba)).permute(2, 0, 1))
            found.append(names[code_of(file)])
            colours.append(main_colour(file))
    return Drawings(torch.stack(pixels), found, colours)


# ----------------------------------------------------------------------------------------------------------- the pixels
def on_white(pixels: Tensor) -> Tensor:
    """RGBA as the product shows it: uint8[B, 4, S, S] -> float32[B, 3, S, S] from 0 to 1."""
    rgba = pixels.float() / 255
    return rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:]


def augment(pixels: Tensor, may_flip: Tensor, rng: torch.Generator) -> Tensor:
    """The same things drawn otherwise: turned, moved, of other sizes, tones and grounds, blurred, covered in part.

    Args:
        pixels: uint8[B, 4, S, S].
        may_flip: bool[B].
        rng: what is drawn comes from it.

    Returns:
        float32[B, 3, S, S] from 0 to 1, but for noise.
    """
    n = len(pixels)

    def chance(probability: float) -> Tensor:
        return torch.rand(n, generator=rng) < probability

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=rng)

    rgba = _moved(pixels, torch.where(chance(0.1) & may_flip, -1.0, 1.0), between, chance)
    alpha = rgba[:, 3:]
    colour = rgba[:, :3] / alpha.clamp_min(1e-3)
    mix = torch.eye(3) + (torch.rand(n, 3, 3, generator=rng) - 0.5) * 0.35 * chance(0.7).view(n, 1, 1)
    mix = torch.where(chance(0.05).view(n, 1, 1), torch.full((3, 3), 1 / 3), mix / mix.sum(2, keepdim=True))
    colour = torch.einsum("nij,njhw->nihw", mix, colour)
    contrast, brightness = torch.exp(between(-0.35, 0.35)).view(n, 1, 1, 1), between(-0.2, 0.2).view(n, 1, 1, 1)
    colour = ((colour - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)
    is_white = chance(0.85).view(n, 1, 1, 1)
    ground = torch.where(is_white, torch.ones(n, 3, 1, 1), torch.rand(n, 3, 1, 1, generator=rng))
    seen = colour * alpha + ground * (1 - alpha)
    blurred = F.avg_pool2d(F.pad(seen, (1, 1, 1, 1), mode="replicate"), 3, 1)
    seen = torch.where(chance(0.2).view(n, 1, 1, 1), blurred, seen)
    noise = (0.06 * between(0, 1) * chance(0.4)).view(n, 1, 1, 1)
    seen = seen + torch.randn(seen.shape, generator=rng) * noise
    return torch.where(_covered(pixels.shape[-1], between, chance), ground, seen)


def _moved(pixels: Tensor, flip: Tensor, between: Any, chance: Any) -> Tensor:
    """Turned, resized, sheared and shifted: premultiplied RGBA, float32[B, 4, S, S]."""
    rgba = pixels.float() / 255
    rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
    angle, scale = between(-0.15, 0.15) * chance(0.7), torch.exp(between(-0.12, 0.15))
    aspect, shear = torch.exp(between(-0.1, 0.1)), between(-0.08, 0.08)
    cos, sin = torch.cos(angle), torch.sin(angle)
    across = torch.stack([cos * scale * aspect * flip, (shear - sin) * scale, between(-0.1, 0.1)], dim=1)
    down = torch.stack([sin * scale * flip, cos * scale / aspect, between(-0.1, 0.1)], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), list(rgba.shape), align_corners=False)
    return F.grid_sample(rgba, grid, align_corners=False)


def _covered(side: int, between: Any, chance: Any) -> Tensor:
    """Which pixels a patch of the ground covers: bool[B, 1, S, S], of one in five drawings."""
    x, y, reach = between(0, side), between(0, side), between(side / 11, side / 4.5)
    line = torch.arange(float(side))
    is_across, is_down = ((line - at[:, None]).abs() < reach[:, None] for at in (x, y))
    return (is_across[:, None, :] & is_down[:, :, None] & chance(0.2)[:, None, None])[:, None]


# ------------------------------------------------------------------------------------------------------------ the slots
class Slots:
    """What the patches are to say, as tokens of the language model."""

    def __init__(self, tokenizer: Any, embeddings: Tensor, words: Sequence[tuple[str, str | None, str | None]]) -> None:
        """Those of all these names, kinds and colours: the tokens that they have, and their embeddings [V, D]."""
        self.tokenizer = tokenizer
        (self.blank,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
        self.weights = torch.tensor([weight for _, _, weights in SLOTS for weight in weights])
        self.weights /= self.weights.sum()
        tokens = sorted({token for word in words for token in self._tokens(word)})
        self.places = {token: place for place, token in enumerate(tokens)}
        self.embeddings = embeddings[tokens].float()
        self.mean = self.embeddings.mean(dim=0)
        self.directions = F.normalize(self.embeddings - self.mean, dim=1)

    def _tokens(self, words: tuple[str | None, ...]) -> list[int]:
        tokens: list[int] = []
        for text, (_, room, _) in zip(words, SLOTS, strict=True):
            found = self.tokenizer(f" {text}", add_special_tokens=False)["input_ids"][:room] if text else []
            tokens += found + [self.blank] * (room - len(found))
        return tokens

    def of(self, words: Sequence[tuple[str, str | None, str | None]]) -> Tensor:
        """int64[B, K], as places among the tokens."""
        return torch.tensor([[self.places[token] for token in self._tokens(word)] for word in words])

    def log_probabilities(self, found: Tensor, log_scale: Tensor) -> Tensor:
        """Of each token, for what stands in a slot, by its direction: [..., D] -> [..., V]."""
        return (F.normalize(found - self.mean, dim=-1) @ self.directions.T * log_scale.exp()).log_softmax(dim=-1)


class Reader(nn.Module):
    """A tower and a projector, trained to fill slots; what is here beside them is left behind."""

    def __init__(self, tower: Any, projector: Any, num_names: int) -> None:
        super().__init__()
        self.tower, self.projector = tower, projector
        self.norm = nn.LayerNorm(tower.config.hidden_size)
        self.name = nn.Linear(tower.config.hidden_size, num_names)
        self.log_scale = nn.Parameter(torch.tensor(math.log(18.0)))

    def forward(self, pixel_values: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
        """float32[B, 3, S, S] -> what stands in the slots [B, K, D], and a score for each name."""
        states = self.tower(pixel_values).last_hidden_state[:, 1:]
        return self.projector(states[:, :num_slots]), self.name(self.norm(states.mean(dim=1)))


def draw_tower(side: int, seed: int) -> VisionTower:
    """A CLIP tower with as many heads as patches."""
    config = CLIPVisionConfig(
        image_size=side,
        patch_size=side // ROWS,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=ROWS * ROWS,
        projection_dim=WIDTH,
    )
    torch.manual_seed(seed)
    return VisionTower("drawn", CLIPVisionModel(config).eval(), is_new=True)


@torch.no_grad()
def begin_as_matcher(reader: Reader, pixel_values: Tensor, labels: Tensor, rng: torch.Generator) -> None:
    """Draws the tower so that its first layer gathers the picture, and its score for each name is that of a linear
    discriminant: what it has yet to learn is what the discriminant cannot see, and to say the name in tokens.

    Args:
        reader: whose tower has as many heads as patches.
        pixel_values: float32[B, 3, S, S], of drawings to learn from.
        labels: int64[B], which name each has.
        rng: what is random is drawn from it.
    """
    tower, (head_size, contents) = reader.tower, (WIDTH // ROWS**2, CONTENT)
    weights = dict(tower.named_parameters())

    def weight(ending: str) -> Tensor:
        (found,) = (each for name, each in weights.items() if name.endswith(ending))
        return found

    for name, each in weights.items():
        if each.dim() == 2 and "embedding" not in name:
            nn.init.trunc_normal_(each, std=0.04, generator=rng)
    some = torch.randperm(len(pixel_values), generator=rng)[:1500]
    filters, shift = patch_filters(pixel_values[some], tower.config.patch_size, contents, head_size)
    places = codes(ROWS**2 + 1, WIDTH - contents, rng)
    weight("patch_embedding.weight").zero_().flatten(1)[:contents] = filters
    position = weight("position_embedding.weight").zero_()
    position[:, contents:] = 1.1 * places  # far more than a patch's content, so that the norm of a token hardly varies
    position[1:, :contents] -= shift
    weight("class_embedding").zero_()
    for projection in ("q_proj", "k_proj", "v_proj"):
        weight(f"layers.0.self_attn.{projection}.weight").mul_(0.1)
        weight(f"layers.0.self_attn.{projection}.bias").zero_()
    key, value = weight("layers.0.self_attn.k_proj.weight"), weight("layers.0.self_attn.v_proj.weight")
    query = weight("layers.0.self_attn.q_proj.bias")
    for head in range(ROWS**2):  # whoever asks, this head answers with the patch of its number
        rows = slice(head * head_size, (head + 1) * head_size)
        key[rows.start, contents:] = 6 * places[head + 1] / (WIDTH - contents)
        query[rows.start] = 2 * math.sqrt(head_size)
        value[rows] = 0
        value[rows, :head_size] = torch.eye(head_size)
    output = tower.get_submodule(next(n for n, _ in tower.named_modules() if n.endswith("layers.0.self_attn.out_proj")))
    gathered = []
    hook = output.register_forward_hook(lambda _, inputs, __: gathered.append(inputs[0][:, 1].clone()))
    in_turn(tower, pixel_values)
    hook.remove()
    whitening, mean = discriminant(torch.cat(gathered), labels)
    output.weight.copy_(whitening.T)
    output.bias.copy_(-mean @ whitening)
    states = in_turn(lambda pixels: reader.norm(tower(pixels).last_hidden_state[:, 1:].mean(dim=1)), pixel_values)
    means = class_means(states - states.mean(dim=0), labels)
    reader.name.weight.copy_(F.normalize(means, dim=1))
    reader.name.bias.copy_(-reader.name.weight @ states.mean(dim=0))


def patch_filters(pixel_values: Tensor, size: int, count: int, first: int) -> tuple[Tensor, Tensor]:
    """The first principal components of patches as filters [count, 3 x size x size], and what a mean patch gives.

    The components after the `first`, which are weak, are made twice as strong.
    """
    patches = F.unfold(pixel_values, size, stride=size).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(dim=0)
    spread, components = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    filters = 2 * components.flip(1)[:, :count].T / spread[-1].sqrt()
    filters[first:] *= 2
    return filters, filters @ mean


def codes(count: int, width: int, rng: torch.Generator) -> Tensor:
    """Vectors at right angles, each of mean 0 and variance 1: float32[count, width]."""
    drawn = torch.randn(width, count, generator=rng)
    turned, _ = torch.linalg.qr(drawn - drawn.mean(dim=0))
    return turned.T * math.sqrt(width)


def class_means(values: Tensor, labels: Tensor) -> Tensor:
    """float32[B, W] -> the mean of each name's, [names, W]."""
    counts = labels.bincount()
    return torch.zeros(len(counts), values.shape[1]).index_add(0, labels, values) / counts[:, None]


def discriminant(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What whitens the differences within a name, scaled to a variance of 1 on the whole [W, W], and the mean [W]."""
    mean = values.mean(dim=0)
    values = values - mean
    within = values - class_means(values, labels)[labels]
    covariance = within.T @ within / len(within)
    spread, turned = torch.linalg.eigh(covariance + 0.3 * covariance.diagonal().mean() * torch.eye(len(covariance)))
    whitening = turned / spread.sqrt() @ turned.T
    return whitening / (values @ whitening).std(), mean


def in_turn(function: Any, pixel_values: Tensor) -> Tensor:
    """A function of pictures, on 256 at a time."""
    found = [function(part) for part in pixel_values.split(256)]
    return torch.cat([each if isinstance(each, Tensor) else each.last_hidden_state[:, 0] for each in found])


# --------------------------------------------------------------------------------------------------------- the training
def optimizers_of(reader: Reader) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of tower and projector, AdamW for all else."""
    named = list(reader.named_parameters())
    matrices = [
        w for name, w in named if w.dim() == 2 and name.startswith(("tower", "projector")) and "embedding" not in name
    ]
    others = [w for _, w in named if not any(w is matrix for matrix in matrices)]
    decayed, plain = [w for w in others if w.dim() == 2], [w for w in others if w.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
    muon = torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [torch.optim.AdamW(groups, lr=ADAM_RATE, betas=(0.9, 0.98)), muon]


def labels_of(drawings: Drawings) -> Tensor:
    """Which of their names, in order, each drawing has: int64[B]."""
    known = {name: number for number, name in enumerate(sorted(set(drawings.names)))}
    return torch.tensor([known[name] for name in drawings.names])


def loss_of(reader: Reader, slots: Slots, pixel_values: Tensor, wanted: Tensor, names: Tensor) -> Tensor:
    """The right tokens by direction, their embeddings by distance, and the name as a whole."""
    found, scores = reader(pixel_values, wanted.shape[1])
    likely = slots.log_probabilities(found, reader.log_scale)
    by_slot = -likely.gather(2, wanted[..., None]).squeeze(2)
    targets = slots.embeddings[wanted]
    distance = (found - targets).square().mean() / slots.embeddings.square().mean()
    by_name = F.cross_entropy(scores, names, label_smoothing=0.05)
    return 2 * (by_slot @ slots.weights).mean() + 0.5 * distance + 0.25 * by_name


def fit(reader: Reader, slots: Slots, drawings: Drawings, wanted: Tensor, scale: Any, options: Any) -> None:
    """Trains in place; ends with the running mean of the last weights."""
    rng = torch.Generator().manual_seed(options.seed)
    order = random.Random(options.seed)
    labels = labels_of(drawings)
    may_flip = torch.tensor([not DIRECTED.search(name) for name in drawings.names])
    optimizers = optimizers_of(reader)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    mean = {name: weight.clone() for name, weight in reader.state_dict().items()}
    left: list[int] = []
    for step in range(1, options.steps + 1):
        if len(left) < options.batch_size:
            left = order.sample(range(len(drawings)), len(drawings))
        chosen = torch.tensor([left.pop() for _ in range(options.batch_size)])
        now = min(1, step / WARMUP_STEPS) * min(1, (1.02 - step / options.steps) / (1.02 - CONSTANT))
        for optimizer, own in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = rate * now
            optimizer.zero_grad()
        pixel_values = scale(augment(drawings.pixels[chosen], may_flip[chosen], rng))
        loss = loss_of(reader, slots, pixel_values, wanted[chosen], labels[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for name, weight in reader.state_dict().items():
            mean[name].lerp_(weight, 1 - min(0.995, step / (step + 20)))
        if step % 100 == 0:
            print(f"step {step}/{options.steps}  loss {loss.item():.3f}", flush=True)
    reader.load_state_dict(mean)


@torch.no_grad()
def scale_as_embeddings(reader: Reader, slots: Slots, drawings: Drawings, wanted: Tensor, scale: Any) -> None:
    """The projector's output, whose direction was learnt, comes as near to the embeddings as one factor brings it."""
    found = in_turn(lambda pixels: reader(pixels, wanted.shape[1])[0], scale(on_white(drawings.pixels[:2000])))
    found, targets = found - slots.mean, slots.embeddings[wanted[:2000]] - slots.mean
    factor = (found * targets).sum() / found.square().sum()
    last = reader.projector.linear_2
    last.weight.mul_(factor)
    last.bias.copy_(slots.mean + factor * (last.bias - slots.mean))


@torch.inference_mode()
def share_named(reader: Reader, slots: Slots, drawings: Drawings, wanted: Tensor, scale: Any) -> float:
    """The share of drawings whose own name is the likeliest of all names of these drawings, by its slots."""
    room = SLOTS[0][1]
    choices, own = wanted[:, :room].unique(dim=0, return_inverse=True)
    right = 0
    for begin in range(0, len(drawings), 256):
        found, _ = reader(scale(on_white(drawings.pixels[begin : begin + 256])), wanted.shape[1])
        likely = slots.log_probabilities(found, reader.log_scale)
        scores = sum(likely[:, slot, choices[:, slot]] for slot in range(room))
        right += int((torch.as_tensor(scores).argmax(dim=1) == own[begin : begin + 256]).sum())
    return right / len(drawings)


# ---------------------------------------------------------------------------------------------------------- the command
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    return exit_status(lambda: make(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m recipes.tower", description=__doc__, allow_abbrev=False)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--text", metavar="MODEL", help="the language model, as of vlskv-ray assemble --text")
    model.add_argument("--extract", metavar="DIR", help="a LLaVA-NeXT: writes its tower and projector as they are")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="for tower and projector")
    parser.add_argument(
        "--names", type=Path, metavar="FOLDER", help="an unpacked emoji-datasource-HAND: names and kinds"
    )
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="train.jsonl of recipes.emoji: its names may be learnt"
    )
    parser.add_argument(
        "--draw", nargs="+", default=[], type=hand_and_folder, metavar="HAND=FOLDER", help="learnt from"
    )
    parser.add_argument(
        "--measure", nargs="+", default=[], type=hand_and_folder, metavar="HAND=FOLDER", help="not learnt"
    )
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="(default 2000)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="drawings a step (default 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="order and augmentation (default 0)")
    options = parser.parse_args(arguments)
    if options.text and not (options.names and options.rows and options.draw):
        parser.error("--text needs --names, --rows and --draw to learn from")
    return options


def hand_and_folder(text: str) -> tuple[str, Path]:
    """Reads HAND=FOLDER, for argparse."""
    hand, _, folder = text.partition("=")
    if not folder:
        raise argparse.ArgumentTypeError(f"wanted HAND=FOLDER, such as google=package/img/google/64, got {text!r}")
    return hand, Path(folder)


def make(options: argparse.Namespace) -> int:
    """Trains and writes. ValueError for options that cannot be followed."""
    if options.output.exists():
        raise ValueError(f"--output: {options.output} is there already; name another folder, or delete it")
    if options.extract:
        files = find_model(options.extract)
        model, processor = build_plain(files).eval(), load_processor(files)
    else:
        made = assemble(read_text_model(options.text, torch.float32), draw_tower(SIDE, options.seed), seed=options.seed)
        model, processor = made.model.requires_grad_(False), made.processor
        learn(model, processor, options)
    write_tower(model, processor.image_processor.to_dict(), options.output, torch.float16)
    size = sum(file.stat().st_size for file in options.output.iterdir())
    print(f"{options.output}: {size / 1e6:.1f} MB")
    return DONE


def learn(model: Any, processor: Any, options: argparse.Namespace) -> None:
    """Teaches the model's tower and projector the names in the rows, and says how many of the others' they know."""
    pictures = read_hand(options.names, Wording.read())
    names = {code_of(picture.file): picture.name for picture in pictures}
    kinds = {picture.name: picture.kind for picture in pictures}
    side, images = model.config.vision_config.image_size, processor.image_processor
    learnt = {json.loads(line)["thing"] for line in options.rows.read_text().splitlines()}
    known = {code: name for code, name in names.items() if name in learnt}
    own = read_drawings([folder for _, folder in options.draw], known, side)
    others = {hand: read_drawings([folder], known, side) for hand, folder in options.measure}
    words = {
        id(each): [(name, kinds[name], colour) for name, colour in each.named()] for each in (own, *others.values())
    }
    embeddings = model.get_input_embeddings().weight.detach()
    slots = Slots(processor.tokenizer, embeddings, [word for each in words.values() for word in each])
    mean, deviation = (torch.tensor(value).view(3, 1, 1) for value in (images.image_mean, images.image_std))

    def scale(pixels: Tensor) -> Tensor:
        return (pixels - mean) / deviation

    print(f"{len(own):,} drawings of {len(set(own.names)):,} names by {len(options.draw)} hands", flush=True)
    torch.manual_seed(options.seed)
    reader = Reader(model.model.vision_tower, model.model.multi_modal_projector, len(set(own.names)))
    reader.requires_grad_(True)
    begin_as_matcher(reader, scale(on_white(own.pixels)), labels_of(own), torch.Generator().manual_seed(options.seed))
    with torch.no_grad():
        nn.init.trunc_normal_(reader.projector.linear_1.weight, std=0.08)
        nn.init.trunc_normal_(reader.projector.linear_2.weight, std=0.024)
        reader.projector.linear_2.bias.copy_(slots.mean)
    wanted = slots.of(words[id(own)])
    fit(reader, slots, own, wanted, scale, options)
    scale_as_embeddings(reader, slots, own, wanted, scale)
    model.model.image_newline.data.copy_(embeddings[slots.blank])
    for hand, each in others.items():
        share = share_named(reader, slots, each, slots.of(words[id(each)]), scale)
        print(f"{hand}, not learnt from: {share:.1%} of {len(each):,} drawings named")


if __name__ == "__main__":
    sys.exit(main())
