"""What is decided before a run begins: its precision, and whether it can be on GPUs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from runs import main

from vlskv_ray.config import load_config
from vlskv_ray.launch import prepare


def text_of(hidden_size: int) -> SimpleNamespace:
    return SimpleNamespace(hidden_size=hidden_size, intermediate_size=3 * hidden_size)


@pytest.mark.parametrize(
    ("overrides", "hidden_size", "times", "wanted"),
    [
        ("seed=0", 512, 1.6, "bfloat16"),
        ("seed=0", 512, 1.4, "float32"),
        ("seed=0", 511, 4.0, "float32"),
        ("cluster.use_gpu=true", 512, 0.1, "bfloat16"),
        ("cluster.use_gpu=true", 511, 4.0, "float32"),
        ("objective=sft model.num_key_value_layers=null", 512, 4.0, "float32"),
    ],
)
def test_bfloat16_is_chosen_where_it_pays(
    files: Path, monkeypatch: pytest.MonkeyPatch, overrides: str, hidden_size: int, times: float, wanted: str
) -> None:
    """model.dtype=auto, the default: frozen weights of a model that is not small, by products that are much faster."""
    monkeypatch.setattr(prepare, "matmul_seconds", lambda *_: {"float32": times, "bfloat16": 1.0})
    config = load_config(files / "run.yaml", overrides.split())
    assert config.model.dtype == "auto"
    assert prepare.dtype_of(config, None, text_of(hidden_size)) == wanted


def test_precision_is_chosen_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start of a run, and as it was when it goes on, whatever is measured then."""
    monkeypatch.setattr(prepare, "LEAST_WIDTH_OF_BFLOAT16", 1)
    monkeypatch.setattr(prepare, "matmul_seconds", lambda *_: {"float32": 2.0, "bfloat16": 1.0})
    auto = ("output.name=auto", "max_steps=1")
    assert main(files / "run.yaml", *auto) == 0
    assert yaml.safe_load((files / "runs" / "auto" / "config.yaml").read_text())["model"]["dtype"] == "bfloat16"
    monkeypatch.setattr(prepare, "matmul_seconds", lambda *_: {"float32": 1.0, "bfloat16": 2.0})
    assert main(files / "run.yaml", *auto) == 0  # finished; as float32 it would be another run


def test_without_a_gpu_a_run_on_one_is_refused(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line. Trying it here says that what it says is of CPUs."""
    gpu = ("output.name=gpu", "cluster.use_gpu=true", "model.dtype=bfloat16", "max_steps=1")
    assert main(files / "run.yaml", *gpu) == 2
    refused = capsys.readouterr().err
    assert refused.startswith("cluster.use_gpu: torch ") and refused.count("\n") == 1
    assert yaml.safe_load((files / "runs" / "gpu" / "config.yaml").read_text())["model"]["dtype"] == "bfloat16"
    assert main(files / "run.yaml", *gpu, "--dry-run") == 0
    assert "no GPU is to be found here: all below is of this machine's CPUs, where" in capsys.readouterr().out
