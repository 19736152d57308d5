"""Which trials a space gives, and which spaces say nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlskv_ray.config import Config, ConfigError, load_config
from vlskv_ray.sweep.space import trials_of

N, G, LR = "model.num_key_value_layers", "model.key_value_group_size", "optimizer.lr"


def config(**tune: Any) -> Config:
    return Config.model_validate(
        {"model": {"name_or_path": "shapes-teacher"}, "data": {"sources": [{"name": "shapes"}]}, "tune": tune}
    )


def test_every_combination_of_the_grids_is_a_trial() -> None:
    trials = trials_of(config(space={N: [2, 4], G: {"grid": [1, 2, 4]}, "scheduler.type": ["cosine"]}))
    assert [trial.name for trial in trials] == [f"N{n}_g{g}_type-cosine" for n in (2, 4) for g in (1, 2, 4)]
    assert trials[1].values == {N: 2, G: 2, "scheduler.type": "cosine"}
    assert trials[1].overrides == [f"{N}=2", f"{G}=2", "scheduler.type=cosine"]


def test_what_is_drawn_is_drawn_anew_for_each_trial_and_the_same_again() -> None:
    space = {
        N: [2, 4],
        LR: {"loguniform": [1e-4, 1e-1]},
        "temperature": {"uniform": [1, 4]},
        "seed": {"choice": [1, 2]},
    }
    trials = trials_of(config(space=space, draws=50))
    assert trials == trials_of(config(space=space, draws=50))
    assert trials != trials_of(config(space=space, draws=50).model_copy(update={"seed": 7}))
    rates = [trial.values[LR] for trial in trials]
    assert len(trials) == 100 and len(set(rates)) > 90
    assert all(1e-4 <= rate <= 1e-1 and rate == float(f"{rate:.4g}") for rate in rates)
    assert 15 < sum(rate < 1e-3 for rate in rates) < 55  # a third of them, by the logarithm
    assert all(1 <= trial.values["temperature"] <= 4 for trial in trials)
    assert {trial.values["seed"] for trial in trials} == {1, 2}


def test_the_same_values_again_are_no_other_trial() -> None:
    assert len(trials_of(config(space={N: [2, 2]}, draws=3))) == 1
    assert len(trials_of(config(space={"seed": {"choice": [1, 2, 3]}}, draws=50))) == 3


@pytest.mark.parametrize(
    ("space", "problem"),
    [
        ({LR: {"loguniform": [0, 1]}}, f"{LR}.loguniform: wanted numbers above 0"),
        ({LR: {"uniform": [2, 1]}}, f"{LR}.uniform: wanted two numbers [least, most], got [2, 1]"),
        ({LR: {"uniform": [1, 2], "grid": [1]}}, f"{LR}: wanted one of grid, choice, uniform, loguniform, got uniform"),
        ({LR: 3}, f"{LR}: wanted a list of values or one of grid"),
        ({LR: []}, f"{LR}.grid: wanted a list of values, got []"),
        ({"output.name": ["a"]}, "output.name: cannot be tried"),
        ({"cluster.num_workers": [1, 2]}, "cluster.num_workers: cannot be tried; a sweep names its runs and shares"),
        ({N: [1], "model": {"num_key_value_layers": [2]}}, f"{N}: given twice; keep one of them"),
    ],
)
def test_a_space_that_says_nothing_is_an_error(space: dict[str, Any], problem: str, tmp_path: Path) -> None:
    """With the file and the line of it; an option that does not exist is told when its trials are made."""
    file = tmp_path / "sweep.yaml"
    tree = {"model": {"name_or_path": "m"}, "data": {"sources": ["shapes"]}, "tune": {"space": space}}
    file.write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert problem in str(error.value) and f"{file}:1: tune.space: " in str(error.value)


def test_a_space_has_finite_bounds() -> None:
    with pytest.raises(ValueError, match="wanted two numbers"):
        config(space={LR: {"uniform": [0, float("inf")]}})


def test_sections_of_a_space_may_be_nested() -> None:
    nested = config(space={"model": {"num_key_value_layers": [2], "key_value_group_size": {"choice": [1, 2]}}})
    assert nested.tune.space == {N: {"grid": [2]}, G: {"choice": [1, 2]}}
