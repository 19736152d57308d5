"""What is settled for all trials of a sweep."""

from pathlib import Path

import pytest
import yaml

from vlskv_ray.config import load_config
from vlskv_ray.launch import prepare
from vlskv_ray.sweep.sweep import settle_dtype


def test_trials_have_one_precision(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen where the sweep begins, kept where it goes on elsewhere; a space that has several tries them."""
    monkeypatch.setattr(prepare, "LEAST_WIDTH_OF_BFLOAT16", 1)
    monkeypatch.setattr(prepare, "matmul_seconds", lambda *_: {"float32": 2.0, "bfloat16": 1.0})
    config, stored = load_config(files / "run.yaml", ["output.name=sweep"]), files / "stored.yaml"
    begun = settle_dtype(config, stored)
    assert begun.model.dtype == "bfloat16" and config.model.dtype == "auto"
    stored.write_text(yaml.safe_dump(begun.model_dump(mode="json")))
    monkeypatch.setattr(prepare, "matmul_seconds", lambda *_: {"float32": 1.0, "bfloat16": 2.0})
    assert settle_dtype(config, stored).model.dtype == "bfloat16"
    assert settle_dtype(config, files / "none.yaml").model.dtype == "float32"
    space = {"model.dtype": ["float32", "bfloat16"]}
    several = config.model_copy(update={"tune": config.tune.model_copy(update={"space": space})})
    assert settle_dtype(several, stored).model.dtype == "auto"
