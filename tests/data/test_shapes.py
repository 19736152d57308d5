"""The built-in world: every answer follows from its picture or its question, and the splits share neither."""

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from vlskv_ray.data import shapes
from vlskv_ray.data.images import load_image
from vlskv_ray.data.sample import Sample
from vlskv_ray.data.shapes import COLOURS, DRILLS, LESSONS, PATTERN, PLACES, SHAPES, ShapesSource, Thing
from vlskv_ray.model.build import find_model
from vlskv_ray.model.processor import load_processor

ROWS = 320


def turns(sample: Sample) -> list[tuple[str, str, str]]:
    """Kind, question and answer of each turn."""
    texts = [[p["text"] for p in message["content"] if p["type"] == "text"][0] for message in sample.messages]
    return list(zip(sample.kinds, texts[::2], texts[1::2], strict=True))


def drawn(source: ShapesSource, row: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Sample, list[shapes.Scene]]:
    """A sample, and what its pictures show."""
    scenes: list[shapes.Scene] = []
    draw = shapes.draw
    monkeypatch.setattr(shapes, "draw", lambda rng, scene: (scenes.append(scene), draw(rng, scene))[1])
    sample = source.read(row)
    monkeypatch.undo()
    return sample, scenes


def found(text: str, scene: shapes.Scene) -> list[Thing]:
    """The things of a scene that a text names by colour and shape."""
    return [thing for thing in scene if str(thing) in text]


def expected(kind: str, question: str, scenes: list[shapes.Scene], before: str) -> str:
    """The short answer, worked out from what the pictures show in a way of its own."""
    scene = scenes[0] if scenes else ()
    at = {thing.place: thing for thing in scene}
    words = re.findall(r"\w+", question)

    def members(name: str) -> set[Thing]:
        return {t for t in scene if name in (SHAPES[t.shape], f"{t.colour} shapes", "shapes")}

    if kind == "scan":
        return ", ".join(str(at[i]) if i in at else "nothing" for i in range(4))
    if kind == "list":
        return ", ".join(f"a {at[i]}" for i in sorted(at))
    if kind == "colour":
        (thing,) = [t for t in scene if t.shape in words]
        return thing.colour
    if kind == "shape":
        (thing,) = [t for t in scene if t.colour in words]
        return thing.shape
    if kind == "where":
        said = set(words if "the" in words else re.findall(r"\w+", before))
        (thing,) = [t for t in scene if said & {*COLOURS, *SHAPES} <= {t.colour, t.shape}]
        return PLACES[thing.place]
    if kind == "at":
        (place,) = [i for i, name in enumerate(PLACES) if question == f"What is at the {name}?"]
        return f"a {at[place]}" if place in at else "nothing"
    if kind == "count":
        (name,) = re.findall(r"How many (.*) are there", question)
        return str(len(members(name)))
    if kind == "is there":
        return "yes" if found(question, scene) else "no"
    if kind == "left of":
        one, other = sorted(found(question, scene), key=lambda t: t.place % 2)
        assert one.place % 2 < other.place % 2
        return f"the {one}"
    if kind == "next to":
        (thing,) = found(question, scene)
        row, column = divmod(thing.place, 2)
        step = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}[words[2]]
        row, column = row + step[0], column + step[1]
        inside = 0 <= row < 2 and 0 <= column < 2
        there = f"a {at[2 * row + column]}" if inside and 2 * row + column in at else "nothing"
        return f"{PLACES[2 * row + column]}: {there}" if inside else there
    if kind == "as many":
        ((one, other),) = re.findall(r"as many (.*) as (.*)\?", question)
        first, second = len(members(one)), len(members(other))
        return f"{first} {one}, {second} {other}: {'yes' if first == second else 'no'}"
    if kind == "two pictures" and "more" in words:
        first, second = map(len, scenes)
        return "the first" if first > second else "the second" if second > first else "both"
    if kind == "two pictures":
        has = [bool(found(question, scene)) for scene in scenes]
        return {2: "both", 0: "neither"}.get(sum(has), "the first" if has[0] else "the second")
    if kind == "sum":
        a, b = re.findall(r"\d+", question)
        return str(int(a) + int(b))
    letters = re.findall(r"\b[A-Z]+\b", question)
    if kind == "reverse":
        return "".join(reversed(letters[-1]))
    if kind == "sort":
        return "".join(sorted(letters[-1]))
    assert kind == "letters"
    return str(letters[-1].count(letters[0]))


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_every_answer_is_right(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked out a second time; a sentence holds the short answer, and a no says that there is none."""
    source, kinds = ShapesSource(split, ROWS), Counter[str]()
    for row in range(ROWS):
        sample, scenes = drawn(source, row, monkeypatch)
        before = ""
        for kind, question, answer in turns(sample):
            kinds[kind] += 1
            if kind == "tell":
                told = sorted(sorted(part.split()) for part in answer.split(", "))
                assert told == sorted(sorted(f"{t} {PLACES[t.place]}".split()) for t in scenes[0])
                continue
            short = expected(kind, question, scenes, before)
            if shapes.IN_A_SENTENCE in question:
                assert answer.endswith(".") and short.lower() in answer.lower(), (row, question, answer, short)
                assert ("no" in answer.lower().split()) == (short == "no")
            else:
                assert answer == short, (row, question, answer, short)
            before = f"{question} {answer}"
    assert len(kinds) == {"lessons": 6, "drills": 6}.get(split, 16) and min(kinds.values()) >= 8, kinds


def test_the_splits_share_no_layout_and_no_text_question(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[Any]] = {}
    for split in shapes.SPLITS:
        source, seen[split] = ShapesSource(split, 960), set()
        for row in range(960):
            sample, scenes = drawn(source, row, monkeypatch)
            seen[split] |= {tuple(map(str, scene)) + tuple(t.place for t in scene) for scene in scenes}
            seen[split] |= {question for kind, question, _ in turns(sample) if not scenes}
    assert not (seen["train"] | seen["lessons"] | seen["drills"]) & seen["test"]
    assert min(map(len, seen.values())) > 500


def test_a_row_is_a_function_of_its_number() -> None:
    one, other = ShapesSource("train", 64), ShapesSource("train", 32)
    assert [one.read(i) for i in range(32)] == [other.read(i) for i in range(32)]
    assert one.read(0) != ShapesSource("test", 64).read(0)


@pytest.mark.parametrize(
    ("split", "pattern"), [("train", PATTERN), ("test", PATTERN), ("lessons", LESSONS), ("drills", DRILLS)]
)
def test_what_the_plan_is_told_is_so(split: str, pattern: tuple[tuple[str, int], ...]) -> None:
    source = ShapesSource(split, 48)
    for row in range(48):
        sample = source.read(row)
        assert source.num_images[row] == len(sample.images)
        assert len(sample.kinds) == pattern[row % len(pattern)][1]


def test_pictures_show_what_they_should() -> None:
    """The colour in the middle of a thing is its own; sizes and proportions vary."""
    rng, sizes = np.random.default_rng(0), set()
    for place in range(4):
        for colour in COLOURS:
            scene = (Thing(place, colour, "square"),)
            picture = load_image(shapes.draw(rng, scene))
            sizes.add(picture.size)
            x, y = ((place % 2 + 0.5) * picture.width / 2, (place // 2 + 0.5) * picture.height / 2)
            pixel = picture.getpixel((int(x), int(y)))
            assert isinstance(pixel, tuple)
            assert max(abs(a - b) for a, b in zip(pixel, COLOURS[colour], strict=True)) < 40, (colour, pixel)
    assert len(sizes) > 15 and {w > h for w, h in sizes} == {True, False}


def test_its_words_are_tokens() -> None:
    """Every word of the world is one token of its models, alone or after a space; letters are themselves."""
    tokenizer = load_processor(find_model("shapes-llava-next")).tokenizer
    for row in range(ROWS):
        for _, question, answer in turns(ShapesSource("train", ROWS).read(row)):
            for text in (question, answer):
                pieces = tokenizer.tokenize(text)
                assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
                words = [word for word in re.findall(r"[A-Za-z]+", text) if not word.isupper() or len(word) == 1]
                assert sum(len(piece.removeprefix("Ġ")) > 1 for piece in pieces) >= sum(len(w) > 1 for w in words), text


def test_a_split_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="no split 'validation'; wanted one of train, test, lessons, drills"):
        ShapesSource("validation")
