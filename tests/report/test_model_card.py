"""The model card says what the model is, how to use it and what was measured, with the figures of the report."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import SAVINGS, SUMMARY, evaluation, planted, planted_run, run_folder, sft_evaluation, written

from vlskv_ray.report.model_card import write_model_card


def card_of(folder: Path) -> str:
    (folder / "final").mkdir()
    path = write_model_card(folder)
    assert path == folder / "final" / "README.md"
    return path.read_text()


def front_matter(card: str) -> Any:
    empty, values, _ = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(values)


def tables(card: str) -> list[list[list[str]]]:
    """Cells of the tables, as plain text; a bar or backslash in a cell stands behind a backslash."""
    found: list[list[list[str]]] = []
    before = ""
    for line in card.splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            hidden = line.replace("\\\\", "\1").replace("\\|", "\2")
            cells = [cell.strip() for cell in hidden.strip("|").split("|")]
            for i, cell in enumerate(cells):
                for markdown, text in (("\\", ""), ("\1", "\\"), ("\2", "|"), ("&lt;", "<"), ("&gt;", ">")):
                    cell = cell.replace(markdown, text)
                cells[i] = cell.replace("&amp;", "&")
            found[-1].append(cells)
        before = line
    return [[line for line in table if "---" not in line] for table in found]


@pytest.mark.parametrize("objective", ["distill", "sft", "no answers"])
def test_figures_are_those_of_the_report(tmp_path: Path, objective: str) -> None:
    """Every table of the card stands in the report, value by value, and every table of results in the card."""
    measured = {"distill": evaluation(), "sft": sft_evaluation(), "no answers": {"savings": SAVINGS}}[objective]
    objective = "sft" if objective == "sft" else "distill"
    folder = run_folder(tmp_path, objective=objective, evaluation=measured, plots=False)
    page, card = written(folder), card_of(folder)
    in_page = [line for table in page.tables for line in table]
    in_card = [line for table in tables(card) for line in table[1:]]
    assert in_card and all(line in in_page for line in in_card)
    aside = [["image_damaged", "3"], ["too_long", "12"]]
    names = {"question", "expected", "teacher", "student copied", "student distilled", "model", ""}
    assert all(line in in_card for line in in_page if line[0] not in names and line not in aside)
    headline = page.text[: page.text.index("Result")]
    for figure in ("97.9%", "98.1%", "46.8%", "0.01234", "1.12"):
        assert (f" {figure}**" in card) == (figure in headline)
    assert "training 246 s**" in card


def test_answers_stand_below_the_result(tmp_path: Path) -> None:
    """The student's below its teacher's, after the measures and before what is saved; of long ones the beginning."""
    found = evaluation()
    found["examples"][0] |= {"student": "red *and* " + "long " * 200, "images": []}
    card = card_of(run_folder(tmp_path, evaluation=found, plots=False))
    before, _, after = card.partition("Some greedy answers to held-out questions:\n\n")
    assert "| KL per token, mean |" in before and "## What it saves" in after
    first, second = after.split("\n- question")[:2]
    assert first.startswith(
        "- question: What colour is the disc?\n  - teacher: red\n  - student copied: blue\n"
        "  - student distilled: red \\*and\\* long long"
    )
    assert first.endswith("… (of 1,010 characters)") and len(first) < 650
    assert second.startswith(", 1 image: What colour is the disc?\n  - teacher: red\n")


def test_a_hub_reads_its_front_matter(tmp_path: Path) -> None:
    """A model of the hub is named as the base, a folder of this machine is not, nor shown whole anywhere."""
    sources = {"sources": [{"name": "org/pictures", "split": "train"}, {"path": "/home/me/data/chat.jsonl"}]}
    of_hub = card_of(run_folder(tmp_path / "hub", summary=SUMMARY | {"model": "org/llava"}, data=sources, plots=False))
    assert front_matter(of_hub) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["swiftkv", "vlskv_ray", "knowledge-distillation"],
        "base_model": "org/llava",
        "datasets": ["org/pictures"],
    }
    of_folder = card_of(run_folder(tmp_path / "folder", data=sources, plots=False))
    assert "base_model" not in front_matter(of_folder)
    assert "shapes-teacher" in of_folder and "chat.jsonl" in of_folder
    assert "/models" not in of_folder and "/home" not in of_folder


def test_it_says_how_to_use_and_to_make_it_again(tmp_path: Path) -> None:
    """The snippet is Python that registers the model types first; a plain model needs no vlskv_ray."""
    card = card_of(run_folder(tmp_path / "shapes", evaluation=evaluation(), plots=False))
    snippet = card.split("```python\n")[1].split("```")[0]
    first, *_ = ast.parse(snippet).body
    assert ast.unparse(first) == "import vlskv_ray"
    assert f'folder = "{tmp_path.name}/shapes/final"' in snippet
    assert "python -m vlskv_ray.train --config" in card
    assert "arXiv 2410.03960" in card and "from layer 2 on" in card and "in groups of 1." in card
    sft = card_of(run_folder(tmp_path / "sft", objective="sft", evaluation=sft_evaluation(), plots=False))
    assert "import vlskv_ray" not in sft and "SwiftKV" not in sft


def test_what_fine_tuning_trained_is_said(tmp_path: Path) -> None:
    """A student that learnt answers is one, and was not distilled; of a plain model parts that trained are named."""
    of_parts = {"name_or_path": "/models/blind", "trainable": ["projector"]}
    parameters = {"trained": {"projector": 2144}, "frozen": {"vision_tower": 21856, "text": 65696}}
    plain, student = (
        card_of(
            run_folder(
                tmp_path / name,
                objective="sft",
                evaluation=evaluation() | {"student_is": "fine-tuned"} if "student" in name else sft_evaluation(),
                summary=SUMMARY | {"parameters": parameters},
                plots=False,
                model=model,
            )
        )
        for name, model in (
            ("plain", of_parts),
            ("student", of_parts | {"trainable": ["swiftkv"], "num_key_value_layers": 2, "key_value_group_size": 1}),
        )
    )
    assert "on answers, of its parts projector alone." in plain and front_matter(plain)["tags"] == ["vlskv_ray"]
    assert "projections were fine-tuned on answers;" in student and "import vlskv_ray" in student
    assert front_matter(student)["tags"] == ["swiftkv", "vlskv_ray"] and "distill" not in student
    rows = {label: value for label, *value in [line for table in tables(plain) for line in table] if len(value) == 1}
    assert rows["trained weights"] == ["2,144 projector"] and rows["frozen weights"] == [
        "21,856 vision_tower, 65,696 text"
    ]
    assert all("| temperature |" not in card for card in (plain, student))


HOSTILE = ["<script>alert(1)</script>", "a | b", "`x` *b* [l](http://e.org) ~~", "\\|", "line\n# head\n---\n```"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_in_its_place(tmp_path: Path, text: str) -> None:
    """In kinds, sources, reasons, names and versions: the same lines, columns and fences, and the text as it is."""
    names = {"hostile": text, "harmless": "harmless"}
    hostile, harmless = (
        card_of(run_folder(tmp_path / name, evaluation=planted(text), plots=False, **planted_run(text)))
        for name, text in names.items()
    )
    assert hostile.count("\n") == harmless.count("\n") and "<script" not in hostile
    starts = [[line[:2] for line in card.splitlines() if line[:1] != "|"] for card in (hostile, harmless)]
    assert starts[0] == starts[1]
    shown = " ".join(text.split())
    wanted = [[[cell.replace("harmless", shown) for cell in line] for line in table] for table in tables(harmless)]
    assert tables(hostile) == wanted


def test_without_an_evaluation_it_says_so(tmp_path: Path) -> None:
    card = card_of(run_folder(tmp_path, plots=False))
    assert "This run was not evaluated." in card and "## What it saves" not in card
    assert "**training 246 s**" in card
