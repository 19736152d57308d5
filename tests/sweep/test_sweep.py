"""What is settled for all trials of a sweep."""

from pathlib import Path

import pytest
import yaml
from runs import LOCAL, NO_ANSWERS

from vlskv_ray.config import load_config
from vlskv_ray.launch import prepare
from vlskv_ray.launch.driver import train
from vlskv_ray.sweep.sweep import Sweep, settle_dtype
from vlskv_ray.sweep.trials import trial_of
from vlskv_ray.training.run import FitPlan


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


@pytest.mark.parametrize("cache", ["off", "disk"])
def test_trials_begin_with_the_fit_of_their_setting_made_once(files: Path, tmp_path: Path, cache: str) -> None:
    """Of those that differ in the learning rate alone the second has it from the first; another N has its own."""
    more = [f"model.teacher_cache={cache}", "max_steps=1", "model.fit_tokens=300"]
    config = load_config(files / "run.yaml", [*LOCAL, *NO_ANSWERS, *more])
    sweep = Sweep(tmp_path / "runs" / "sweep", "kl")
    sweep.trials.mkdir(parents=True)
    (sweep.folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    trials = [
        trial_of({"model.num_key_value_layers": n, "optimizer.lr": lr}) for n, lr in ((2, 1e-3), (2, 1e-2), (3, 1e-3))
    ]
    first, second, other = ((prepare.prepare(sweep.config_of(trial))[0].fit or FitPlan((), Path())) for trial in trials)
    assert first.samples and first.kept == second.kept != other.kept
    written = []
    for trial in trials[:2]:
        assert train(sweep.config_of(trial)) == 0
        written.append(first.kept.stat().st_mtime_ns)  # whoever makes a fit writes it
    assert written[0] == written[1]
    starts = [(sweep.trials / trial.name / "start.safetensors").read_bytes() for trial in trials[:2]]
    assert starts == [first.kept.read_bytes()] * 2
