"""What a sweep leaves to look at: `frontier.json`, `frontier.png` and `frontier.html`, which loads nothing."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vlskv_ray.files import write_json, write_text
from vlskv_ray.report.html import document, grid, html_table
from vlskv_ray.report.plots import FAINT, INK, STUDENT, STYLE, THIRD, plain_ticks, plot
from vlskv_ray.sweep.frontier import COLUMNS, Frontier, cells, read_frontier, recommendation, terminal_lines
from vlskv_ray.sweep.trials import Trial
from vlskv_ray.words import short_path

PAPER = {STUDENT: "#1f6fb2", THIRD: "#b4570f", INK: "#1f2933", FAINT: "#d5dbe1"}
"""What the picture has in place of the page's colours."""
COSTS = {"prefill": "prefill operations", "cache": "cache bytes"}
QUALITIES = {"accuracy": "Accuracy", "kl": "KL divergence from the teacher"}
PANELS = [(cost, quality) for quality in QUALITIES for cost in COSTS]
"""What is drawn over what, by the names that a point has for them."""


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
    frontier = read_frontier(trials, folder / "trials", max_accuracy_drop)
    points, best = frontier.points, frontier.recommended
    again = next((command(trial) for trial in trials if best and trial.name == best.name), None)
    write_json(
        folder / "frontier.json",
        {
            "max_accuracy_drop": max_accuracy_drop,
            "teacher_accuracy": points[0].teacher_accuracy if points else None,
            "recommended": best.name if best else None,
            "command": again,
            "points": [asdict(point) for point in points],
            "others": frontier.others,
        },
    )
    if points:
        write_picture(folder / "frontier.png", frontier)
    write_text(folder / "frontier.html", frontier_page(folder.name, frontier, again))
    lines = terminal_lines(frontier)
    if best:
        lines.append(f"student:   {short_path(folder / 'trials' / best.name / 'final')}")
        lines.append(f"again, for longer or on more data:  {again}")
    return lines


def write_picture(path: Path, frontier: Frontier) -> None:
    """All panels in one PNG."""
    style = {key: PAPER.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()}
    with matplotlib.rc_context(style):
        drawn = panels_of(frontier)
        figure = Figure(figsize=(10, 3.75 * len(drawn) / 2), layout="constrained")
        for axes, (cost, quality) in zip(figure.subplots(len(drawn) // 2, 2).flat, drawn, strict=True):
            draw_panel(axes, frontier, cost, quality, PAPER.__getitem__)
        figure.suptitle(
            "Kept and saved: blue is not beaten in KL, prefill and cache together, the ring is recommended",
            fontsize=10,
        )
        figure.savefig(path, dpi=150, metadata={"Software": None})  # else a version of matplotlib changes the file


def frontier_page(name: str, frontier: Frontier, again: str | None) -> str:
    """frontier.html; whatever comes from the config is escaped.

    Args:
        name: of the sweep.
        frontier: what it shows.
        again: the command that trains the recommended setting once more, where there is one.
    """
    caption = (
        "KL is of the student as copied, as fitted before its first step, and as it came out. "
        "Costs are student over teacher. * no other trial is at least as good in KL, prefill and cache and better in "
        "one of them. Lines: the teacher's accuracy, and what is allowed to be lost."
    )
    how = ""
    if best := frontier.recommended:
        how = (
            f"<p>Its student lies in <code>trials/{escape(best.name)}/final</code>. To train the setting again, "
            f"for longer or on more data:</p>\n<pre>{escape(again or '')}</pre>"
        )
    rows = [(point.name, cells(point, frontier)) for point in frontier.points]
    other_rows = [(trial, [out["status"], out.get("reason", "")]) for trial, out in frontier.others.items()]
    others = html_table(["", ""], other_rows, "Not in the figures.")
    header = f"<h1>{escape(name)}</h1>\n<p>What SwiftKV settings keep of their teacher, and what they save</p>\n"
    body = f"""<section id="recommended">
<h2>Recommended</h2>
<p>{escape(recommendation(frontier))}.</p>
{how}
</section>
<section id="frontier">
<h2>Frontier</h2>
{grid(panels(frontier))}{html_table(list(COLUMNS), rows, caption)}</section>
{f'<section id="others"><h2>Other trials</h2>{others}</section>' if others else ""}
"""
    return document(f"{name}: the frontier", header, body)


def panels(frontier: Frontier) -> str:
    """The panels as inline SVG; nothing without points."""
    return "".join(
        plot(
            f"{cost}-{quality}",
            f"{QUALITIES[quality]} by {COSTS[cost]}",
            "; ".join(f"{p.name}: {getattr(p, quality):.4g} at {getattr(p, cost):.2f}" for p in frontier.points),
            partial(draw_panel, frontier=frontier, cost=cost, quality=quality),
        )
        for cost, quality in panels_of(frontier)
        if frontier.points
    )


def panels_of(frontier: Frontier) -> list[tuple[str, str]]:
    """Those of `PANELS` that show something: accuracy where there is any."""
    return [(cost, quality) for cost, quality in PANELS if quality != "accuracy" or frontier.has_accuracy]


def draw_panel(
    axes: Axes, frontier: Frontier, cost: str, quality: str, colour_of: Callable[[str], str] = lambda colour: colour
) -> None:
    """Points by a cost ("prefill", "cache") and by what they keep ("accuracy") or how far off they are ("kl").

    Args:
        axes: to draw on.
        frontier: whose points.
        cost: across.
        quality: upwards.
        colour_of: the colour to draw in for each of the plots' stand-ins.
    """
    points = frontier.points
    values = [(getattr(point, cost), getattr(point, quality)) for point in points]
    axes.plot(*zip(*edge(values, upwards=quality == "accuracy"), strict=True), color=colour_of(FAINT), zorder=1)
    for (x, y), point in zip(values, points, strict=True):
        colour = colour_of(STUDENT if point.pareto else THIRD)
        axes.plot([x], [y], "o" if point.pareto else "x", color=colour, zorder=3)
        axes.annotate(
            point.name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=6, color=colour_of(INK), zorder=4
        )
        if point == frontier.recommended:
            axes.plot([x], [y], "o", markersize=11, fillstyle="none", color=colour_of(STUDENT), zorder=2)
    axes.set_xlabel(f"{COSTS[cost]}, student / teacher")
    if quality == "accuracy":
        teacher = points[0].teacher_accuracy
        axes.axhline(teacher, color=colour_of(FAINT), linewidth=1)
        axes.axhline(teacher - frontier.max_accuracy_drop, color=colour_of(FAINT), linewidth=1, linestyle="--")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("accuracy")
    else:
        axes.set_ylabel("KL from the teacher, nats per token")
        if min(point.kl for point in points) > 0:
            axes.set_yscale("log")
            plain_ticks(axes.yaxis)
    axes.margins(0.15)  # so that names beside the outermost points are not cut


def edge(values: Sequence[tuple[float, float]], upwards: bool) -> list[tuple[float, float]]:
    """Of pairs of cost and quality those that nothing as cheap or cheaper beats, cheapest first."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(values, key=lambda value: (value[0], -value[1] if upwards else value[1])):
        if not kept or (y > kept[-1][1] if upwards else y < kept[-1][1]):
            kept.append((x, y))
    return kept
