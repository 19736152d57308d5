"""Files of a finished run with figures that are known, and its report as a parser sees it."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from vlskv_ray.report.run_page import write_report

PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAADAAAAAgCAIAAADbtmxLAAAAMUlEQVR42u3OAQ0AAAQAMKTRP4VYapj9CZ7THZdU"
    "HCMkJCQkJCQkJCQkJCQkJCT0O7Qo2gFY3o3zaQAAAABJRU5ErkJggg=="
)
SECTIONS = ["result", "samples", "training", "prefill", "data", "savings", "config", "environment"]
PLOTS = ["loss", "learning-rate", "agreement", "prefill-time", "lengths", "images"]
VOID = {"meta", "img", "br"}


def side(accuracy: float, kl: float | None, agreement: float | None, cross_entropy: float) -> dict[str, Any]:
    kinds = {"colour": 40, "count": 30, "sum": 30}
    figures = {
        "kl_mean": kl,
        "kl_p95": None if kl is None else 4 * kl,
        "top1_agreement": agreement,
        "agreed_prefix": None if agreement is None else 3.2 * agreement,
        "agreed_prefix_share": agreement,
        "perplexity": math.exp(cross_entropy),
        "cross_entropy": cross_entropy,
    }
    parts = {"vision": {"questions": 70, "accuracy": accuracy}, "text": {"questions": 30, "accuracy": accuracy}}
    by_kind = {kind: accuracy - 0.01 * i for i, kind in enumerate(kinds)}
    return {
        "accuracy": accuracy,
        "accuracy_vision": accuracy + 0.01,
        "accuracy_text": accuracy - 0.02,
        "by_kind": by_kind,
        **figures,
        "details": {**parts, "kinds": {kind: {"questions": n, **figures} for kind, n in kinds.items()}},
    }


SAVINGS = {
    "prompt_lengths": [64, 256, 1024, 2048],
    "teacher_prefill_cpu_seconds": [0.01, 0.04, 0.18, 0.45],
    "student_prefill_cpu_seconds": [0.008, 0.025, 0.1, 0.243],
    "teacher_prefill_seconds": [0.011, 0.041, 0.19, 0.47],
    "student_prefill_seconds": [0.009, 0.026, 0.11, 0.26],
    "teacher_prefill_flops": [4.1e8, 1.7e9, 7.9e9, 1.9e10],
    "student_prefill_flops": [3.2e8, 1.0e9, 4.3e9, 1.01e10],
    "prompt_length": 2048,
    "prompt_images": 1,
    "prefill_cpu_time_ratio": 0.54,
    "prefill_time_ratio": 0.5532,
    "prefill_flops_ratio": 0.5316,
    "teacher_cache_bytes_per_token": 2048.0,
    "student_cache_bytes_per_token": 1536.0,
    "cache_bytes_ratio": 0.75,
    "parameters": 4406080,
    "trainable_parameters": 16448,
    "threads": 2,
}


def evaluation() -> dict[str, Any]:
    answers = {"teacher": "red", "student_before": "blue", "student": "red"}
    example = {"kind": "colour", "question": "What colour is the disc?", "reference": "red", **answers}
    return {
        "teacher": side(0.94, 0.0, 1.0, 0.101),
        "student_before": side(0.31, 1.913, 0.622, 2.207),
        "student": side(0.92, 0.01234, 0.981, 0.113),
        "student_is": "distilled",
        "savings": dict(SAVINGS),
        "samples": 100,
        "questions": 100,
        "left_out": {"too_long": 2},
        "max_new_tokens": 64,
        "sources": ["shapes (test)"],
        "model": {"num_hidden_layers": 4, "num_key_value_layers": 2, "key_value_group_size": 1},
        "examples": [{"id": f"shapes/{i}", **example, "images": [PICTURE] if i < 6 else []} for i in range(8)],
    }


def sft_evaluation() -> dict[str, Any]:
    whole = evaluation()
    examples = [{"id": "shapes/0", "kind": "", "question": "?", "reference": "red", "sft_model": "red", "images": []}]
    kept = {key: whole[key] for key in ("samples", "questions", "left_out", "sources", "model")}
    return {"sft_model": side(0.94, None, None, 0.101), **kept, "examples": examples}


NEWER = {
    *("student_is", "perplexity", "agreed_prefix_share", "max_new_tokens", "prompt_images", "prefill_cpu_time_ratio"),
    *("teacher_prefill_cpu_seconds", "student_prefill_cpu_seconds"),
}


def of_earlier_version(values: Any) -> Any:
    """What evaluation.json held before it had the keys of `NEWER`."""
    if not isinstance(values, dict):
        return values
    return {key: of_earlier_version(value) for key, value in values.items() if key not in NEWER}


def free_text(found: dict[str, Any]) -> dict[str, Any]:
    """An evaluation in which nobody gives a reference word for word."""
    for name in ("teacher", "student_before", "student", "sft_model"):
        if name in found:
            found[name] |= dict.fromkeys(("accuracy", "accuracy_vision", "accuracy_text"), 0.0)
            found[name]["by_kind"] = dict.fromkeys(found[name]["by_kind"], 0.0)
    return found


def metrics(objective: str) -> list[dict[str, Any]]:
    lines = []
    for step in range(1, 401):
        loss = 0.2 * math.exp(-step / 90) + 0.004 * (1 + math.sin(step))
        line: dict[str, Any] = {"step": step, "epoch": step / 200, "loss": loss, "learning_rate": 1e-3 / step}
        if objective == "sft":
            line |= {"ce_vision": loss, "ce_text": 2 * loss, "token_accuracy": 1 - loss}
        else:
            line |= {"kl_vision": loss, "top1_agreement": 1 - loss} | ({"kl_text": 2 * loss} if step % 7 else {})
        if step % 50 == 0:
            line |= {"eval_accuracy": 0.95 - 2 * loss, "eval_top1_agreement": 1 - 1.5 * loss, "eval_kl_mean": None}
        lines.append(line)
    return lines


SUMMARY = {
    "steps": 400,
    "training_seconds": 246.4,
    "command_seconds": 290.1,
    "averaged_steps": 5,
    "rejected": {"image_damaged": 3, "too_long": 12},
    "model": "/models/shapes-teacher",
    "revision": None,
    "versions": {"vlskv_ray": "0.1.0", "torch": "2.13.0+cpu"},
    "data": {
        "samples": 3185,
        "lengths": {str(60 + 9 * i): 400 // (1 + abs(i - 5)) for i in range(25)},
        "images": {"0": 800, "1": 2200, "2": 185},
    },
    "environment": {"python": "3.11.7", "platform": "Linux-6.1", "cpus": 2, "threads": 1, "workers": 2},
}


def run_folder(
    folder: Path,
    objective: str = "distill",
    evaluation: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    plots: bool = True,
    **config: Any,
) -> Path:
    """A finished run's files; no evaluation.json unless it is given. Without plots the page is written faster."""
    folder.mkdir(exist_ok=True)
    resolved = {
        "objective": objective,
        "temperature": 2.0,
        "model": {"name_or_path": "/models/shapes-teacher", "num_key_value_layers": 2, "key_value_group_size": 1},
        "data": {"sources": [{"name": "shapes", "path": None, "split": "train", "weight": 1.0}]},
        "optimizer": {"lr": 1e-3},
        "output": {"name": "shapes"},
        **config,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(objective) if plots))
    summary = SUMMARY if summary is None else summary
    (folder / "summary.json").write_text(json.dumps(summary if plots else summary | {"data": {"samples": 3185}}))
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


class Page(HTMLParser):
    """Elements and text of a page; fails where a tag is closed that is not open."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text += text
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += text

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def ids(self, tag: str) -> list[str | None]:
        return [attributes["id"] for attributes in self.all(tag) if "id" in attributes]


def written(folder: Path) -> Page:
    return Page(write_report(folder).read_text())


def planted(text: str) -> dict[str, Any]:
    found = evaluation()
    for example in found["examples"]:
        example |= dict.fromkeys(("id", "kind", "question", "reference", "teacher", "student_before", "student"), text)
    for name in ("teacher", "student_before", "student"):
        found[name]["by_kind"] = {text: 0.5}
    return found | {"sources": [text], "left_out": {text: 1}}


def planted_run(text: str) -> dict[str, Any]:
    summary = SUMMARY | {"rejected": {text: 1}, "model": text, "revision": text, "versions": {"torch": text}}
    return {"summary": summary, "output": {"name": text}, "data": {"sources": [text]}}
