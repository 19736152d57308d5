"""What a trial is called, and how it ended."""

from pathlib import Path
from typing import Any

import pytest

from vlskv_ray.sweep.trials import TRIAL_FAILED, Trial, outcome_of, trial_of, write_outcome

N = "model.num_key_value_layers"


@pytest.mark.parametrize(
    "values", [{"model.name_or_path": "/a/b c"}, {"optimizer.betas": [0.9, 0.95]}, {"x.y": "../up"}, {"x.y": None}]
)
def test_a_name_is_that_of_one_folder(values: dict[str, Any]) -> None:
    name = trial_of(values).name
    assert Path(name).name == name and name not in (".", "..") and name == trial_of(values).name
    assert len(trial_of({f"section.{'k' * 30}{i}": i for i in range(30)}).name) <= 120


def test_how_a_trial_ended_is_found_again(tmp_path: Path) -> None:
    write_outcome(tmp_path, Trial("N2", {N: 2}), TRIAL_FAILED, "no room")
    assert outcome_of(tmp_path) == {"status": TRIAL_FAILED, "values": {N: 2}, "reason": "no room"}
    for junk in ("", "[]", '{"status": "odd"}', '{"status": "done"}', '{"status": "done", "values": [1]}'):
        (tmp_path / "trial.json").write_text(junk)
        assert outcome_of(tmp_path) is None
    assert outcome_of(tmp_path / "nothing") is None
