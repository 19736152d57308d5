"""What is decided before a run begins: its precision, and whether it can be on GPUs."""

from pathlib import Path

import pytest
import yaml
from runs import main

from vlskv_ray.launch import prepare


def test_the_faster_precision_is_chosen_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """model.dtype=auto: measured at the start, and as it was when the run goes on."""
    auto = ("output.name=auto", "model.dtype=auto", "max_steps=1")
    monkeypatch.setattr(prepare, "matmul_seconds", lambda *_: {"float32": 2.0, "bfloat16": 1.0})
    assert main(files / "run.yaml", *auto) == 0
    assert yaml.safe_load((files / "runs" / "auto" / "config.yaml").read_text())["model"]["dtype"] == "bfloat16"
    monkeypatch.setattr(prepare, "matmul_seconds", lambda *_: {"float32": 1.0, "bfloat16": 2.0})
    assert main(files / "run.yaml", *auto) == 0  # finished; as float32 it would be another run


def test_without_a_gpu_a_run_on_one_is_refused(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line; it would be in bfloat16. Trying it here says that what it says is of CPUs."""
    gpu = ("output.name=gpu", "cluster.use_gpu=true", "model.dtype=auto", "max_steps=1")
    assert main(files / "run.yaml", *gpu) == 2
    refused = capsys.readouterr().err
    assert refused.startswith("cluster.use_gpu: torch ") and refused.count("\n") == 1
    assert yaml.safe_load((files / "runs" / "gpu" / "config.yaml").read_text())["model"]["dtype"] == "bfloat16"
    assert main(files / "run.yaml", *gpu, "--dry-run") == 0
    assert "no GPU is to be found here: all below is of this machine's CPUs, where" in capsys.readouterr().out
