"""The teacher that ships with the package answers as well as is said of it."""

import json
from typing import Any

import pytest

from vlskv_ray.data.chat import Limits
from vlskv_ray.data.questions import HeldOut
from vlskv_ray.data.shapes import ShapesSource
from vlskv_ray.evaluation.evaluator import Evaluator, figures_of
from vlskv_ray.model.build import build_plain, find_model
from vlskv_ray.model.presets import SHIPPED
from vlskv_ray.model.processor import load_processor

FOLDER = SHIPPED["shapes-teacher"]


STATED = json.loads((FOLDER / "evaluation.json").read_text())


@pytest.mark.faults
def test_it_reaches_what_is_stated() -> None:
    """On the held-out samples of the figures that ship with it: these figures, overall and by kind of question."""
    assert STATED["samples"] >= 2000
    figures = measure(STATED["samples"])
    assert figures["questions"] == STATED["questions"]
    assert min(figures["by_kind"].values()) >= 0.9, figures["by_kind"]
    assert figures["accuracy"] == pytest.approx(STATED["sft_model"]["accuracy"], abs=0.003)
    assert figures["by_kind"] == pytest.approx(STATED["sft_model"]["by_kind"], abs=0.03)


def test_a_part_of_them_is_near_what_is_stated() -> None:
    """The first quarter of these samples, in a quarter of the time."""
    figures = measure(STATED["samples"] // 4)
    assert figures["accuracy"] == pytest.approx(STATED["sft_model"]["accuracy"], abs=0.01)
    assert figures["by_kind"] == pytest.approx(STATED["sft_model"]["by_kind"], abs=0.1)


def measure(count: int) -> dict[str, Any]:
    held_out = HeldOut((ShapesSource("test", STATED["samples"]),), count, Limits(), batch_size=100)
    files = find_model("shapes-teacher")
    results = Evaluator(build_plain(files), load_processor(files), held_out).results("sft_model")
    figures = figures_of(results, "sft_model") | {"questions": len(results)}
    assert figures["accuracy"] >= 0.95
    return figures


def test_it_is_small_and_whole() -> None:
    """At most 8 MB with all of its processor; at least 6 text layers, so that N means something."""
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8e6
    assert {"model.safetensors", "tokenizer.json", "processor_config.json", "chat_template.jinja"} <= {
        path.name for path in FOLDER.iterdir()
    }
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] >= 6
