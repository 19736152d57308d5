"""Which trials a space gives, and the table that shows them."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from vlskv_ray.config import Config, ConfigError, load_config
from vlskv_ray.sweep.trials import DONE, FAILED, SweepTable, Trial, end, outcome_of, trial_of, trials_of

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
    "values", [{"model.name_or_path": "/a/b c"}, {"optimizer.betas": [0.9, 0.95]}, {"x.y": "../up"}, {"x.y": None}]
)
def test_a_name_is_that_of_one_folder(values: dict[str, Any]) -> None:
    name = trial_of(values).name
    assert Path(name).name == name and name not in (".", "..") and name == trial_of(values).name
    assert len(trial_of({f"section.{'k' * 30}{i}": i for i in range(30)}).name) <= 120


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


def test_how_a_trial_ended_is_found_again(tmp_path: Path) -> None:
    end(tmp_path, Trial("N2", {N: 2}), FAILED, "no room")
    assert outcome_of(tmp_path) == {"status": FAILED, "values": {N: 2}, "reason": "no room"}
    for junk in ("", "[]", '{"status": "odd"}', '{"status": "done"}', '{"status": "done", "values": [1]}'):
        (tmp_path / "trial.json").write_text(junk)
        assert outcome_of(tmp_path) is None
    assert outcome_of(tmp_path / "nothing") is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def metrics(folder: Path, **values: Any) -> None:
    folder.mkdir(exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "epoch": 0.25, "loss": 0.5, "step_seconds": 1.0} | values) + "\n")


TRIALS = [Trial("N2", {N: 2}), Trial("N4", {N: 4}), Trial("N6", {N: 6})]


def test_a_terminal_has_one_table_redrawn(tmp_path: Path) -> None:
    out = Terminal()
    table = SweepTable(TRIALS, tmp_path, epochs=1, shown=True, out=out)
    table.begins(TRIALS[0])
    metrics(tmp_path / "N2", eval_kl_mean=0.125, eval_accuracy=0.5)
    table.update()
    first = out.getvalue()
    assert "trial  status  step     loss  KL     accuracy  time" in first
    assert "N2     runs    5 (25%)  0.5   0.125  50.0%     0:00" in first and "N4     waits" in first
    end(tmp_path / "N2", TRIALS[0], FAILED, "no room")
    table.update()
    second = out.getvalue()[len(first) :]
    assert second.startswith("\x1b[5F") and "N2     failed" in second and "1 of 3 trials have ended" in second


def test_elsewhere_lines_tell_what_begins_and_ends(tmp_path: Path) -> None:
    """Once each, and nothing is drawn again."""
    out = io.StringIO()
    table = SweepTable(TRIALS, tmp_path, epochs=1, shown=True, out=out)
    (tmp_path / "N6").mkdir()
    end(tmp_path / "N6", TRIALS[2], DONE)
    table.begins(TRIALS[0])
    for _ in range(3):
        table.update()
    metrics(tmp_path / "N2", eval_kl_mean=0.125, eval_accuracy=0.5)
    table.told_at -= 60
    table.update()
    end(tmp_path / "N2", TRIALS[0], FAILED, "no room")
    for _ in range(3):
        table.update()
    assert out.getvalue().splitlines() == [
        "N2 starts",
        "N6 done before",
        "1 of 3 trials  N2 25%",
        "N2 failed in 0:00  KL 0.125  accuracy 50.0%: no room",
    ]


def test_a_trial_whose_workers_lack_room_says_so(tmp_path: Path) -> None:
    """As long as that is so, in the table and, elsewhere, each time with the numbers."""
    out, terminal = io.StringIO(), Terminal()
    tables = [SweepTable(TRIALS, tmp_path, epochs=1, shown=True, out=file) for file in (out, terminal)]
    notes = tmp_path / "N2" / "ray" / "waiting"
    notes.parent.mkdir(parents=True)
    for table in tables:
        table.begins(TRIALS[0])
        table.update()
    notes.write_text("waiting       for a while\n")
    for table in [*tables, *tables]:
        table.update()
    assert out.getvalue().splitlines() == ["N2 starts", "N2 waits: for a while"]
    assert "N2     waits" in terminal.getvalue()
    metrics(tmp_path / "N2", eval_kl_mean=0.125, eval_accuracy=0.5)
    tables[1].update()
    assert "N2     runs" in terminal.getvalue()
