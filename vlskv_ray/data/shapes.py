"""The built-in world: small pictures of coloured shapes with questions about them, and sums in words; from a seed.

It needs no file and no network, so every installation can run the whole pipeline, encoded pictures included.
"""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vlskv_ray.data.sample import Sample

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
SPLITS = ("train", "test")
FORMATS = ("PNG", "JPEG", "WEBP")


class ShapesSource:
    """Row i of a split is a pure function of the split and i. Of four rows one is text-only and one has two images."""

    def __init__(self, split: str = "train", num_samples: int = 1024, weight: float = 1.0) -> None:
        """ValueError for a split that does not exist."""
        if split not in SPLITS:
            raise ValueError(f"data.sources: shapes has no split {split!r}; wanted one of {', '.join(SPLITS)}")
        self.name, self.weight, self.split = f"shapes/{split}", weight, split
        self.num_rows, self.fingerprint = num_samples, "shapes-1"  # the version of what is drawn
        kinds = np.arange(num_samples) % 4
        self.num_images = np.choose(kinds, [1, 1, 0, 2]).astype(np.int32)
        self.text_bytes = np.choose(kinds, [40, 80, 30, 60]).astype(np.int64)

    def read(self, row: int) -> Sample:
        """Sample `row`, drawn afresh."""
        rng = np.random.default_rng([SPLITS.index(self.split), row])
        kind = row % 4
        if kind == 2:
            turns, images = [sum_in_words(rng)], list[bytes]()
        elif kind == 3:
            turns, images = compare_pictures(rng)
        else:
            turns, images = describe_picture(rng, num_turns=kind + 1)
        messages: list[dict[str, Any]] = []
        for question, answer in turns:
            messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        messages[0]["content"] = [{"type": "image"} for _ in images] + messages[0]["content"]
        return Sample(self.uid(row), messages, list(images))

    def uid(self, row: int) -> str:
        return f"{self.name}:{row + 1}"


def sum_in_words(rng: np.random.Generator) -> tuple[str, str]:
    a, b = rng.integers(0, 50, size=2)
    return f"What is {a} plus {b}?", f"{a + b}"


def describe_picture(rng: np.random.Generator, num_turns: int) -> tuple[list[tuple[str, str]], list[bytes]]:
    colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
    turns = [(f"What colour is the {shape}?", f"{colour}"), ("What shape is it?", f"It is a {shape}.")]
    return turns[:num_turns], [draw(rng, colour, shape)]


def compare_pictures(rng: np.random.Generator) -> tuple[list[tuple[str, str]], list[bytes]]:
    first, second = rng.choice(list(COLOURS), size=2)
    pictures = [draw(rng, str(colour), str(rng.choice(SHAPES))) for colour in (first, second)]
    answer = "Yes." if first == second else f"No, {first} and {second}."
    return [("Do both pictures have the same colour?", answer)], pictures


def draw(rng: np.random.Generator, colour: str, shape: str) -> bytes:
    """A picture of one shape, encoded; sizes from 48 to 320 pixels, wide and tall ones among them."""
    width, height = (int(x) for x in rng.integers(48, 321, size=2))
    picture = Image.new("RGB", (width, height), (245, 245, 240))
    pen = ImageDraw.Draw(picture)
    side = int(min(width, height) * rng.uniform(0.4, 0.9))
    left, top = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    right, bottom, ink = left + side, top + side, COLOURS[colour]
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=ink)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill=ink)
    elif shape == "triangle":
        pen.polygon([((left + right) // 2, top), (left, bottom), (right, bottom)], fill=ink)
    else:
        third = side // 3
        pen.rectangle((left + third, top, right - third, bottom), fill=ink)
        pen.rectangle((left, top + third, right, bottom - third), fill=ink)
    encoded = io.BytesIO()
    picture.save(encoded, format=str(rng.choice(FORMATS)))
    return encoded.getvalue()
