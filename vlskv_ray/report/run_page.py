"""report.html: what a run came to, on one page that needs nothing but itself.

A pure function of the files of a run folder. Whatever comes from data or config is escaped; the page loads nothing, and
says so to the browser (Content-Security-Policy).
"""

import os
import re
from html import escape
from pathlib import Path
from typing import Any

from vlskv_ray.files import write_text
from vlskv_ray.report.figures import (
    SAVINGS_COLUMNS,
    SIDE_TITLES,
    columns,
    environment_rows,
    headline,
    held_out,
    kind_rows,
    result_rows,
    savings_note,
    savings_rows,
    savings_warning,
    scores,
    sides,
    title,
    training_rows,
    whole,
)
from vlskv_ray.report.html import document, grid, html_table
from vlskv_ray.report.plots import (
    agreement_plot,
    images_plot,
    learning_rate_plot,
    lengths_plot,
    loss_plot,
    prefill_plot,
)
from vlskv_ray.report.run_files import DASH, RunFiles, as_written, at, read_run
from vlskv_ray.words import shorten

NUM_EXAMPLES = 8
MOST_CHARACTERS = 2000
"""Of a question or an answer on the page."""
DATA_URI = re.compile(r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+")


def write_report(folder: Path) -> Path:
    """Writes `report.html` of a run folder and returns its path; ValueError where a file there cannot be read."""
    run = read_run(folder)
    path = run.folder / "report.html"
    with as_written(folder):
        text = report_page(run)
    write_text(path, text.encode("utf-8", "replace").decode())  # a lone surrogate, which JSON can hold, as "?"
    return path


def report_page(run: RunFiles) -> str:
    """The whole page. Sections without data are left out, or say why they are empty."""
    sections = (
        ("result", "Result", result_section(run)),
        ("samples", "Answers to read", samples_section(run.evaluation)),
        ("training", "Training", training_section(run)),
        ("prefill", "Prefill time", prefill_plot(run.evaluation.get("savings"))),
        ("data", "Data", data_section(run)),
        ("savings", "What the student saves", savings_section(run.evaluation)),
        ("config", "Configuration", f"<pre>{escape(run.config_text)}</pre>" if run.config_text else ""),
        ("environment", "Environment", html_table([], environment_rows(run), "Versions and machine of the run.")),
    )
    body = "".join(
        f'<section id="{name}">\n<h2>{heading}</h2>\n{content}\n</section>\n'
        for name, heading, content in sections
        if content
    )
    tiles = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(text)}</dd></div>" for label, [text] in headline(run))
    objective = run.objective.title
    header = (
        f'<h1>{escape(run.name)}</h1>\n<p>{escape(run.model)}: {objective}</p>\n<dl class="headline">{tiles}</dl>\n'
    )
    return document(f"{run.name}: {objective}", header, body)


# -------------------------------------------------------------------------------------------------------- the sections
def result_section(run: RunFiles) -> str:
    note = held_out(run)
    if not columns(run.evaluation):
        return f"<p>{escape(note)}</p>"
    if run.objective.has_student:
        note += (
            " KL in nats, agreement, perplexity and cross-entropy are per token of the reference answers; the agreed "
            "prefix is what a greedy answer has in common with the teacher's from its start, its share that of all "
            "tokens of the teacher's answers."
        )
    return html_table(columns(run.evaluation), result_rows(run.evaluation), note) + html_table(
        columns(run.evaluation),
        kind_rows(run.evaluation),
        "Accuracy by kind of question, in brackets how many there are.",
    )


def training_section(run: RunFiles) -> str:
    plots = loss_plot(run) + learning_rate_plot(run) + agreement_plot(run)
    return html_table([], training_rows(run), "How the model was made.") + grid(plots)


def data_section(run: RunFiles) -> str:
    rejected = at(run.summary, "rejected")
    if not isinstance(rejected, dict):
        return ""
    rows = [(reason, [whole(count)]) for reason, count in sorted(rejected.items())]
    plots = lengths_plot(at(run.summary, "data", "lengths")) + images_plot(at(run.summary, "data", "images"))
    return grid(plots) + html_table(
        ["rows"], rows or [("none", ["0"])], "Rows left out, by reason; rejected.jsonl has each of them."
    )


def savings_section(evaluation: dict[str, Any]) -> str:
    table = html_table(SAVINGS_COLUMNS, savings_rows(evaluation), savings_note(evaluation))
    warning = savings_warning(evaluation)
    return table + (f'<p class="warning">{escape(warning)}</p>' if warning else "")


def samples_section(evaluation: dict[str, Any]) -> str:
    """The first examples with their answers, each marked in words and by colour where exact match says something."""
    examples = (evaluation.get("examples") or [])[:NUM_EXAMPLES]
    articles = "".join(sample_article(example, evaluation) for example in examples)
    legend = "Greedy answers to some held-out questions"
    legend += "; dotted from where an answer is no longer the teacher's." if "teacher" in sides(evaluation) else "."
    return f'<p>{legend}</p>\n<div class="samples">{articles}</div>' if examples else ""


def sample_article(example: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """A question, its pictures, and the answers, each cut where it is very long. What of a student's answer comes after
    all that is the teacher's too is set off."""
    reference, name = example.get("reference"), escape(str(example.get("id", "")))
    is_marked = scores(evaluation, "accuracy")
    uris = [str(uri) for uri in example.get("images") or []]
    shown = [uri for uri in uris if DATA_URI.fullmatch(uri)]  # an SVG could hold a script, an address would be loaded
    pictures = "".join(
        f'<img src="{uri}" alt="Picture {i} of {len(shown)} of sample {name}">' for i, uri in enumerate(shown, 1)
    )
    if len(shown) < len(uris):
        pictures += f"<p>{len(uris) - len(shown)} not shown: no PNG, JPEG or WebP data URI.</p>"
    lines = [("question", shown_text(example.get("question"))), ("expected", shown_text(reference))]
    for side in SIDE_TITLES:
        if side in example:
            mark = MARKS[example[side] == reference] if is_marked else ""
            text = shown_text(example[side], None if side == "teacher" else example.get("teacher"))
            lines.append((title(side, evaluation), text + mark))
    rows = "".join(f'<tr><th scope="row">{label}</th><td>{text}</td></tr>\n' for label, text in lines)
    return (
        f'<article>\n<div class="pictures">{pictures}</div>\n<table>\n'
        f"<caption>{escape(str(example.get('kind') or ''))} <code>{name}</code></caption>\n"
        f"<tbody>\n{rows}</tbody>\n</table>\n</article>\n"
    )


def shown_text(text: Any, beside: Any = None) -> str:
    """A text as HTML, set off from where it is no longer the one beside it."""
    if text is None:
        return DASH
    text = shorten(str(text), MOST_CHARACTERS)
    alike = len(text if beside is None else os.path.commonprefix([text, shorten(str(beside), MOST_CHARACTERS)]))
    rest = f'<span class="differs">{escape(text[alike:])}</span>' if text[alike:] else ""
    return escape(text[:alike]) + rest


MARKS = {
    True: ' <span class="right">✓ right</span>',
    False: ' <span class="wrong">✗ wrong</span>',
}
