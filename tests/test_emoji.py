"""Questions about named drawings: true, varied, the same by seed, and of nothing that is held out.

On packages of the layout of npm's, whose drawings are made here.
"""

import json
import random
import re
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
from PIL import Image, ImageDraw

from recipes import emoji
from recipes.emoji import Wording, main_colour
from vlskv_ray.config import SourceConfig
from vlskv_ray.data.images import load_image
from vlskv_ray.data.sources import open_source

Row = dict[str, Any]
WORDING = Wording.read()
COLOURS = {"red": "#dd2233", "yellow": "#ffcc4d", "green": "#33aa44", "blue": "#3366cc", "grey": "#99a0a5"}
NAMES = {
    "TOMATO": ("Food & Drink", "food-fruit", "red"),
    "BANANA": ("Food & Drink", "food-fruit", "yellow"),
    "GREEN APPLE": ("Food & Drink", "food-fruit", "green"),
    "DOG FACE": ("Animals & Nature", "animal-mammal", "yellow"),
    "OWL": ("Animals & Nature", "animal-bird", "grey"),
    "WHALE": ("Animals & Nature", "animal-marine", "blue"),
    "BLACK TELEPHONE": ("Objects", "phone", "red"),
    "JEANS": ("Objects", "clothing", "blue"),
    "KEY": ("Objects", "lock", "grey"),
    "WAVING HAND SIGN": ("People & Body", "hand-fingers-open", "yellow"),
    "MAN RUNNING": ("People & Body", "person-activity", "blue"),
    "RUNNER": ("People & Body", "person-activity", "green"),
    "HIGH-SPEED TRAIN": ("Travel & Places", "transport-ground", "grey"),
    "TRAIN": ("Travel & Places", "transport-ground", "blue"),
}
OTHERS = {  # not drawn by default, or never
    "France Flag": ("Flags", "country-flag", "blue"),
    "WHITE CHECK MARK": ("Symbols", "other-symbol", "green"),
    "MAN RUNNING FACING RIGHT": ("People & Body", "person-activity", "blue"),
    "FAMILY: MAN, BOY": ("People & Body", "family", "grey"),
    "EMOJI MODIFIER FITZPATRICK TYPE-3": ("Component", "skin-tone", "yellow"),
}
HANDS = ("twitter", "google", "apple")


def draw(file: Path, colour: str, number: int, hand: int) -> None:
    """Something of this colour that no other number and hand give, on a transparent ground."""
    picture = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(picture).ellipse((2 + hand, 2, 60, 30 + number), fill=COLOURS[colour])
    picture.save(file)


@pytest.fixture
def packages(tmp_path: Path) -> list[Path]:
    folders = []
    for hand, name in enumerate(HANDS):
        folder = tmp_path / f"emoji-datasource-{name}" / "package"
        (folder / "img" / name / "64").mkdir(parents=True)
        entries = []
        for number, (called, (category, subcategory, colour)) in enumerate({**NAMES, **OTHERS}.items()):
            entry = {"name": called, "image": f"{number}.png", "category": category, "subcategory": subcategory}
            skin = {"1F3FB": {"image": f"{number}-1f3fb.png"}} if category == "People & Body" else {}
            entries.append(entry | ({"skin_variations": skin} if skin else {}))
            draw(folder / "img" / name / "64" / f"{number}.png", colour, number, hand)
            for variation in skin.values():
                draw(folder / "img" / name / "64" / variation["image"], "grey", number, hand)
        (folder / "emoji.json").write_text(json.dumps(entries))
        folders.append(folder.parent)
    return folders


def make(packages: list[Path], output: Path, *options: str) -> dict[str, list[Row]]:
    """The rows of each set."""
    names = ["--held-out-names", "0.4"] if "--held-out-names" not in options else []
    given = [*map(str, packages), "--output", str(output), "--held-out-hand", "google", *names, *options]
    assert emoji.main(given) == 0
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in output.glob("*.jsonl")}


def said(row: Row) -> tuple[str, str]:
    question, answer = row["messages"]
    return question["content"][-1]["text"], answer["content"]


def names_in(row: Row) -> set[str]:
    """The drawings that a row speaks of."""
    text = " ".join(said(row)).lower()
    return {plain for name in NAMES if (plain := WORDING.name_of(name)) and re.search(rf"\b{plain}\b", text)}


def test_nothing_that_is_held_out_is_in_the_training(packages: list[Path], tmp_path: Path) -> None:
    """Neither is a held-out name in its words nor a held-out hand among its pictures; each set has the others' rest."""
    sets = make(packages, tmp_path / "out", "--questions", "8")
    assert sets.keys() == {"train", "held-out-hand", "held-out-names", "held-out-both"}
    things = {name: {row["thing"] for row in rows} for name, rows in sets.items()}
    hands = {name: {image.split("/")[1] for row in rows for image in row["images"]} for name, rows in sets.items()}
    assert things["train"] == things["held-out-hand"] and things["held-out-names"] == things["held-out-both"]
    assert not things["train"] & things["held-out-names"]
    assert len(things["train"] | things["held-out-names"]) == len(NAMES)
    assert hands["train"] == hands["held-out-names"] == {"twitter", "apple"}
    assert hands["held-out-hand"] == hands["held-out-both"] == {"google"}
    for name, rows in sets.items():
        for row in rows:
            assert names_in(row) - {"train"} <= things[name]  # which may stand within "high-speed train"


def test_names_that_are_drawn_alike_are_held_out_together(packages: list[Path]) -> None:
    """Whichever they are: a man who runs and a person who does."""
    pictures = [picture for folder in packages for picture in emoji.read_hand(folder, WORDING)]
    runners = {"man running", "person running"}
    held_out = []
    for seed in range(10):
        sets = emoji.split_pictures(pictures, "google", 0.4, random.Random(seed))
        names = {name: {picture.name for picture in chosen} for name, chosen in sets.items()}
        assert runners <= names["train"] or runners <= names["held-out-names"]
        held_out.append(runners <= names["held-out-names"])
    assert {*held_out} == {True, False}


def test_the_rows_are_the_packages(packages: list[Path], tmp_path: Path) -> None:
    """Each is a sample, and each of its pictures opens."""
    for name, rows in make(packages, tmp_path / "out").items():
        source = open_source(SourceConfig(path=str(tmp_path / "out" / f"{name}.jsonl")))
        assert source.num_rows == len(rows) == len({row["id"] for row in rows})
        for number, row in enumerate(rows):
            sample = source.read(number)
            assert len(sample.images) == len(row["images"]) == 1 + row["form"].startswith("two")
            assert [load_image(image).size for image in sample.images] == [(64, 64)] * len(sample.images)


def test_answers_are_true(packages: list[Path], tmp_path: Path) -> None:
    """Of every form, and of claims both ways."""
    colours = {WORDING.name_of(name): colour for name, (_, _, colour) in NAMES.items()}
    kinds = {WORDING.name_of(name): WORDING.kind_of(kind) for name, (_, kind, _) in NAMES.items()}
    rows = [row for rows in make(packages, tmp_path / "out", "--questions", "8").values() for row in rows]
    shown = {row["images"][0].split("/", 2)[2]: row["thing"] for row in rows if len(row["images"]) == 1}
    assert {row["form"] for row in rows} == WORDING.questions.keys()
    claims = []
    for row in rows:
        (question, answer), thing, form = said(row), row["thing"], row["form"]
        things = [shown[image.split("/", 2)[2]] for image in row["images"]]
        assert thing in things and len(set(things)) == len(things)
        if form in ("name", "either", "describe"):
            assert thing in answer
        if form in ("describe", "colour"):
            assert re.search(rf"\b{colours[thing]}\b", answer)
        if form == "kind":
            assert kinds[thing] and str(kinds[thing]) in answer
        if form == "either":
            assert len(names_in(row) - {"train"}) >= 1 and re.search(rf"\b{thing}\b", question)
        if form == "truth":
            is_true = WORDING.with_article(thing) in question
            claims.append(is_true)
            assert re.match("Yes|True" if is_true else "No|False", answer), (question, answer)
        if form == "two_which":
            place = "first" if things[0] == thing else "second"
            told = re.findall("first|second", answer.lower())
            assert told == [place] or (
                "not show" in question and told == [{"first": "second", "second": "first"}[place]]
            )
        if form == "two_name":
            assert all(each in answer for each in things) or (answer.count(thing) == 1 and things.count(thing) == 1)
    assert {True, False} <= set(claims)


def test_the_same_seed_gives_the_same_rows(packages: list[Path], tmp_path: Path) -> None:
    first = make(packages, tmp_path / "first")
    assert make(packages, tmp_path / "again") == first
    assert make(packages, tmp_path / "other", "--seed", "1") != first
    files = [
        sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*")) for name in ("first", "again")
    ]
    assert files[0] == files[1]


def test_what_is_left_out(packages: list[Path], tmp_path: Path) -> None:
    """Skins, turned copies and families; flags and symbols unless they are asked for; what a hand has not drawn."""
    (packages[0] / "package" / "img" / "twitter" / "64" / "0.png").unlink()
    plain = make(packages, tmp_path / "plain")
    copied = {file.relative_to(tmp_path / "plain" / "pictures") for file in (tmp_path / "plain").rglob("*.png")}
    assert copied == {Path(hand) / f"{n}.png" for hand in HANDS for n in range(len(NAMES))} - {Path("twitter/0.png")}
    more = make(packages, tmp_path / "more", "--flags", "--symbols")
    things = [{row["thing"] for rows in sets.values() for row in rows} for sets in (plain, more)]
    assert things[1] - things[0] == {"the flag of France", "white check mark"}


@pytest.mark.parametrize(
    ("unicode_name", "plain", "with_article"),
    [
        ("SMILING FACE WITH OPEN MOUTH", "smiling face with open mouth", "a smiling face with open mouth"),
        ("WAVING HAND SIGN", "waving hand", "a waving hand"),
        ("OWL", "owl", "an owl"),
        ("HOURGLASS", "hourglass", "an hourglass"),
        ("UNICORN FACE", "unicorn face", "a unicorn face"),
        ("ONE-PIECE SWIMSUIT", "one-piece swimsuit", "a one-piece swimsuit"),
        ("X-RAY", "x-ray", "an x-ray"),
        ("BALLET SHOES", "ballet shoes", "ballet shoes"),
        ("NEST WITH EGGS", "nest with eggs", "a nest with eggs"),
        ("WOMAN LIFTING WEIGHTS", "woman lifting weights", "a woman lifting weights"),
        ("CACTUS", "cactus", "a cactus"),
        ("DRESS", "dress", "a dress"),
        ("BREAD", "bread", "bread"),
        ("HEAVY BLACK HEART", "red heart", "a red heart"),
        ("WOMANS HAT", "woman's hat", "a woman's hat"),
        ("RESCUE WORKER’S HELMET", "rescue worker's helmet", "a rescue worker's helmet"),
        ("MAN: CURLY HAIR", "man with curly hair", "a man with curly hair"),
        ("CLOCK FACE ONE OCLOCK", "clock showing one", "a clock showing one"),
        ("JAPANESE OGRE", "Japanese ogre", "a Japanese ogre"),
        ("FATHER CHRISTMAS", "Father Christmas", "Father Christmas"),
        ("STATUE OF LIBERTY", "the Statue of Liberty", "the Statue of Liberty"),
        ("Germany Flag", "the flag of Germany", "the flag of Germany"),
        ("FAMILY: MAN, BOY", None, None),
        ("WOMAN RUNNING FACING RIGHT", None, None),
    ],
)
def test_names_are_plain_english(unicode_name: str, plain: str | None, with_article: str | None) -> None:
    name = WORDING.name_of(unicode_name)
    assert name == plain
    if name is not None:
        assert WORDING.with_article(name) == with_article
        stands_alone = name.startswith("the ") or name == "Father Christmas"
        assert WORDING.with_article(name, "the") == (name if stands_alone else f"the {name}")


def test_questions_are_worded_in_many_ways() -> None:
    """No two are alike, and what they leave to be filled in is what the page on top says."""
    page = Path(emoji.__file__).with_suffix(".yaml").read_text()
    head = page[: page.index("\nquestions:")]
    slots = set(re.findall(r"{(\w+)}", head))
    asked = [question for templates in WORDING.questions.values() for question, *_ in templates]
    assert len(set(asked)) == len(asked) >= 25
    readme = (Path(emoji.__file__).parent / "README.md").read_text()
    assert f" {len(asked)} wordings " in " ".join(readme.split())
    used: set[str | None] = set()
    for form, templates in WORDING.questions.items():
        for texts in templates:
            assert len(texts) == (3 if form == "truth" else 2)
            fields = {field for text in texts for _, field, _, _ in Formatter().parse(text)} - {None}
            used |= fields
    assert used == slots


@pytest.mark.parametrize(
    ("fill", "colour"),
    [
        ("#ff0000", "red"),
        ("#ffcc4d", "yellow"),
        ("#ff99bb", "pink"),
        ("#8844cc", "purple"),
        ("#8a4b38", "brown"),
        ("#ffffff", "white"),
        ("#66757f", "grey"),
        ("#292f33", "black"),
    ],
)
def test_the_colour_is_that_of_most_of_a_picture(tmp_path: Path, fill: str, colour: str) -> None:
    """And none where no colour has more than half; what is transparent has none."""
    picture = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    ImageDraw.Draw(picture).rectangle((0, 0, 9, 9), fill=fill)
    picture.save(tmp_path / "one.png")
    assert main_colour(tmp_path / "one.png") == colour
    ImageDraw.Draw(picture).rectangle((10, 0, 19, 9), fill="#33aa44")
    picture.save(tmp_path / "two.png")
    assert main_colour(tmp_path / "two.png") is None
    Image.new("RGBA", (4, 4)).save(tmp_path / "none.png")
    assert main_colour(tmp_path / "none.png") is None


def test_what_is_wrong_is_one_line(packages: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It names the option or file and the remedy, and nothing is written."""

    def told(*options: str, folders: list[Path] = packages) -> str:
        output = [] if "--output" in options else ["--output", str(tmp_path / "out")]
        hand = [] if "--held-out-hand" in options else ["--held-out-hand", "google"]
        assert emoji.main([*map(str, folders), *output, *hand, *options]) == 2
        assert not (tmp_path / "out").exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--held-out-hand: facebook; wanted one of at least two given, got twitter, " in told(
        "--held-out-hand", "facebook"
    )
    assert "wanted one of at least two" in told(folders=packages[1:2])
    assert "another folder has too; give each hand once" in told(folders=[packages[1], packages[1]])
    assert "is there already; name another folder" in told("--output", str(packages[0]))
    assert "--held-out-names: 1.5; wanted a share" in told("--held-out-names", "1.5")
    assert "--questions: 0; wanted at least 1" in told("--questions", "0")
    assert re.search(
        "train: (no picture|nothing among).*; hold out more or fewer names", told("--held-out-names", "0.99")
    )
    assert "holds no emoji.json; wanted an unpacked package: npm pack" in told(folders=[tmp_path])
    picture = packages[2] / "package" / "img" / "apple" / "64" / "3.png"
    picture.write_bytes(picture.read_bytes()[:60])
    assert f"{picture}: cannot be read as a picture; unpack the package again" in told()
    listed = packages[1] / "package" / "emoji.json"
    listed.write_text('[{"name": "OWL", "image": null}]')
    assert f"{listed}: entry 1 has no text 'image'" in told()
    listed.write_text('[{"name":')
    assert f"{listed}: Expecting value" in told()
    (packages[0] / "package" / "img" / "twitter").rename(packages[0] / "package" / "img-twitter")
    assert "holds 0 folders img/HAND/64" in told()
