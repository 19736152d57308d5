"""The frontier: what is beaten, what is recommended, and the files that show it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlskv_ray.files import write_json
from vlskv_ray.report.run_files import DASH
from vlskv_ray.sweep.frontier import Frontier, Point, is_pareto, points_of, recommendation
from vlskv_ray.sweep.frontier_page import edge, write_frontier
from vlskv_ray.sweep.trials import TRIAL_DONE, TRIAL_FAILED, Trial, write_outcome

POINT = Point("a", {}, accuracy=0.9, teacher_accuracy=0.95, kl=0.01, prefill=0.5, cache=1.0)


def test_beaten_is_what_another_is_no_worse_than_in_anything() -> None:
    better = replace(POINT, name="b", kl=0.005)
    cheaper = replace(POINT, name="c", prefill=0.4, kl=0.02)
    smaller = replace(POINT, name="d", cache=0.5, kl=0.02)
    points = [POINT, better, cheaper, smaller]
    assert [is_pareto(point, points) for point in points] == [False, True, True, True]
    twin = replace(POINT, name="e")
    assert is_pareto(POINT, [POINT, twin]) and is_pareto(twin, [POINT, twin])


def test_the_cheapest_that_loses_little_enough_is_recommended() -> None:
    cheap = replace(POINT, name="cheap", accuracy=0.7, prefill=0.2)
    small = replace(POINT, name="small", cache=0.5)
    points = [cheap, POINT, small, replace(POINT, name="dear", accuracy=0.95, prefill=0.8)]
    names = {drop: getattr(Frontier(points, drop).recommended, "name", None) for drop in (0.3, 0.05, 0.01, 0.0)}
    assert names == {0.3: "cheap", 0.05: "small", 0.01: "dear", 0.0: "dear"}
    assert Frontier([POINT], 0.01).recommended is None
    assert "a loses least, 5.0 points" in recommendation(Frontier([POINT], 0.01))
    assert "nothing to recommend" in recommendation(Frontier([], 0.01))


def test_the_edge_is_what_nothing_as_cheap_beats() -> None:
    values = [(0.5, 0.9), (0.2, 0.5), (0.8, 0.9), (0.5, 0.95), (0.3, 0.4), (1.0, 0.99)]
    assert edge(values, upwards=True) == [(0.2, 0.5), (0.5, 0.95), (1.0, 0.99)]
    assert edge(values, upwards=False) == [(0.2, 0.5), (0.3, 0.4)]


def trial(
    folder: Path,
    name: str,
    accuracy: float | None,
    kl: float,
    prefill: float,
    cache: float,
    teacher: float = 0.95,
    more: dict[str, Any] | None = None,
) -> Trial:
    made = Trial(name, {"model.num_key_value_layers": 2})
    write_json_in(
        folder / "trials" / name / "evaluation.json",
        {
            "teacher": {"accuracy": teacher},
            "student": {"accuracy": accuracy, "kl_mean": kl},
            "savings": {"prefill_flops_ratio": prefill, "cache_bytes_ratio": cache},
        }
        | (more or {}),
    )
    write_outcome(folder / "trials" / name, made, TRIAL_DONE)
    return made


def write_json_in(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True)
    write_json(path, values)


def test_files_of_a_frontier(tmp_path: Path) -> None:
    """Trials that failed or never ran are told of; names and reasons are escaped; the command is one to run."""
    trials = [
        trial(tmp_path, "N2", 0.8, 0.02, 0.3, 1.0),
        trial(tmp_path, "N4", 0.945, 0.001, 0.5, 0.75),
        trial(tmp_path, "unmeasured", None, 0.001, 0.5, 0.75),
        Trial("<b>odd</b>", {}),
        Trial("never", {}),
    ]
    (tmp_path / "trials" / "<b>odd</b>").mkdir(parents=True)
    write_outcome(tmp_path / "trials" / "<b>odd</b>", trials[3], TRIAL_FAILED, "<script>alert(1)</script>")
    lines = write_frontier(tmp_path, trials, 0.01, lambda trial: f"train {trial.name}")
    found = json.loads((tmp_path / "frontier.json").read_text())
    assert (found["recommended"], found["command"], found["teacher_accuracy"]) == ("N4", "train N4", 0.95)
    assert [(point["name"], point["pareto"]) for point in found["points"]] == [("N2", True), ("N4", True)]
    assert found["others"]["never"] == {"status": "not done"} and "unmeasured" in found["others"]
    page = (tmp_path / "frontier.html").read_text()
    assert "<script>" not in page and "<b>odd" not in page and "&lt;script&gt;" in page
    assert "train N4" in page and page.count("<svg") == 4
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert any("never: not done" in line for line in lines) and lines[-1].endswith("on more data:  train N4")


def test_a_trial_shows_its_student_copied_fitted_and_distilled(tmp_path: Path) -> None:
    """Each where there is one: a run without steps has none distilled, and one from copies none fitted."""
    copied = {"student_before": {"kl_mean": 2.5}}
    trials = [
        trial(tmp_path, "trained", 0.9, 0.125, 0.3, 1.0, more=copied | {"student_fitted": {"kl_mean": 0.75}}),
        trial(tmp_path, "untrained", 0.9, 0.75, 0.4, 1.0, more=copied | {"student_is": "fitted"}),
        trial(tmp_path, "from-copies", 0.9, 0.25, 0.5, 1.0, more=copied | {"student_is": "distilled"}),
        trial(tmp_path, "copied", 0.9, 2.5, 0.6, 1.0, more=copied | {"student_is": "copied"}),
    ]
    lines = [line.split() for line in write_frontier(tmp_path, trials, 0.01, lambda trial: "")]
    figures = {line[0]: line[4:7] for line in lines if line and line[0] in {trial.name for trial in trials}}
    assert figures == {
        "trained": ["2.5", "0.75", "0.125"],
        "untrained": ["2.5", "0.75", DASH],
        "from-copies": ["2.5", DASH, "0.25"],
        "copied": ["2.5", DASH, DASH],
    }
    points = json.loads((tmp_path / "frontier.json").read_text())["points"]
    assert [(point["kl_copied"], point["kl_fitted"], point["is_trained"]) for point in points] == [
        (2.5, 0.75, True),
        (2.5, 0.75, False),
        (2.5, None, True),
        (2.5, None, False),
    ]
    page = (tmp_path / "frontier.html").read_text()
    assert all(title in page for title in ("KL copied", "KL fitted", "KL distilled"))


def test_nothing_is_recommended_by_an_accuracy_that_nobody_has(tmp_path: Path) -> None:
    """On free text no setting can lose any: the cheapest would win however bad it is."""
    trials = [
        trial(tmp_path, "N2", 0.0, 2.5, 0.3, 1.0, teacher=0.0),
        trial(tmp_path, "N4", 0.0, 0.01, 0.5, 0.75, teacher=0.0),
    ]
    lines = write_frontier(tmp_path, trials, 0.01, lambda trial: f"train {trial.name}")
    assert json.loads((tmp_path / "frontier.json").read_text())["recommended"] is None
    text, page = "\n".join(lines), (tmp_path / "frontier.html").read_text()
    for shown in (text, page):
        assert "0.0%" not in shown and "2.5" in shown and "choose by KL among those marked *" in shown
    assert page.count("<svg") == 2 and (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_of_which_nothing_came(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    lines = write_frontier(tmp_path, [Trial("never", {})], 0.01, lambda trial: "")
    assert json.loads((tmp_path / "frontier.json").read_text())["points"] == []
    assert "nothing to recommend" in lines[-1] and not (tmp_path / "frontier.png").exists()


def test_points_stand_by_cost(tmp_path: Path) -> None:
    trials = [trial(tmp_path, name, 0.9, 0.01, cost, 1.0) for name, cost in (("b", 0.5), ("a", 0.3), ("c", 0.7))]
    assert [point.name for point in points_of(trials, tmp_path / "trials")] == ["a", "b", "c"]


@pytest.mark.parametrize("text", ["[]", "{", '{"student": 3}'])
def test_a_damaged_evaluation_is_no_point(text: str, tmp_path: Path) -> None:
    made = trial(tmp_path, "a", 0.9, 0.01, 0.5, 1.0)
    (tmp_path / "trials" / "a" / "evaluation.json").write_text(text)
    if text == '{"student": 3}':
        assert points_of([made], tmp_path / "trials") == []
    else:
        with pytest.raises(ValueError, match=r"evaluation\.json: "):
            points_of([made], tmp_path / "trials")
