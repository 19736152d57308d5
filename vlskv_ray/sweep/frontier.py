"""The frontier of a sweep: what each setting keeps against what it saves, and the one to take.

A pure function of the folders of trials: `frontier.json`, `frontier.png` and `frontier.html`, which needs nothing but
itself.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vlskv_ray.files import write_json, write_text
from vlskv_ray.report.figures import at, decimal, is_number, percent, read_run
from vlskv_ray.report.run_page import FAINT, INK, STUDENT, STYLE, THIRD, document, grid, plain_ticks, plot, table
from vlskv_ray.sweep.trials import DONE, Trial, aligned, outcome_of
from vlskv_ray.words import short_path

COLUMNS = ("accuracy", "loses", "KL", "prefill operations", "cache bytes", "")
PAPER = {STUDENT: "#1f6fb2", THIRD: "#b4570f", INK: "#1f2933", FAINT: "#d5dbe1"}
"""What the picture has in place of the page's colours."""


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
    pareto: bool = False
    """No other trial is at least as good in KL, prefill and cache, and better in one of them."""

    @property
    def loses(self) -> float:
        """Accuracy, of 1, against the teacher."""
        return self.teacher_accuracy - self.accuracy


def points_of(trials: Sequence[Trial], folder: Path) -> list[Point]:
    """The trials that are done, cheapest first. ValueError where a file of one cannot be read."""
    found = []
    for trial in trials:
        if (outcome_of(folder / trial.name) or {}).get("status") != DONE:
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
            found.append(Point(trial.name, trial.values, accuracy, teacher, kl, prefill, cache, n, g))
    found.sort(key=lambda point: (point.prefill, point.cache, point.kl))
    return [Point(**(asdict(point) | {"pareto": is_pareto(point, found)})) for point in found]


def is_pareto(point: Point, points: Sequence[Point]) -> bool:
    """Whether none of the points is at least as good in everything, and better in something."""

    def costs(of: Point) -> tuple[float, float, float]:
        return (of.kl, of.prefill, of.cache)

    mine = costs(point)
    return not any(
        costs(other) != mine and all(a <= b for a, b in zip(costs(other), mine, strict=True)) for other in points
    )


def recommended(points: Sequence[Point], max_accuracy_drop: float) -> Point | None:
    """The cheapest prefill, then cache, then KL, of those that lose no more than that; None where all lose more."""
    allowed = [point for point in points if point.loses <= max_accuracy_drop + 1e-9]
    return min(allowed, key=lambda point: (point.prefill, point.cache, point.kl), default=None)


def write_frontier(
    folder: Path, trials: Sequence[Trial], max_accuracy_drop: float, command: Callable[[Trial], str]
) -> list[str]:
    """Writes the three files into a sweep's folder; returns what to say of them.

    Args:
        folder: of the sweep; its trials are below `trials`.
        trials: all of them.
        max_accuracy_drop: that the recommended one may have.
        command: which trains a trial's setting.
    """
    points = points_of(trials, folder / "trials")
    best = recommended(points, max_accuracy_drop)
    others = {trial.name: outcome_of(folder / "trials" / trial.name) or {"status": "not done"} for trial in trials}
    for point in points:
        del others[point.name]
    commands = {trial.name: command(trial) for trial in trials}
    write_json(
        folder / "frontier.json",
        {
            "max_accuracy_drop": max_accuracy_drop,
            "teacher_accuracy": points[0].teacher_accuracy if points else None,
            "recommended": best.name if best else None,
            "command": commands[best.name] if best else None,
            "points": [asdict(point) for point in points],
            "others": others,
        },
    )
    lines = said(points, best, max_accuracy_drop, others)
    if best:
        lines.append(f"student:   {short_path(folder / 'trials' / best.name / 'final')}")
        lines.append(f"again, for longer or on more data:  {commands[best.name]}")
    if points:
        write_picture(folder / "frontier.png", points, best, max_accuracy_drop)
    write_text(folder / "frontier.html", page(folder.name, points, best, max_accuracy_drop, others, commands))
    return lines


def said(
    points: Sequence[Point], best: Point | None, max_accuracy_drop: float, others: dict[str, dict[str, Any]]
) -> list[str]:
    """For a terminal: the points, the recommended one, and what became of the rest."""
    lines: list[str] = []
    if points:
        lines += aligned([["trial", *COLUMNS], *([point.name, *cells(point, best)] for point in points)])
        teacher = percent(points[0].teacher_accuracy)
        lines += ["", f"the teacher's accuracy is {teacher}; * not beaten in KL, prefill and cache together"]
    for name, outcome in others.items():
        lines.append(f"{name}: {outcome['status']}" + (f": {outcome['reason']}" if outcome.get("reason") else ""))
    return [*lines, "", advice(points, best, max_accuracy_drop)]


def cells(point: Point, best: Point | None) -> list[str]:
    """A point under `COLUMNS`."""
    mark = "* recommended" if point == best else "*" if point.pareto else ""
    costs = [f"{cost:.2f}" for cost in (point.prefill, point.cache)]
    return [percent(point.accuracy), f"{100 * point.loses:.1f} points", decimal(point.kl), *costs, mark]


def advice(points: Sequence[Point], best: Point | None, max_accuracy_drop: float) -> str:
    """One sentence: what to take, or what stands in the way."""
    count = f"{100 * max_accuracy_drop:g}"
    limit = f"at most {count} point{'s' * (count != '1')} of accuracy (tune.max_accuracy_drop)"
    if best:
        saved = [f"{percent(1 - best.prefill)} of the prefill operations"]
        saved += [f"{percent(1 - best.cache)} of the cache"] if best.cache < 1 else []
        return f"recommended, the cheapest that loses {limit}: {best.name}, which saves {' and '.join(saved)}"
    if not points:
        return "no trial came to its end, so there is nothing to recommend"
    least = min(points, key=lambda point: point.loses)
    return (
        f"no trial loses {limit}; {least.name} loses least, {100 * least.loses:.1f} points: train longer, try more "
        f"layers with their own cache, or allow more"
    )


# ---------------------------------------------------------------------------------------------------------- to look at
def draw(
    axes: Axes, points: Sequence[Point], best: Point | None, cost: str, quality: str, limit: float, colours: Any
) -> None:
    """Points by a cost ("prefill", "cache") and by what they keep ("accuracy") or how far off they are ("kl")."""
    values = [(getattr(point, cost), getattr(point, quality)) for point in points]
    axes.plot(*zip(*edge(values, upwards=quality == "accuracy"), strict=True), color=colours(FAINT), zorder=1)
    for (x, y), point in zip(values, points, strict=True):
        colour = colours(STUDENT if point.pareto else THIRD)
        axes.plot([x], [y], "o" if point.pareto else "x", color=colour, zorder=3)
        axes.annotate(
            point.name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=6, color=colours(INK), zorder=4
        )
        if point == best:
            axes.plot([x], [y], "o", markersize=11, fillstyle="none", color=colours(STUDENT), zorder=2)
    axes.set_xlabel(
        {"prefill": "prefill operations, student / teacher", "cache": "cache bytes, student / teacher"}[cost]
    )
    if quality == "accuracy":
        teacher = points[0].teacher_accuracy
        axes.axhline(teacher, color=colours(FAINT), linewidth=1)
        axes.axhline(teacher - limit, color=colours(FAINT), linewidth=1, linestyle="--")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("accuracy")
    else:
        axes.set_ylabel("KL from the teacher, nats per token")
        if min(point.kl for point in points) > 0:
            axes.set_yscale("log")
            plain_ticks(axes.yaxis)
    axes.margins(0.15)


def edge(values: Sequence[tuple[float, float]], upwards: bool) -> list[tuple[float, float]]:
    """Of pairs of cost and quality those that nothing as cheap or cheaper beats, cheapest first."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(values, key=lambda value: (value[0], -value[1] if upwards else value[1])):
        if not kept or (y > kept[-1][1] if upwards else y < kept[-1][1]):
            kept.append((x, y))
    return kept


PANELS = [(cost, quality) for quality in ("accuracy", "kl") for cost in ("prefill", "cache")]


def write_picture(path: Path, points: Sequence[Point], best: Point | None, limit: float) -> None:
    """All four panels in one PNG."""
    style = {key: PAPER.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 7.5), layout="constrained")
        for axes, (cost, quality) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            draw(axes, points, best, cost, quality, limit, lambda stand_in: PAPER[stand_in])
        figure.suptitle(
            "Kept and saved: blue is not beaten in KL, prefill and cache together, the ring is recommended",
            fontsize=10,
        )
        figure.savefig(path, dpi=150, metadata={"Software": None})


def page(
    name: str,
    points: Sequence[Point],
    best: Point | None,
    limit: float,
    others: dict[str, dict[str, Any]],
    commands: dict[str, str],
) -> str:
    """frontier.html; whatever comes from the config is escaped."""
    plots = "".join(
        plot(
            f"{cost}-{quality}",
            f"{'Accuracy' if quality == 'accuracy' else 'KL divergence from the teacher'} by "
            f"{'prefill operations' if cost == 'prefill' else 'cache bytes'}",
            "; ".join(f"{p.name}: {getattr(p, quality):.4g} at {getattr(p, cost):.2f}" for p in points),
            lambda axes, cost=cost, quality=quality: draw(  # type: ignore[misc]
                axes, points, best, cost, quality, limit, lambda stand_in: stand_in
            ),
        )
        for cost, quality in PANELS
        if points
    )
    rows = [(point.name, cells(point, best)) for point in points]
    caption = (
        "Costs are student over teacher. * no other trial is at least as good in KL, prefill and cache and better in "
        "one of them. Lines: the teacher's accuracy, and what is allowed to be lost."
    )
    rest = [(trial, [outcome["status"], outcome.get("reason", "")]) for trial, outcome in others.items()]
    command = ""
    if best:
        command = (
            f"<p>Its student lies in <code>trials/{escape(best.name)}/final</code>. To train the setting again, "
            f"for longer or on more data:</p>\n<pre>{escape(commands[best.name])}</pre>"
        )
    header = f"<h1>{escape(name)}</h1>\n<p>What SwiftKV settings keep of their teacher, and what they save</p>\n"
    body = f"""<section id="recommended">
<h2>Recommended</h2>
<p>{escape(advice(points, best, limit))}.</p>
{command}
</section>
<section id="frontier">
<h2>Frontier</h2>
{grid(plots)}{table(list(COLUMNS), rows, caption)}</section>
{f'<section id="others"><h2>Other trials</h2>{table(["", ""], rest, "Not in the figures.")}</section>' if rest else ""}
"""
    return document(f"{name}: the frontier", header, body)


def train_command(file: str, overrides: Sequence[str], trial: Trial, name: str) -> str:
    """Trains a trial's setting as a run of its own, under the name of the trial."""
    words = ["python", "-m", "vlskv_ray.train", "--config", file, *overrides, *trial.overrides]
    return shlex.join([*words, f"output.name={name}-{trial.name}"])
