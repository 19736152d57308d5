"""Plots as inline SVG, in the colours of the page they stand on, and those that a run has."""

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from vlskv_ray.report.figures import is_number, percent, scores, whole
from vlskv_ray.report.run_files import RunFiles, at

NUM_POINTS = 120
"""Points of a curve: more steps than that are averaged, so that trends show and the page stays small."""

Points = list[tuple[float, float]]

TEACHER, STUDENT, THIRD = "#000001", "#000002", "#000003"
INK, FAINT = "#000004", "#000005"
CSS_COLOURS = {
    TEACHER: "var(--teacher)",
    STUDENT: "var(--student)",
    THIRD: "var(--third)",
    INK: "currentColor",
    FAINT: "var(--faint)",
}
"""matplotlib draws in stand-ins for these, so that the plots follow the page into the dark."""

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


def loss_plot(run: RunFiles) -> str:
    """What is learnt, of samples with images and without."""
    prefix, what = run.objective.prefix, run.objective.loss_title
    curves = [
        ("with images", curve(run.metrics, f"{prefix}_vision"), STUDENT, "-"),
        ("text only", curve(run.metrics, f"{prefix}_text"), THIRD, "--"),
    ]
    return curves_plot("loss", f"Training: {what} per supervised token{averaging_note(run)}", curves, log=True)


def learning_rate_plot(run: RunFiles) -> str:
    curves = [("learning rate", curve(run.metrics, "learning_rate"), STUDENT, "-")]
    return curves_plot("learning-rate", f"Training: learning rate{averaging_note(run)}", curves)


def agreement_plot(run: RunFiles) -> str:
    """How often the likeliest token is the right one, in training and on held-out samples, and how often the answer."""
    key, label = run.objective.agreement, run.objective.agreement_title
    curves = [
        (f"{label}, training", curve(run.metrics, key), STUDENT, "-"),
        (f"{label}, held out", curve(run.metrics, f"eval_{key}"), STUDENT, "o:"),
    ]
    what, accuracy = "agreement", curve(run.metrics, "eval_accuracy")
    if scores(run.evaluation, "accuracy"):
        what = "agreement and accuracy"
        curves.append(("accuracy, held out", accuracy, THIRD, "s--"))
        steps = [step for _, points, *_ in curves for step, _ in points]
        teacher = at(run.evaluation, "teacher", "accuracy")
        if steps and is_number(teacher):
            ends = [(min(steps), teacher), (max(steps), teacher)]
            curves.append(("accuracy of the teacher, held out", ends, TEACHER, "-."))
    return curves_plot("agreement", f"Training: {what}{averaging_note(run)}", curves, shares=True)


def prefill_plot(savings: Any) -> str:
    """By CPU time where that was measured: on a GPU, and in files of earlier versions, there is none."""
    lengths, by_cpu = at(savings, "prompt_lengths") or [], at(savings, "prefill_cpu_time_ratio") is not None
    curves = []
    for side, colour, style in (("teacher", TEACHER, "s--"), ("student", STUDENT, "o-")):
        times = at(savings, f"{side}_prefill_{'cpu_' if by_cpu else ''}seconds") or []
        pairs = zip(lengths, times, strict=False)
        curves.append((side, [(x, y) for x, y in pairs if is_number(x) and is_number(y)], colour, style))
    what = "CPU seconds" if by_cpu else "Seconds"
    caption = f"{what} until the first token of the answer can be chosen, by tokens of the prompt"
    return curves_plot("prefill-time", caption, curves, x_label="tokens of the prompt", log=True, log_x=True)


def lengths_plot(counts: Any) -> str:
    lengths = counted(counts)
    if not lengths:
        return ""

    def draw(axes: Axes) -> None:
        axes.hist(list(lengths), bins=min(30, len(lengths)), weights=list(lengths.values()), color=STUDENT)
        axes.set(xlabel="tokens of a sample, image tokens included", ylabel="samples")

    alt = f"{whole(sum(lengths.values()))} samples of {whole(min(lengths))} to {whole(max(lengths))} tokens"
    return plot("lengths", "Lengths of the samples in tokens", alt, draw)


def images_plot(counts: Any) -> str:
    images = counted(counts)
    if not images:
        return ""

    def draw(axes: Axes) -> None:
        axes.bar([str(number) for number in images], list(images.values()), color=THIRD, width=0.6)
        axes.grid(axis="x", visible=False)
        axes.set(xlabel="images of a sample", ylabel="samples")

    alt = "; ".join(f"{whole(count)} samples with {number}" for number, count in images.items())
    return plot("images", "Images per sample", alt, draw)


def counted(counts: Any) -> dict[int, float]:
    """{"2": 40} of JSON as {2: 40}, in order."""
    pairs = counts.items() if isinstance(counts, dict) else ()
    return dict(sorted((int(name), count) for name, count in pairs if name.isdecimal() and is_number(count)))


def curve(metrics: Sequence[dict[str, Any]], key: str) -> Points:
    """A metric over the steps that have it, as at most `NUM_POINTS` means of neighbours."""
    points = [(m["step"], m[key]) for m in metrics if is_number(m.get("step")) and is_number(m.get(key))]
    size = -(-len(points) // NUM_POINTS) or 1
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def averaging_note(run: RunFiles) -> str:
    return f", averaged to at most {NUM_POINTS} points a curve" if len(run.metrics) > NUM_POINTS else ""


def curves_plot(
    name: str,
    caption: str,
    curves: Sequence[tuple[str, Points, str, str]],
    *,
    x_label: str = "step",
    log: bool = False,
    log_x: bool = False,
    shares: bool = False,
) -> str:
    """Curves, each a label, points, colour and style; nothing where none has points.

    Args:
        log: a logarithmic y axis, where the values are positive and span more than a factor of five.
        log_x: a logarithmic x axis with a tick at each point.
        shares: y is a share, shown in percent.
    """
    drawn = [(label, points, colour, style) for label, points, colour, style in curves if points]
    if not drawn:
        return ""
    values = [y for _, points, *_ in drawn for _, y in points]

    def draw(axes: Axes) -> None:
        for label, points, colour, style in drawn:
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label)
        axes.set_xlabel(x_label)
        if log and 0 < 5 * min(values) < max(values):  # a logarithmic axis of a narrow range has hardly a tick
            axes.set_yscale("log")
            plain_ticks(axes.yaxis)
        if log_x and min(x for _, points, *_ in drawn for x, _ in points) > 0:
            axes.set_xscale("log")
            plain_ticks(axes.xaxis)
            ticks = sorted({x for _, points, *_ in drawn for x, _ in points})
            axes.set_xticks(ticks, [whole(x) for x in ticks])
        if shares:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if len(drawn) > 1:
            axes.legend()

    def shown(value: float) -> str:
        return percent(value) if shares else f"{value:.4g}"

    alt = "; ".join(  # for those who hear the page: where each curve begins and ends
        f"{label}: {shown(points[0][1])} at {x_label} {whole(points[0][0])}, "
        f"{shown(points[-1][1])} at {whole(points[-1][0])}"
        for label, points, *_ in drawn
    )
    return plot(name, caption, alt, draw)


def plain_ticks(axis: Axis) -> None:
    """0.02 instead of 2 x 10^-2 on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def plot(name: str, caption: str, alt: str, draw: Callable[[Axes], None]) -> str:
    """A figure of the page: inline SVG whose ids begin with `name`, so that they differ from those of other plots."""
    drawn = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):  # the salt: the same page for the same files
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        draw(figure.subplots())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prologue
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for stand_in, colour in CSS_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(f"{caption}. {alt}")}" ', 1)
    return f'<figure id="{name}">\n{svg}<figcaption>{escape(caption)}.</figcaption>\n</figure>\n'
