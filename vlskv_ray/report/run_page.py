"""report.html: what a run came to, on one page that needs nothing but itself.

A pure function of the files of a run folder. Whatever comes from data or config is escaped; the page loads nothing, and
says so to the browser (Content-Security-Policy).
"""

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from vlskv_ray.files import write_text
from vlskv_ray.report.figures import (
    DASH,
    SAVINGS_COLUMNS,
    SIDES,
    RunFiles,
    as_written,
    at,
    columns,
    environment_rows,
    headline,
    held_out,
    is_number,
    kind_rows,
    percent,
    read_run,
    result_rows,
    savings_note,
    savings_rows,
    training_rows,
    whole,
)

NUM_EXAMPLES = 8
NUM_POINTS = 120
"""Points of a curve: more steps than that are averaged, so that trends show and the page stays small."""
DATA_URI = re.compile(r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+")

Points = list[tuple[float, float]]


def write_report(folder: Path) -> Path:
    """Writes `report.html` of a run folder and returns its path; ValueError where a file there cannot be read."""
    run = read_run(folder)
    path = run.folder / "report.html"
    with as_written(folder):
        text = page(run)
    write_text(path, text.encode("utf-8", "replace").decode())  # a lone surrogate, which JSON can hold, as "?"
    return path


def page(run: RunFiles) -> str:
    """The whole page. Sections without data are left out, or say why they are empty."""
    sections = (
        ("result", "Result", result(run)),
        ("training", "Training", training(run)),
        ("prefill", "Prefill time", prefill_plot(run.evaluation.get("savings"))),
        ("data", "Data", data(run)),
        (
            "savings",
            "What the student saves",
            table(SAVINGS_COLUMNS, savings_rows(run.evaluation), savings_note(run.evaluation)),
        ),
        ("samples", "Held-out samples", samples(run.evaluation)),
        ("config", "Configuration", f"<pre>{escape(run.config_text)}</pre>" if run.config_text else ""),
        ("environment", "Environment", table([], environment_rows(run), "Versions and machine of the run.")),
    )
    body = "".join(
        f'<section id="{name}">\n<h2>{title}</h2>\n{content}\n</section>\n'
        for name, title, content in sections
        if content
    )
    tiles = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(text)}</dd></div>" for label, [text] in headline(run))
    objective = "supervised fine-tuning" if run.is_sft else "SwiftKV by distillation"
    header = (
        f'<h1>{escape(run.name)}</h1>\n<p>{escape(run.model)}: {objective}</p>\n<dl class="headline">{tiles}</dl>\n'
    )
    return document(f"{run.name}: {objective}", header, body)


def document(title: str, header: str, body: str) -> str:
    """A page that needs nothing but itself; header and body are HTML, the title is not."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<header>
{header}</header>
{body}</main>
</body>
</html>
"""


# -------------------------------------------------------------------------------------------------------- the sections
def result(run: RunFiles) -> str:
    note = held_out(run)
    if not columns(run.evaluation):
        return f"<p>{escape(note)}</p>"
    if not run.is_sft:
        note += " KL in nats per token of the reference answers; agreement is with the teacher."
    return table(columns(run.evaluation), result_rows(run.evaluation), note) + table(
        columns(run.evaluation),
        kind_rows(run.evaluation),
        "Accuracy by kind of question, in brackets how many there are.",
    )


def training(run: RunFiles) -> str:
    plots = loss_plot(run) + learning_rate_plot(run) + agreement_plot(run)
    return table([], training_rows(run), "How the model was made.") + grid(plots)


def data(run: RunFiles) -> str:
    rejected = at(run.summary, "rejected")
    if not isinstance(rejected, dict):
        return ""
    rows = [(reason, [whole(count)]) for reason, count in sorted(rejected.items())]
    plots = lengths_plot(at(run.summary, "data", "lengths")) + images_plot(at(run.summary, "data", "images"))
    return grid(plots) + table(
        ["rows"], rows or [("none", ["0"])], "Rows left out, by reason; rejected.jsonl has each of them."
    )


def grid(plots: str) -> str:
    return f'<div class="plots">{plots}</div>\n' if plots else ""


def samples(evaluation: dict[str, Any]) -> str:
    """The first examples, each answer marked in words and by colour."""
    examples = (evaluation.get("examples") or [])[:NUM_EXAMPLES]
    return f'<div class="samples">{"".join(map(sample, examples))}</div>' if examples else ""


def sample(example: dict[str, Any]) -> str:
    reference, name = example.get("reference"), escape(str(example.get("id", "")))
    uris = [str(uri) for uri in example.get("images") or []]
    shown = [uri for uri in uris if DATA_URI.fullmatch(uri)]
    pictures = "".join(
        f'<img src="{uri}" alt="Picture {i} of {len(shown)} of sample {name}">' for i, uri in enumerate(shown, 1)
    )
    if len(shown) < len(uris):
        pictures += f"<p>{len(uris) - len(shown)} not shown: no PNG, JPEG or WebP data URI.</p>"
    lines = [("question", example.get("question"), ""), ("expected", reference, "")]
    lines += [
        (title, example[side], MARKS[example[side] == reference]) for side, title in SIDES.items() if side in example
    ]
    rows = "".join(
        f'<tr><th scope="row">{label}</th><td>{escape(DASH if text is None else str(text))}{mark}</td></tr>\n'
        for label, text, mark in lines
    )
    return (
        f'<article>\n<div class="pictures">{pictures}</div>\n<table>\n'
        f"<caption>{escape(str(example.get('kind') or ''))} <code>{name}</code></caption>\n"
        f"<tbody>\n{rows}</tbody>\n</table>\n</article>\n"
    )


MARKS = {
    True: ' <span class="right">✓ right</span>',
    False: ' <span class="wrong">✗ wrong</span>',
}


def table(head: Sequence[str], rows: Sequence[tuple[str, list[str]]], caption: str) -> str:
    """A table of labels and texts, none of them HTML; without a head it is a list of facts. Nothing without rows."""
    if not rows:
        return ""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(label)}</th>{"".join(f"<td>{escape(text)}</td>" for text in texts)}</tr>\n'
        for label, texts in rows
    )
    return (
        f'<div class="scroll"><table class="{"figures" if head else "facts"}">\n<caption>{escape(caption)}</caption>\n'
        + (f"<thead><tr><td></td>{titles}</tr></thead>\n" if head else "")
        + f"<tbody>\n{lines}</tbody>\n</table></div>\n"
    )


# ----------------------------------------------------------------------------------------------------------- the plots
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
    prefix, what = ("ce", "cross-entropy") if run.is_sft else ("kl", "KL from the teacher")
    curves = [
        ("with images", curve(run.metrics, f"{prefix}_vision"), STUDENT, "-"),
        ("text only", curve(run.metrics, f"{prefix}_text"), THIRD, "--"),
    ]
    return curves_plot("loss", f"Training: {what} per supervised token{averaged(run)}", curves, log=True)


def learning_rate_plot(run: RunFiles) -> str:
    curves = [("learning rate", curve(run.metrics, "learning_rate"), STUDENT, "-")]
    return curves_plot("learning-rate", f"Training: learning rate{averaged(run)}", curves)


def agreement_plot(run: RunFiles) -> str:
    """How often the likeliest token is the right one, in training and on held-out samples, and how often the answer."""
    key, label = ("token_accuracy", "right tokens") if run.is_sft else ("top1_agreement", "top-1 agreement")
    curves = [
        (f"{label}, training", curve(run.metrics, key), STUDENT, "-"),
        (f"{label}, held out", curve(run.metrics, f"eval_{key}"), STUDENT, "o:"),
        ("accuracy, held out", curve(run.metrics, "eval_accuracy"), THIRD, "s--"),
    ]
    steps = [step for _, points, *_ in curves for step, _ in points]
    teacher = at(run.evaluation, "teacher", "accuracy")
    if steps and is_number(teacher):
        ends = [(min(steps), teacher), (max(steps), teacher)]
        curves.append(("accuracy of the teacher, held out", ends, TEACHER, "-."))
    return curves_plot("agreement", f"Training: agreement and accuracy{averaged(run)}", curves, shares=True)


def prefill_plot(savings: Any) -> str:
    lengths = at(savings, "prompt_lengths") or []
    curves = []
    for side, colour, style in (("teacher", TEACHER, "s--"), ("student", STUDENT, "o-")):
        pairs = zip(lengths, at(savings, f"{side}_prefill_seconds") or [], strict=False)
        curves.append((side, [(x, y) for x, y in pairs if is_number(x) and is_number(y)], colour, style))
    caption = "Seconds until the first token of the answer can be chosen, by tokens of the prompt"
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


def averaged(run: RunFiles) -> str:
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
        if log and 0 < 5 * min(values) < max(values):
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

    alt = "; ".join(
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


CSS = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #5b6875; --faint: #d5dbe1; --paper: #fdfdfc; --card: #f4f5f3;
  --teacher: #6b7785; --student: #1f6fb2; --third: #b4570f; --right: #1b7040; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7eb; --soft: #9aa7b4; --faint: #3c4650; --paper: #14181c; --card: #1d2328;
    --teacher: #a3b0bd; --student: #6db3ee; --third: #eda263; --right: #6fcf97; --wrong: #f28b82; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.8rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .75rem; font-size: 1.2rem; }
header p, caption, figcaption { color: var(--soft); overflow-wrap: anywhere; }
.headline { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0 0; }
.headline div { flex: 1 1 8.5rem; padding: .7rem .9rem; background: var(--card); border-radius: .5rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin-bottom: 1.5rem; }
table { border-collapse: collapse; width: 100%; }
caption { caption-side: bottom; padding-top: .5rem; text-align: left; font-size: .85rem; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--faint); text-align: left; vertical-align: top; }
th { font-weight: 500; }
thead th { color: var(--soft); font-size: .85rem; }
.facts th { width: 11rem; color: var(--soft); }
.facts td { overflow-wrap: anywhere; }
.figures thead td { width: 40%; }
.figures td, .figures thead th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.plots { display: grid; gap: 1rem; margin-bottom: 1rem; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: .5rem; }
section > figure { max-width: 32rem; }
figcaption { font-size: .85rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
article { padding: .75rem; background: var(--card); border-radius: .5rem; overflow-wrap: anywhere; }
article caption { caption-side: top; padding: 0 0 .25rem; }
article th { width: 8rem; color: var(--soft); font-size: .85rem; }
article td { white-space: pre-wrap; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; margin-bottom: .5rem; }
.pictures img { max-width: 100%; height: 8rem; object-fit: contain; border-radius: .25rem; }
.right, .wrong { white-space: nowrap; font-size: .85rem; }
.right { color: var(--right); }
.wrong { color: var(--wrong); }
pre { overflow-x: auto; padding: .9rem; background: var(--card); border-radius: .5rem; font-size: .8rem; }
@media (max-width: 32rem) {
  .figures, .facts { font-size: .88rem; }
  .figures thead td { width: auto; }
  .figures thead th { white-space: normal; }
  .facts th { width: 7rem; }
}
"""
