"""The frontier of a sweep: what each setting keeps against what it saves, and the one to take.

A pure function of the folders of trials.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlskv_ray.report.figures import decimal, is_number, percent
from vlskv_ray.report.run_files import DASH, at, read_run
from vlskv_ray.sweep.trials import TRIAL_DONE, Trial, outcome_of
from vlskv_ray.words import plural, terminal_table

COLUMNS = ("accuracy", "loses", "KL copied", "KL fitted", "KL distilled", "prefill operations", "cache bytes", "")


@dataclass(frozen=True)
class Point:
    """A trial that came to its end. Costs are student over teacher at the longest prompt that was measured."""

    name: str
    values: dict[str, Any]
    accuracy: float
    teacher_accuracy: float
    kl: float
    prefill: float
    cache: float
    num_key_value_layers: int | None = None
    key_value_group_size: int | None = None
    kl_copied: float | None = None
    """Of the student before anything was fitted or trained, where it was measured."""
    kl_fitted: float | None = None
    """Of the fitted student, where there was one."""
    is_trained: bool = True
    """Else `kl` is that of the student as it begins."""
    pareto: bool = False
    """No other trial is at least as good in KL, prefill and cache, and better in one of them."""

    @property
    def accuracy_drop(self) -> float:
        """What it loses against the teacher, of 1."""
        return self.teacher_accuracy - self.accuracy


@dataclass(frozen=True)
class Frontier:
    """What the trials of a sweep came to."""

    points: Sequence[Point]
    """Cheapest first."""
    max_accuracy_drop: float
    """What the recommended one may lose, of 1."""
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The outcome of each trial that is no point."""

    @property
    def has_accuracy(self) -> bool:
        """Whether exact match says anything of these samples: the teacher has some right. On free text it has none."""
        return any(point.teacher_accuracy > 0 for point in self.points)

    @property
    def recommended(self) -> Point | None:
        """The cheapest prefill, then cache, then KL, of those that lose little enough; None where all lose more, and
        where accuracy says nothing: there nothing could lose any."""
        if not self.has_accuracy:
            return None
        limit = self.max_accuracy_drop + 1e-9  # 0.95 - 0.94 is a little more than 0.01
        allowed = [point for point in self.points if point.accuracy_drop <= limit]
        return min(allowed, key=lambda point: (point.prefill, point.cache, point.kl), default=None)


def read_frontier(trials: Sequence[Trial], folder: Path, max_accuracy_drop: float) -> Frontier:
    """What trials in a folder came to. ValueError where a file of one cannot be read."""
    points = points_of(trials, folder)
    others = {trial.name: outcome_of(folder / trial.name) or {"status": "not done"} for trial in trials}
    for point in points:
        del others[point.name]
    return Frontier(points, max_accuracy_drop, others)


def points_of(trials: Sequence[Trial], folder: Path) -> list[Point]:
    """The trials that are done, cheapest first. ValueError where a file of one cannot be read."""
    found = []
    for trial in trials:
        if (outcome_of(folder / trial.name) or {}).get("status") != TRIAL_DONE:
            continue
        evaluation = read_run(folder / trial.name).evaluation
        numbers = [
            at(evaluation, *keys)
            for keys in (
                ("student", "accuracy"),
                ("teacher", "accuracy"),
                ("student", "kl_mean"),
                ("savings", "prefill_flops_ratio"),
                ("savings", "cache_bytes_ratio"),
            )
        ]
        if all(map(is_number, numbers)):
            accuracy, teacher, kl, prefill, cache = map(float, numbers)
            n, g = (at(evaluation, "model", key) for key in ("num_key_value_layers", "key_value_group_size"))
            copied, fitted, distilled = kl_by_start(evaluation)
            more = (n, g, copied, fitted, distilled is not None)
            found.append(Point(trial.name, trial.values, accuracy, teacher, kl, prefill, cache, *more))
    # whether one is beaten is only known when all are there
    found.sort(key=lambda point: (point.prefill, point.cache, point.kl))
    return [Point(**(asdict(point) | {"pareto": is_pareto(point, found)})) for point in found]


def kl_by_start(evaluation: dict[str, Any]) -> tuple[float | None, float | None, float | None]:
    """Mean KL of the student copied, fitted and trained, each where there is one that was measured."""
    keys = {"copied": "student_before", "fitted": "student_fitted", "trained": "student"}
    if (made := evaluation.get("student_is")) in ("copied", "fitted"):  # nothing was trained: that is its student
        keys |= {made: "student", "trained": ""}
    found = [at(evaluation, side, "kl_mean") for side in keys.values()]
    copied, fitted, trained = (float(kl) if is_number(kl) else None for kl in found)
    return copied, fitted, trained


def is_pareto(point: Point, points: Sequence[Point]) -> bool:
    """Whether none of the points is at least as good in everything, and better in something."""

    def costs(of: Point) -> tuple[float, float, float]:
        return (of.kl, of.prefill, of.cache)

    mine = costs(point)
    return not any(
        costs(other) != mine and all(a <= b for a, b in zip(costs(other), mine, strict=True)) for other in points
    )


def terminal_lines(frontier: Frontier) -> list[str]:
    """For a terminal: the points, what became of the rest, and the recommendation."""
    lines: list[str] = []
    if points := frontier.points:
        lines += terminal_table([["trial", *COLUMNS], *([point.name, *cells(point, frontier)] for point in points)])
        known = f"the teacher's accuracy is {percent(points[0].teacher_accuracy)}; " if frontier.has_accuracy else ""
        lines += ["", f"{known}* not beaten in KL, prefill and cache together"]
    for name, outcome in frontier.others.items():
        lines.append(f"{name}: {outcome['status']}" + (f": {outcome['reason']}" if outcome.get("reason") else ""))
    return [*lines, "", recommendation(frontier)]


def cells(point: Point, frontier: Frontier) -> list[str]:
    """A point under `COLUMNS`."""
    mark = "* recommended" if point == frontier.recommended else "*" if point.pareto else ""
    costs = [f"{cost:.2f}" for cost in (point.prefill, point.cache)]
    kept = [percent(point.accuracy), f"{100 * point.accuracy_drop:.1f} points"] if frontier.has_accuracy else [DASH] * 2
    by_start = [point.kl_copied, point.kl_fitted, point.kl if point.is_trained else None]
    return [*kept, *(DASH if kl is None else decimal(kl) for kl in by_start), *costs, mark]


def recommendation(frontier: Frontier) -> str:
    """One sentence: what to take, or what stands in the way."""
    points = plural(f"{100 * frontier.max_accuracy_drop:g}", "point")
    limit = f"at most {points} of accuracy (tune.max_accuracy_drop)"
    if best := frontier.recommended:
        saved = [f"{percent(1 - best.prefill)} of the prefill operations"]
        saved += [f"{percent(1 - best.cache)} of the cache"] if best.cache < 1 else []
        return f"recommended, the cheapest that loses {limit}: {best.name}, which saves {' and '.join(saved)}"
    if not frontier.points:
        return "no trial came to its end, so there is nothing to recommend"
    if not frontier.has_accuracy:
        return (
            "none is recommended by tune.max_accuracy_drop: the teacher has no reference word for word, so there is no "
            "accuracy to lose; choose by KL among those marked *"
        )
    least = min(frontier.points, key=lambda point: point.accuracy_drop)
    return (
        f"no trial loses {limit}; {least.name} loses least, {100 * least.accuracy_drop:.1f} points: train longer, try "
        f"more layers with their own cache, or allow more"
    )
