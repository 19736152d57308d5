"""final/README.md: the model card, a pure function of the files of a run folder."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from vlskv_ray.files import write_text
from vlskv_ray.report.figures import (
    SAVINGS_COLUMNS,
    answer_pairs,
    columns,
    environment_rows,
    headline,
    held_out,
    kind_rows,
    result_rows,
    savings_note,
    savings_rows,
    savings_warning,
    training_rows,
)
from vlskv_ray.report.markdown import escape_markdown, markdown_table
from vlskv_ray.report.run_files import RunFiles, as_written, at, read_run

NUM_PAIRS = 4
MOST_CHARACTERS = 500
"""How many answers to read the card shows, and what of each."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_model_card(folder: Path) -> Path:
    """Writes `final/README.md` of a run folder and returns its path; ValueError where a file there cannot be read."""
    run = read_run(folder)
    path = run.folder / "final" / "README.md"
    with as_written(folder):
        text = card(run)
    write_text(path, text.encode("utf-8", "replace").decode())  # a lone surrogate, which JSON can hold, as "?"
    return path


def card(run: RunFiles) -> str:
    """The whole card; tables without rows are left out."""
    evaluation = run.evaluation
    figures = "; ".join(f"**{label} {escape_markdown(text)}**" for label, [text] in headline(run))
    parts = [
        f"---\n{front_matter(run)}---",
        f"# {escape_markdown(run.name)}",
        what_it_is(run),
        figures,
        "## Use",
        usage(run),
        "## Result",
        escape_markdown(held_out(run)),
        markdown_table(columns(evaluation), result_rows(evaluation)),
        markdown_table(columns(evaluation), kind_rows(evaluation), "accuracy by kind (questions)"),
        answers(evaluation),
    ]
    if rows := savings_rows(evaluation):
        parts += ["## What it saves", escape_markdown(savings_note(evaluation)), markdown_table(SAVINGS_COLUMNS, rows)]
        parts.append(escape_markdown(savings_warning(evaluation)))
    parts += [
        "## Training",
        markdown_table(["value"], training_rows(run)),
        "To train it again, from the configuration that lies in the run's folder:",
        "```bash\npython -m vlskv_ray.train --config config.yaml output.name=again\n```",
        markdown_table(["version"], environment_rows(run)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def answers(evaluation: dict[str, Any]) -> str:
    """Some greedy answers to read, as a list: the student's below its teacher's."""
    pairs = answer_pairs(evaluation, NUM_PAIRS, MOST_CHARACTERS)
    lines = [
        f"{'  ' if i else ''}- {label}: {escape_markdown(text)}"
        for rows in pairs
        for i, (label, [text]) in enumerate(rows)
    ]
    return "\n".join(["Some greedy answers to held-out questions:", "", *lines]) if lines else ""


def front_matter(run: RunFiles) -> str:
    """What the Hugging Face hub reads of a card, as YAML."""
    base = at(run.summary, "model") or at(run.config, "model", "name_or_path") or ""
    names = [source.get("name") or "" for source in at(run.config, "data", "sources") or [] if isinstance(source, dict)]
    datasets = [name for name in names if HUB_ID.fullmatch(name)]
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": [*run.objective.tags],
        **({"base_model": base} if HUB_ID.fullmatch(base) else {}),
        **({"datasets": datasets} if datasets else {}),
    }
    return yaml.safe_dump(values, sort_keys=False)


def what_it_is(run: RunFiles) -> str:
    if not run.objective.has_student:
        trained, frozen = (at(run.summary, "parameters", how) for how in ("trained", "frozen"))
        only = f", of its parts {escape_markdown(' and '.join(trained))} alone" if trained and frozen else ""
        return f"This is a vision-language model, fine-tuned from {escape_markdown(run.model)} on answers{only}."
    layers = (at(run.config, "model", key) for key in ("num_key_value_layers", "key_value_group_size"))
    model, first, group = map(escape_markdown, (run.model, *layers))
    return (
        f"This is {model} in SwiftKV form ([arXiv 2410.03960](https://arxiv.org/abs/2410.03960)): keys and "
        f"values of its text layers from layer {first} on are projected from the hidden state that enters that "
        f"layer, so that tokens of the prompt, image tokens included, skip them. Layers share a cache in groups "
        f"of {group}. The new projections were {run.objective.origin}; all other weights are its own."
    )


def usage(run: RunFiles) -> str:
    folder = f"{run.folder.parent.name}/{run.folder.name}/final"
    registers = "import vlskv_ray  # registers the SwiftKV model types\n" if run.objective.has_student else ""
    return f"""```python
{registers}from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = {json.dumps(folder, ensure_ascii=False)}
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What colour is it?"}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
image = Image.open("picture.png").convert("RGB")
inputs = processor(text=text, images=image, add_special_tokens=False, return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```"""
