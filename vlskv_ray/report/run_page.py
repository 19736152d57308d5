"""report.html: what a run came to, on one page that needs nothing but itself.

A pure function of the files of a run folder. Whatever comes from data or config is escaped; the page loads nothing, and
says so to the browser (Content-Security-Policy).
"""

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

NUM_EXAMPLES = 8
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
        ("training", "Training", training_section(run)),
        ("prefill", "Prefill time", prefill_plot(run.evaluation.get("savings"))),
        ("data", "Data", data_section(run)),
        (
            "savings",
            "What the student saves",
            html_table(SAVINGS_COLUMNS, savings_rows(run.evaluation), savings_note(run.evaluation)),
        ),
        ("samples", "Held-out samples", samples_section(run.evaluation)),
        ("config", "Configuration", f"<pre>{escape(run.config_text)}</pre>" if run.config_text else ""),
        ("environment", "Environment", html_table([], environment_rows(run), "Versions and machine of the run.")),
    )
    body = "".join(
        f'<section id="{name}">\n<h2>{title}</h2>\n{content}\n</section>\n'
        for name, title, content in sections
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
        note += " KL in nats per token of the reference answers; agreement is with the teacher."
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


def samples_section(evaluation: dict[str, Any]) -> str:
    """The first examples, each answer marked in words and by colour."""
    examples = (evaluation.get("examples") or [])[:NUM_EXAMPLES]
    return f'<div class="samples">{"".join(map(sample_article, examples))}</div>' if examples else ""


def sample_article(example: dict[str, Any]) -> str:
    reference, name = example.get("reference"), escape(str(example.get("id", "")))
    uris = [str(uri) for uri in example.get("images") or []]
    shown = [uri for uri in uris if DATA_URI.fullmatch(uri)]  # an SVG could hold a script, an address would be loaded
    pictures = "".join(
        f'<img src="{uri}" alt="Picture {i} of {len(shown)} of sample {name}">' for i, uri in enumerate(shown, 1)
    )
    if len(shown) < len(uris):
        pictures += f"<p>{len(uris) - len(shown)} not shown: no PNG, JPEG or WebP data URI.</p>"
    lines = [("question", example.get("question"), ""), ("expected", reference, "")]
    lines += [
        (title, example[side], MARKS[example[side] == reference])
        for side, title in SIDE_TITLES.items()
        if side in example
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
