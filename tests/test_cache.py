"""The command that fills a teacher cache ahead."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from vlskv_ray.cache import main
from vlskv_ray.config import load_config
from vlskv_ray.launch.driver import train
from vlskv_ray.launch.prepare import prepare


@pytest.mark.ray
def test_a_run_finds_all_of_its_samples(
    teacher_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Those that can be used; another time nothing is missing; the run that follows makes no state anew."""
    config = {
        "epochs": 2,
        "micro_batch_size": 3,
        "model": {"name_or_path": str(teacher_folder()), "num_key_value_layers": 2, "teacher_cache": "disk"},
        "data": {"sources": [{"name": "shapes", "num_samples": 30}], "max_length": 150, "max_rejected_fraction": 0.9},
        "cluster": {"num_workers": 0, "threads_per_worker": 1, "address": "local"},
        "output": {"dir": str(tmp_path), "name": "run"},
    }
    (tmp_path / "run.yaml").write_text(yaml.dump(config))
    assert main(["--config", str(tmp_path / "run.yaml"), "--workers", "2"]) == 0
    said = capsys.readouterr().out
    run, _ = prepare(load_config(str(tmp_path / "run.yaml")))
    assert run.cache is not None
    made = run.cache.count()
    assert 0 < made < 30 and f"{made} made, 0 were there, {30 - made} left out" in said
    assert "x too_long" in said
    monkeypatch.setattr("vlskv_ray.training.distill.shared_pass", None)  # so that it would be noticed
    assert train(load_config(str(tmp_path / "run.yaml"))) == 0


def test_only_a_cache_on_disk_can_be_filled_ahead(
    teacher_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model": {"name_or_path": str(teacher_folder())}, "data": {"sources": ["shapes"]}}
    (tmp_path / "run.yaml").write_text(yaml.dump(config))
    assert main(["--config", str(tmp_path / "run.yaml"), "model.teacher_cache=memory"]) == 2
    assert "only one on disk outlives this command" in capsys.readouterr().err
