"""The built-in world: pictures of coloured shapes with questions about them, and letters and sums to compute.

It needs no file and no network, so every installation can train, distil and measure on real encoded pictures.

A picture has four places, a quarter each, with at most one shape in each. Questions about it must be looked up (which
colour, which shape, where), counted, or worked out in steps (what stands next to ..., are there as many ... as ...).
Whether a picture or a text question belongs to the training or the held-out split is decided by what it shows or asks,
so that no layout of a held-out picture, and no held-out sum or word, is ever trained on.
"""

import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
"""Name and plural."""
PLACES = ("top left", "top right", "bottom left", "bottom right")
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
SPLITS = ("train", "test", "lessons", "drills")
FORMATS = ("PNG", "JPEG", "WEBP")
IN_A_SENTENCE = "Answer in a sentence."
HELD_OUT = 8
"""One of so many layouts, and of so many text questions, belongs to the test split."""

PATTERN = (
    *(("scan", 1), ("one picture", 1), ("one picture", 3), ("two pictures", 3), ("text", 4), ("one picture", 4)),
    *(("scan", 1), ("one picture", 2), ("one picture", 4), ("text", 3), ("one picture", 3)),
    *(("scan", 1), ("one picture", 4), ("two pictures", 2), ("text", 4), ("one picture", 2)),
)
"""What rows are, in turn, and how many questions each asks: so a plan knows them without drawing them."""
LESSONS = (("scan", 1), ("tell", 1), ("look up", 5), ("tell", 1), ("look up", 5))
"""Likewise, of the split `lessons`: layouts of `train`, and only what teaches a new model to see and to look up."""
DRILLS = (("drill", 5), ("tell", 1), ("drill", 5))
"""Likewise, of the split `drills`: layouts of `train`, and only what is learnt last."""
PATTERNS = {"lessons": LESSONS, "drills": DRILLS}
NUM_IMAGES = {"scan": 1, "tell": 1, "look up": 1, "drill": 1, "one picture": 1, "two pictures": 2, "text": 0}


@dataclass(frozen=True)
class Thing:
    """A shape of a picture; `place` counts along the rows from the top left."""

    place: int
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def at(self) -> tuple[int, int]:
        """Column and row."""
        return self.place % 2, self.place // 2


NAMES: tuple[Callable[[Thing], str], ...] = (str, lambda thing: thing.shape, lambda thing: f"{thing.colour} shape")
"""What a thing may be called: by both, by its shape or by its colour. To find it by one of them is learnt first."""

T = TypeVar("T")
Scene = tuple[Thing, ...]
"""In the order of their places."""


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and what kind of question it is."""

    kind: str
    question: str
    answer: str


class ShapesSource:
    """Row i of a split is a pure function of the split and i. Of 16 rows two have two pictures and three none; those
    of `lessons` and `drills` have one each."""

    files: tuple[Path, ...] = ()
    roots: tuple[Path, ...] = ()
    layout: None = None

    def __init__(self, split: str = "train", num_samples: int = 1024, weight: float = 1.0) -> None:
        """ValueError for a split that does not exist."""
        if split not in SPLITS:
            raise ValueError(f"data.sources: shapes has no split {split!r}; wanted one of {', '.join(SPLITS)}")
        self.name, self.weight, self.split = f"shapes/{split}", weight, split
        self.num_rows, self.fingerprint = num_samples, "shapes-6"  # the version of what is drawn
        self.pattern = PATTERNS.get(split, PATTERN)
        of_row = np.arange(num_samples) % len(self.pattern)
        self.num_images = np.array([NUM_IMAGES[what] for what, _ in self.pattern], dtype=np.int32)[of_row]
        text_bytes = np.array([200 if what in ("scan", "tell") else 60 * turns for what, turns in self.pattern])
        self.text_bytes = text_bytes[of_row]

    def read(self, row: int, *, prompt: bool = False) -> Sample:
        """Sample `row`, drawn afresh; each ends with an answer."""
        rng = np.random.default_rng([SPLITS.index(self.split), row])
        what, num_turns = self.pattern[row % len(self.pattern)]
        turns, scenes = SAMPLERS[what](rng, "test" if self.split == "test" else "train", num_turns)
        messages: list[dict[str, Any]] = []
        for turn in turns:
            messages.append({"role": "user", "content": [{"type": "text", "text": turn.question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        messages[0]["content"] = [{"type": "image"} for _ in scenes] + messages[0]["content"]
        images = [draw(rng, scene) for scene in scenes]
        return Sample(self.uid(row), messages, list(images), kinds=tuple(turn.kind for turn in turns))

    def uid(self, row: int) -> str:
        return f"{self.name}:{row + 1}"

    def columns(self, row: int) -> dict[str, Any]:
        return {}  # it is drawn, no file says it


def split_of(what: str) -> str:
    """The split that a layout or a question belongs to."""
    return "test" if zlib.crc32(what.encode()) % HELD_OUT == 0 else "train"


# --------------------------------------------------------------------------------------------------------- what is seen
def look_up(rng: np.random.Generator, split: str, count: int) -> tuple[list[Turn], list[Scene]]:
    """A picture and `count` questions that one look at one thing answers."""
    return one_picture(rng, split, count, (colour, shape, where, where, what_is_at))  # where is the hardest to learn


def drill(rng: np.random.Generator, split: str, count: int) -> tuple[list[Turn], list[Scene]]:
    """A picture and `count` questions whose answer needs more than one look."""
    return one_picture(rng, split, count, (where, where, next_to, is_there, count_things, as_many))


def one_picture(
    rng: np.random.Generator, split: str, count: int, kinds: Sequence["Ask"] | None = None
) -> tuple[list[Turn], list[Scene]]:
    """A picture and `count` questions about it."""
    asks = [choice(rng, kinds or ABOUT_ONE) for _ in range(count)]
    while True:  # until the picture has an answer to all of them
        scene = draw_scene(rng, split)
        turns: list[Turn] = []
        for ask in asks:
            follows = turns and turns[-1].kind in ("colour", "shape")
            turn = where_is_it(scene, turns[-1]) if ask is where and follows else ask(rng, scene)
            if turn is None:
                break
            turns.append(turn)
        if len(turns) == count:
            return turns, [scene]


def scan(rng: np.random.Generator, split: str, count: int) -> tuple[list[Turn], list[Scene]]:
    """A picture to be told place by place: the lesson that teaches most about seeing."""
    scene = draw_scene(rng, split)
    there = {thing.place: f"{thing}" for thing in scene}
    told = ", ".join(there.get(place, "nothing") for place in range(len(PLACES)))
    return [Turn("scan", "What is at each place?", told)] * count, [scene]


def tell(rng: np.random.Generator, split: str, count: int) -> tuple[list[Turn], list[Scene]]:
    """A picture to be told in an order that nobody can guess. A colour, shape or place just said is all that tells
    what comes next: the shortest way to learn to find a thing by one of them."""
    scene = draw_scene(rng, split)
    order = rng.permutation(3)
    things = [scene[i] for i in rng.permutation(len(scene))]
    told = ", ".join(" ".join((t.colour, t.shape, PLACES[t.place])[i] for i in order) for t in things)
    return [Turn("tell", "What has the picture?", told)] * count, [scene]


def two_pictures(rng: np.random.Generator, split: str, count: int) -> tuple[list[Turn], list[Scene]]:
    """Two pictures and `count` questions about both."""
    scenes = [draw_scene(rng, split), draw_scene(rng, split)]
    return [about_two(rng, scenes) for _ in range(count)], scenes


def draw_scene(rng: np.random.Generator, split: str) -> Scene:
    """One to four shapes in different places, of a layout that belongs to `split`."""
    while True:
        places = sorted(rng.permutation(len(PLACES))[: int(rng.integers(1, len(PLACES) + 1))].tolist())
        scene = tuple(Thing(place, choice(rng, list(COLOURS)), choice(rng, list(SHAPES))) for place in places)
        if split_of(" ".join(f"{thing} {thing.place}" for thing in scene)) == split:
            return scene


def colour(rng: np.random.Generator, scene: Scene) -> Turn | None:
    thing = only(rng, scene, lambda thing: thing.shape)
    if thing is None:
        return None
    question, sentence = f"What colour is the {thing.shape}?", f"The {thing.shape} is {thing.colour}."
    return either_form(rng, "colour", question, thing.colour, sentence)


def shape(rng: np.random.Generator, scene: Scene) -> Turn | None:
    thing = only(rng, scene, lambda thing: thing.colour)
    if thing is None:
        return None
    question, sentence = f"What shape is {thing.colour}?", f"The {thing.colour} shape is a {thing.shape}."
    return either_form(rng, "shape", question, thing.shape, sentence)


def where(rng: np.random.Generator, scene: Scene) -> Turn | None:
    name = choice(rng, NAMES)
    thing = only(rng, scene, name)
    if thing is None:
        return None
    what, place = name(thing), PLACES[thing.place]
    return either_form(rng, "where", f"Where is the {what}?", place, f"The {what} is at the {place}.")


def where_is_it(scene: Scene, before: Turn) -> Turn | None:
    """A question that only the turn before makes plain."""
    said = before.question + " " + before.answer
    meant = [thing for thing in scene if thing.colour in said and thing.shape in said]
    return Turn("where", "Where is it?", PLACES[meant[0].place]) if len(meant) == 1 else None


def what_is_at(rng: np.random.Generator, scene: Scene) -> Turn:
    there = {thing.place: f"a {thing}" for thing in scene}
    place = choice(rng, list(there)) if rng.random() < 0.7 else int(rng.integers(len(PLACES)))
    return Turn("at", f"What is at the {PLACES[place]}?", there.get(place, "nothing"))


def count_things(rng: np.random.Generator, scene: Scene) -> Turn:
    group = int(rng.integers(3))
    if group == 0:
        return either_form(rng, "count", "How many shapes are there?", f"{len(scene)}", f"I see {len(scene)} shapes.")
    what, number = some_group(rng, scene)
    return either_form(rng, "count", f"How many {what} are there?", f"{number}", f"I see {number} {what}.")


def is_there(rng: np.random.Generator, scene: Scene) -> Turn:
    thing = scene[int(rng.integers(len(scene)))]
    colours, shapes = [t.colour for t in scene] + [choice(rng, list(COLOURS))], [t.shape for t in scene]
    asked = str(thing)
    if rng.random() < 0.5:  # of what is in the picture, but not necessarily together
        asked = f"{choice(rng, colours)} {choice(rng, [*shapes, choice(rng, list(SHAPES))])}"
    answer = "yes" if asked in map(str, scene) else "no"
    sentence = f"{answer.capitalize()}, there is {'a' if answer == 'yes' else 'no'} {asked}."
    return either_form(rng, "is there", f"Is there a {asked}?", answer, sentence)


def left_of(rng: np.random.Generator, scene: Scene) -> Turn | None:
    one, other = only(rng, scene, str), only(rng, scene, str)
    if one is None or other is None or one.at[0] == other.at[0]:
        return None
    left, right = (one, other) if one.at[0] < other.at[0] else (other, one)
    question = f"Which is further left, the {one} or the {other}?"
    return either_form(rng, "left of", question, f"the {left}", f"The {left} is left of the {right}.")


def next_to(rng: np.random.Generator, scene: Scene) -> Turn | None:
    thing, side = only(rng, scene, str), choice(rng, list(SIDES))
    if thing is None:
        return None
    column, row = thing.at[0] + SIDES[side][0], thing.at[1] + SIDES[side][1]
    there = [other for other in scene if other.at == (column, row)]
    if not there and rng.random() < 0.7:  # else most answers would be "nothing"
        return None
    answer = f"a {there[0]}" if there else "nothing"
    if column in (0, 1) and row in (0, 1):  # found first, then told
        answer = f"{PLACES[2 * row + column]}: {answer}"
    return Turn("next to", f"What is {side} the {thing}?", answer)


def as_many(rng: np.random.Generator, scene: Scene) -> Turn | None:
    (one, first), (other, second) = some_group(rng, scene), some_group(rng, scene)
    if one == other or not (first or second) or (first != second and rng.random() < 0.4):
        return None
    answer = f"{first} {one}, {second} {other}: {'yes' if first == second else 'no'}"  # counted first, then told
    return Turn("as many", f"Are there as many {one} as {other}?", answer)


def what_is_there(rng: np.random.Generator, scene: Scene) -> Turn:
    return Turn("list", "What is in the picture?", ", ".join(f"a {thing}" for thing in scene))


Ask = Callable[[np.random.Generator, Scene], Turn | None]
ABOUT_ONE: tuple[Ask, ...] = (
    *(colour, shape, where, what_is_at, count_things, is_there, left_of, next_to, as_many, what_is_there),
)


def about_two(rng: np.random.Generator, scenes: Sequence[Scene]) -> Turn:
    if rng.random() < 0.5:
        first, second = map(len, scenes)
        answer = "both" if first == second else "the first" if first > second else "the second"
        return Turn("two pictures", "Which picture has more shapes?", answer)
    seen = [str(thing) for scene in scenes for thing in scene]
    asked = choice(rng, seen) if rng.random() < 0.8 else f"{choice(rng, list(COLOURS))} {choice(rng, list(SHAPES))}"
    has = (asked in map(str, scenes[0]), asked in map(str, scenes[1]))
    answer = {(True, True): "both", (True, False): "the first", (False, True): "the second"}.get(has, "neither")
    return Turn("two pictures", f"Which picture has a {asked}?", answer)


def some_group(rng: np.random.Generator, scene: Scene) -> tuple[str, int]:
    """Some shapes by name, such as circles or red shapes, mostly ones that are there, and how many they are."""
    thing = scene[int(rng.integers(len(scene)))]
    absent = rng.random() < 0.2
    if rng.random() < 0.5:
        shape = choice(rng, list(SHAPES)) if absent else thing.shape
        return SHAPES[shape], sum(t.shape == shape for t in scene)
    colour = choice(rng, list(COLOURS)) if absent else thing.colour
    return f"{colour} shapes", sum(t.colour == colour for t in scene)


def only(rng: np.random.Generator, scene: Scene, key: Callable[[Thing], str]) -> Thing | None:
    """One of the things that `key` tells from all others; None if there is none."""
    keys = [key(thing) for thing in scene]
    single = [thing for thing in scene if keys.count(key(thing)) == 1]
    return single[int(rng.integers(len(single)))] if single else None


def either_form(rng: np.random.Generator, kind: str, question: str, answer: str, sentence: str) -> Turn:
    """The short answer, or, asked for, a sentence."""
    if rng.random() < 0.25:
        return Turn(kind, f"{question} {IN_A_SENTENCE}", sentence)
    return Turn(kind, question, answer)


# ----------------------------------------------------------------------------------------------------- what is computed
def text_only(rng: np.random.Generator, split: str, count: int) -> tuple[list[Turn], list[Scene]]:
    """`count` questions that need no picture."""
    turns: list[Turn] = []
    while len(turns) < count:
        turn = ABOUT_TEXT[int(rng.integers(len(ABOUT_TEXT)))](rng)
        if split_of(turn.question) == split:
            turns.append(turn)
    return turns, []


def add(rng: np.random.Generator) -> Turn:
    a, b = rng.integers(0, 40, size=2)
    return Turn("sum", f"What is {a} plus {b}?", f"{a + b}")


def reverse(rng: np.random.Generator) -> Turn:
    word = some_word(rng)
    return Turn("reverse", f"Reverse {word}.", word[::-1])


def sort(rng: np.random.Generator) -> Turn:
    word = some_word(rng)
    return Turn("sort", f"Sort the letters of {word}.", "".join(sorted(word)))


def count_letters(rng: np.random.Generator) -> Turn:
    word = some_word(rng, alphabet="ABC", longest=6)
    letter = choice(rng, list("ABC"))
    return Turn("letters", f"How often is {letter} in {word}?", f"{word.count(letter)}")


def some_word(rng: np.random.Generator, alphabet: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", longest: int = 4) -> str:
    return "".join(choice(rng, list(alphabet)) for _ in range(int(rng.integers(3, longest + 1))))


ABOUT_TEXT: tuple[Callable[[np.random.Generator], Turn], ...] = (add, reverse, sort, count_letters)

SAMPLERS: dict[str, Callable[[np.random.Generator, str, int], tuple[list[Turn], list[Scene]]]] = {
    "scan": scan,
    "tell": tell,
    "look up": look_up,
    "drill": drill,
    "one picture": one_picture,
    "two pictures": two_pictures,
    "text": text_only,
}


def choice(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


# -------------------------------------------------------------------------------------------------------------- drawing
def draw(rng: np.random.Generator, scene: Scene) -> bytes:
    """A scene as an encoded picture, 32 to 128 pixels wide and high, at most 1.6 times as long as the other way."""
    width = int(rng.integers(32, 129))
    height = int(np.clip(round(width * 1.6 ** rng.uniform(-1, 1)), 32, 128))
    background = tuple(int(x) for x in rng.integers(225, 256, size=3))
    picture = Image.new("RGB", (width, height), background)
    pen = ImageDraw.Draw(picture)
    for thing in scene:
        column, row = thing.at
        side = min(width, height) / 2 * rng.uniform(0.65, 0.9)
        left = (width / 2) * column + (width / 2 - side) * rng.uniform(0.25, 0.75)
        top = (height / 2) * row + (height / 2 - side) * rng.uniform(0.25, 0.75)
        _draw_thing(pen, thing, left, top, side)
    encoded = io.BytesIO()
    picture.save(encoded, format=choice(rng, FORMATS))
    return encoded.getvalue()


def _draw_thing(pen: Any, thing: Thing, left: float, top: float, side: float) -> None:
    right, bottom, ink = left + side, top + side, COLOURS[thing.colour]
    if thing.shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=ink)
    elif thing.shape == "square":
        pen.rectangle((left, top, right, bottom), fill=ink)
    elif thing.shape == "triangle":
        pen.polygon([((left + right) / 2, top), (left, bottom), (right, bottom)], fill=ink)
    else:
        third = side / 3
        pen.rectangle((left + third, top, right - third, bottom), fill=ink)
        pen.rectangle((left, top + third, right, bottom - third), fill=ink)
