"""Questions about named drawings, from the npm packages `emoji-datasource-HAND`, for a vision tower to learn from.

The same things are drawn by several hands, so that a hand can be held out as well as names: what a tower has learnt to
see, and what it merely remembers, are told apart. `emoji.yaml` has the questions and their answers.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from vlskv_ray.command import DONE, exit_status

REMEDY = "wanted an unpacked package: npm pack emoji-datasource-twitter, then tar xf"
READ = ("name", "image", "category", "subcategory")
"""Of an entry of emoji.json."""
OPTIONAL = {"Flags": "flags", "Symbols": "symbols"}
"""Categories that are read only if the option is given."""
MAX_TRIES = 50

Row = dict[str, Any]


@dataclass(frozen=True)
class Wording:
    """What `emoji.yaml` holds."""

    questions: Mapping[str, Sequence[Sequence[str]]]
    """By form; each a question, its answer and, of the form truth, its answer where the claim is wrong."""
    kinds: Mapping[str, str]
    names: Mapping[str, str]
    """What emoji.json calls otherwise than people do, by that name in small letters."""
    bare: frozenset[str]
    """Names without an article."""
    capitals: Mapping[str, str]
    """Words with capitals, by the same in small letters."""

    @classmethod
    def read(cls) -> "Wording":
        held = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
        capitals = {word.lower(): word for word in held["capitals"]}
        return cls(held["questions"], held["kinds"], held["names"], frozenset(held["bare"]), capitals)

    def name_of(self, unicode_name: str) -> str | None:
        """A name in plain English; None for what nobody would name so: families by their members, turned copies."""
        name = unicode_name.replace("’", "'")
        name = name.lower() if name.isupper() else name
        if "," in name or name.endswith(" facing right"):
            return None
        if name.lower() in self.names:
            return self._capitalised(self.names[name.lower()])
        if country := re.fullmatch(r"(.+) [Ff]lag", name):
            return f"the flag of {country[1]}" if country[1] != country[1].lower() else f"{country[1]} flag"
        name = re.sub(r"^clock face (\S+?)(?: o'?clock)?$", r"clock showing \1", name)
        name = re.sub(r"^(wo)?mans ", r"\1man's ", name)
        name = re.sub(r": ", " with ", name)
        return self._capitalised(re.sub(r"(?<=.) (sign|symbol)$", "", name))

    def _capitalised(self, name: str) -> str:
        """With the capitals that words of it have anywhere."""
        return re.sub(r"[a-z]+", lambda word: self.capitals.get(word[0], word[0]), name)

    def kind_of(self, subcategory: str) -> str | None:
        """What kind of thing it is, with an article; None where there is no word for it."""
        fitting = [beginning for beginning in self.kinds if subcategory.startswith(beginning)]
        return self.kinds[max(fitting, key=len)] if fitting else None

    def with_article(self, name: str, article: str | None = None) -> str:
        """The name with this article; None: a or an, but for plurals and what stands without one."""
        if name.startswith("the "):
            return name
        is_bare = name in self.bare
        if article is not None:
            return name if is_bare and name[0].isupper() else f"{article} {name}"
        head = re.split(r" (?:with|of|in|and|on|at|behind|without|over|under|to|for|[a-z]+ing)\b", name)[0]
        is_plural = re.search(r"(?<![suio])s$", head) is not None or re.match(r"(?:two|three) ", name) is not None
        if is_bare or is_plural:
            return name
        is_an = re.match(r"(?!uni|eu|one\b|us)[aeiou]|hour|x-", name.lower())
        return f"{'an' if is_an else 'a'} {name}"


@dataclass(frozen=True)
class Picture:
    """A drawing of a named thing by one hand."""

    hand: str
    name: str
    kind: str | None
    """With an article."""
    file: Path
    colour: str | None
    """The one that most of it has, if one has."""

    @property
    def family(self) -> str:
        """The same for names that tell a man, a woman and a person apart, or an animal and its face: they are drawn so
        alike that they are held out together."""
        words = re.sub(r"\b(?:man|woman|men|women|people|person|pair of|child|older)\b", "", self.name.lower())
        return " ".join(words.removesuffix(" face").split()) or "person"

    def is_unlike(self, other: "Picture") -> bool:
        """Whether the name of the other is wrong for this one: train is not wrong for a high-speed train."""
        ours, theirs = set(self.family.split()), set(other.family.split())
        return not (ours <= theirs or theirs <= ours)


# --------------------------------------------------------------------------------------------------------- the packages
def read_hand(folder: Path, wording: Wording, optional: Iterable[str] = ()) -> list[Picture]:
    """The drawings of an unpacked package, in the order of its emoji.json.

    Args:
        folder: of the package, or the one above it that `tar` makes.
        wording: how things are called.
        optional: the categories of OPTIONAL to be read too.

    Raises:
        ValueError: the folder is no such package, or a file in it cannot be used.
    """
    folder = folder / "package" if (folder / "package" / "emoji.json").exists() else folder
    if not (folder / "emoji.json").exists():
        raise ValueError(f"{folder}: holds no emoji.json; {REMEDY}")
    drawn = sorted(folder.glob("img/*/64"))
    if len(drawn) != 1:
        raise ValueError(f"{folder}: holds {len(drawn)} folders img/HAND/64; {REMEDY}")
    skipped = OPTIONAL.keys() - set(optional) | {"Component"}  # components are swatches of skin
    pictures, seen = [], set()
    for entry in _entries(folder / "emoji.json"):
        name, file = wording.name_of(entry["name"]), drawn[0] / Path(entry["image"]).name
        if name is None or entry["category"] in skipped or not file.exists():  # no hand has drawn all of them
            continue
        digest = hashlib.sha256(file.read_bytes()).digest()
        if digest not in seen:  # else one drawing would have two names
            seen.add(digest)
            kind = wording.kind_of(entry["subcategory"])
            pictures.append(Picture(drawn[0].parent.name, name, kind, file, main_colour(file)))
    return pictures


def _entries(file: Path) -> Iterator[Mapping[str, str]]:
    """The entries of an emoji.json; variants with other skins, which are within them, are left out."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {REMEDY}") from error
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        held = [isinstance(entry, dict) and isinstance(entry.get(key), str) for key in READ]
        if not all(held):
            raise ValueError(f"{file}: entry {number} has no text {READ[held.index(False)]!r}; {REMEDY}")
        yield entry


HUES = ((15, "red"), (40, "orange"), (70, "yellow"), (165, "green"), (260, "blue"), (295, "purple"), (345, "pink"))
"""Degrees up to which a hue is called so; red beyond."""


def main_colour(file: Path) -> str | None:
    """The colour of more than half of a picture's opaque pixels. ValueError if the file is no picture."""
    try:
        with Image.open(file) as image:
            rgba = image.convert("RGBA")
    except OSError as error:
        raise ValueError(f"{file}: cannot be read as a picture; unpack the package again ({error})") from error
    opaque = np.asarray(rgba)[..., 3] > 127
    hue, saturation, value = np.asarray(rgba.convert("RGB").convert("HSV"))[opaque].T.astype(int)
    if not len(hue):
        return None
    limits, names = zip(*HUES, strict=True)
    colour = np.array([*names, "red"])[np.searchsorted(limits, hue * 360 / 256, side="right")].astype("U6")
    colour[np.isin(colour, ("orange", "red")) & (value < 150) & (hue < 40)] = "brown"
    grey = np.select([value < 70, value > 215], ["black", "white"], "grey")
    is_grey = (saturation < 55) | (value < 40) | (value < 80) & (saturation < 110)  # of 255; drawn greys are bluish
    colour = np.where(is_grey, grey, colour)
    found, counts = np.unique(colour, return_counts=True)
    return str(found[counts.argmax()]) if 2 * counts.max() > len(hue) else None


# ------------------------------------------------------------------------------------------------------------- the rows
def split_pictures(
    pictures: Sequence[Picture], held_out_hand: str, share: float, rng: random.Random
) -> dict[str, list[Picture]]:
    """The pictures of each set: what is in a held-out one is, in hand or name or both, in no row of the training."""
    families: dict[str, set[str]] = defaultdict(set)
    for picture in pictures:
        families[picture.family].add(picture.name)
    wanted = share * sum(map(len, families.values()))
    held_out: set[str] = set()
    for family in rng.sample(sorted(families), len(families)):
        if len(held_out) < wanted:
            held_out |= families[family]
    sets: dict[str, list[Picture]] = {"train": [], "held-out-hand": [], "held-out-names": [], "held-out-both": []}
    for picture in pictures:
        is_hand, is_name = picture.hand == held_out_hand, picture.name in held_out
        sets[(("train", "held-out-names"), ("held-out-hand", "held-out-both"))[is_hand][is_name]].append(picture)
    return sets


def rows_of(pictures: Sequence[Picture], wording: Wording, num_questions: int, rng: random.Random) -> Iterator[Row]:
    """Rows that ask about each picture, in the chat layout; whatever else they show or name is of these pictures too.

    Raises:
        ValueError: a picture is of the only thing among them, so that it cannot be told from another.
    """
    alike: dict[str | None, list[Picture]] = defaultdict(list)
    for picture in pictures:
        alike[picture.kind].append(picture)
    for picture in pictures:
        forms = [form for form in wording.questions if _is_fit(form, picture)]
        for form in rng.sample(forms, min(num_questions, len(forms))):
            other = _other(picture, alike[picture.kind] if rng.random() < 0.5 else pictures, pictures, rng)
            yield _row(form, picture, other, wording, rng)


def _is_fit(form: str, picture: Picture) -> bool:
    """Whether questions of this form can be asked of a picture."""
    if form == "kind":
        return picture.kind is not None
    return form not in ("colour", "describe") or picture.colour is not None


def _other(picture: Picture, wanted: Sequence[Picture], any_of: Sequence[Picture], rng: random.Random) -> Picture:
    """A picture of something else: of those wanted if there is one."""
    for chosen in (wanted, any_of):
        for _ in range(MAX_TRIES):
            if picture.is_unlike(other := rng.choice(chosen)):
                return other
    if unlike := [other for other in any_of if picture.is_unlike(other)]:
        return rng.choice(unlike)
    raise ValueError(f"nothing among the {len(any_of)} pictures is unlike {picture.name!r}")


def _row(form: str, picture: Picture, other: Picture, wording: Wording, rng: random.Random) -> Row:
    """One question about a picture; of two pictures, if its form says so."""
    is_first, is_true = rng.random() < 0.5, rng.random() < 0.5
    question, *answers = rng.choice(wording.questions[form])
    a_name, a_other = wording.with_article(picture.name), wording.with_article(other.name)
    first, second = (picture, other) if is_first else (other, picture)
    slots = {
        "a_name": a_name,
        "the_name": wording.with_article(picture.name, "the"),
        "a_other": a_other,
        "one": a_name if is_first else a_other,
        "two": a_other if is_first else a_name,
        "kind": picture.kind,
        "other_kind": rng.choice(sorted({*wording.kinds.values()} - {picture.kind})),
        "colour": picture.colour,
        "other_colour": rng.choice(sorted({colour for _, colour in HUES} - {picture.colour})),
        "claim": a_name if is_true else a_other,
        "which": "first" if is_first else "second",
        "not_which": "second" if is_first else "first",
        "a_first": wording.with_article(first.name),
        "a_second": wording.with_article(second.name),
    }
    shown = [first, second] if form.startswith("two") else [picture]
    text = answers[-1 if form == "truth" and not is_true else 0].format(**slots)
    parts = [{"type": "image"} for _ in shown] + [{"type": "text", "text": question.format(**slots)}]
    return {
        "form": form,
        "hand": picture.hand,
        "thing": picture.name,
        "images": [f"pictures/{each.hand}/{each.file.name}" for each in shown],
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": text[0].upper() + text[1:]}],
    }


# ---------------------------------------------------------------------------------------------------------- the command
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    return exit_status(lambda: make(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m recipes.emoji", description=__doc__, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="an unpacked emoji-datasource-HAND")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where rows and pictures go")
    parser.add_argument("--held-out-hand", required=True, metavar="HAND", help="whose drawings are not trained on")
    parser.add_argument("--held-out-names", type=float, default=0.1, metavar="SHARE", help="of all names (default 0.1)")
    parser.add_argument(
        "--questions", type=int, default=4, metavar="N", help="about each picture, each of another form (default 4)"
    )
    parser.add_argument("--flags", action="store_true", help="flags too")
    parser.add_argument("--symbols", action="store_true", help="arrows, shapes and signs too")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which names and questions (default 0)")
    return parser.parse_args(arguments)


def make(options: argparse.Namespace) -> int:
    """Writes rows and pictures; says how many. ValueError for options that cannot be followed."""
    if options.output.exists():
        raise ValueError(f"--output: {options.output} is there already; name another folder, or delete it")
    if not 0 < options.held_out_names < 1:
        raise ValueError(f"--held-out-names: {options.held_out_names}; wanted a share between 0 and 1, such as 0.1")
    if options.questions < 1:
        raise ValueError(f"--questions: {options.questions}; wanted at least 1")
    wording = Wording.read()
    pictures = _pictures(options, wording)
    rng = random.Random(f"{options.seed}/names")
    sets = split_pictures(pictures, options.held_out_hand, options.held_out_names, rng)
    rows = {name: _rows_of_set(name, chosen, wording, options) for name, chosen in sets.items()}
    unfinished = options.output.with_name(f"{options.output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for picture in pictures:
        copy = unfinished / "pictures" / picture.hand / picture.file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture.file, copy)
    for name, chosen in sets.items():
        lines = [json.dumps({"id": f"{name}-{number}"} | row) for number, row in enumerate(rows[name], 1)]
        (unfinished / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        things, hands = len({picture.name for picture in chosen}), sorted({picture.hand for picture in chosen})
        about = f"about {len(chosen):,} pictures of {things:,} names by {', '.join(hands)}"
        print(f"{options.output / name}.jsonl: {len(lines):,} rows {about}")
    os.rename(unfinished, options.output)
    return DONE


def _rows_of_set(name: str, pictures: Sequence[Picture], wording: Wording, options: argparse.Namespace) -> list[Row]:
    """ValueError for a set too small to ask about."""
    try:
        if not pictures:
            raise ValueError("no picture is left for it")
        return list(rows_of(pictures, wording, options.questions, random.Random(f"{options.seed}/{name}")))
    except ValueError as error:
        share = f"--held-out-names={options.held_out_names}"
        raise ValueError(f"{name}: {error}; hold out more or fewer names ({share}), or another seed") from error


def _pictures(options: argparse.Namespace, wording: Wording) -> list[Picture]:
    """The pictures of all packages. ValueError unless they are by different hands, the held-out one among others."""
    optional = [category for category, option in OPTIONAL.items() if getattr(options, option)]
    by_hand: dict[str, list[Picture]] = {}
    for folder in options.folders:
        pictures = read_hand(folder, wording, optional)
        if not pictures:
            raise ValueError(f"{folder}: none of its drawings is there; {REMEDY}")
        if (hand := pictures[0].hand) in by_hand:
            raise ValueError(f"{folder}: drawings by {hand}, which another folder has too; give each hand once")
        by_hand[hand] = pictures
    if options.held_out_hand not in by_hand or len(by_hand) < 2:
        given = ", ".join(by_hand)
        raise ValueError(f"--held-out-hand: {options.held_out_hand}; wanted one of at least two given, got {given}")
    return [picture for pictures in by_hand.values() for picture in pictures]


if __name__ == "__main__":
    sys.exit(main())
