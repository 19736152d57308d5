"""A tower learns to name drawings by a hand that it has not seen, and goes into a language model's folder.

On packages of the layout of npm's, whose drawings are made here.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from test_assemble import assembled, text_folder
from transformers import AutoModelForImageTextToText

from recipes import tower
from recipes.tower import augment, class_means, codes, discriminant, on_white

THINGS = {"1f345": ("TOMATO", "#dd2233"), "1f34c": ("BANANA", "#ffcc4d"), "1f40b": ("WHALE", "#3366cc")}
THINGS |= {"1f989": ("OWL", "#99a0a5"), "1f511": ("KEY", "#33aa44"), "1f456": ("JEANS", "#8844bb")}


@pytest.fixture
def hands(tmp_path: Path) -> list[Path]:
    """Folders of three hands: the same things, each a little otherwise."""
    folders = []
    for hand in range(3):
        folder = tmp_path / f"hand{hand}" / "img" / f"hand{hand}" / "64"
        folder.mkdir(parents=True)
        entries = []
        for number, (code, (name, colour)) in enumerate(THINGS.items()):
            picture = Image.new("RGBA", (64, 64))
            box = (2 + hand, 2 + 8 * number, 40 + 2 * hand, 24 + 8 * number - hand)
            ImageDraw.Draw(picture).ellipse(box, fill=colour)
            picture.save(folder / f"{code}.png")
            entries.append({"name": name, "image": f"{code}.png", "category": "Objects", "subcategory": "tool"})
        (tmp_path / f"hand{hand}" / "emoji.json").write_text(json.dumps(entries))
        folders.append(folder)
    return folders


def test_it_names_what_another_hand_drew(
    tmp_path: Path, hands: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it has learnt is in the model that is assembled with it, and comes out of that as it went in."""
    monkeypatch.setattr(tower, "WARMUP_STEPS", 5)
    text = text_folder(tmp_path / "text")
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(json.dumps({"thing": name.lower()}) + "\n" for name, _ in THINGS.values()))
    learn = ["--text", str(text), "--names", str(tmp_path / "hand0"), "--rows", str(rows), "--draw"]
    learn += [f"{hand}={folder}" for hand, folder in zip("ab", hands, strict=False)]
    learn += ["--measure", f"c={hands[2]}", "--steps", "60", "--batch-size", "6", "--output", str(tmp_path / "tower")]
    assert tower.main(learn) == 0
    said = capsys.readouterr().out
    assert "12 drawings of 6 names by 2 hands" in said
    assert "c, not learnt from: 100.0% of 6 drawings named" in said

    folder = assembled(text, tmp_path / "whole", "--vision", str(tmp_path / "tower"))
    assert tower.main(["--extract", str(folder), "--output", str(tmp_path / "out")]) == 0
    for name in ("model.safetensors", "projector.safetensors"):
        before, after = (load_file(tmp_path / place / name) for place in ("tower", "out"))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.config.image_grid_pinpoints == [[64, 64]] and model.config.vision_feature_layer == -1
    assert tower.main(learn) == 2
    assert f"--output: {tmp_path}/tower is there already" in capsys.readouterr().err


def test_a_discriminant_whitens_what_differs_within_a_name() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(8).repeat(50)
    means = torch.randn(8, 5, generator=rng)
    values = means[labels] + torch.randn(400, 5, generator=rng) * torch.tensor([9.0, 3.0, 1.0, 1.0, 1.0]) + 7
    whitening, mean = discriminant(values, labels)
    white = (values - mean) @ whitening
    assert torch.isclose(white.std(), torch.tensor(1.0)) and white.mean(dim=0).abs().max() < 1e-4
    within = (white - class_means(white, labels)[labels]).std(dim=0)
    assert within.max() / within.min() < 3  # 9 before


def test_codes_are_at_right_angles_and_of_mean_0() -> None:
    drawn = codes(17, 144, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn @ drawn.T / 144, torch.eye(17), atol=1e-5)
    assert drawn.mean(dim=1).abs().max() < 1e-6


def test_augmented_drawings_differ_and_stay_on_their_ground() -> None:
    pixels = torch.zeros(40, 4, 64, 64, dtype=torch.uint8)
    pixels[:, 0, 20:44, 20:44], pixels[:, 3, 20:44, 20:44] = 255, 255
    seen = augment(pixels, torch.ones(40, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert seen.shape == (40, 3, 64, 64) and seen.isfinite().all()
    assert len({tuple(each.flatten()[::97].tolist()) for each in seen}) == 40
    plain = on_white(pixels)
    assert plain[0, :, 0, 0].tolist() == [1, 1, 1] and plain[0, :, 32, 32].tolist() == [1, 0, 0]
    assert (seen - plain).abs().mean() < 0.25
