"""The command that measures: every figure it promises, shown as it is written, and what is wrong with its input."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import save_teacher, tiny_config

from vlskv_ray.config import dump_config, load_config
from vlskv_ray.evaluate import main
from vlskv_ray.model.build import find_model
from vlskv_ray.model.processor import load_processor
from vlskv_ray.report.figures import decimal, percent
from vlskv_ray.words import printable

FIGURES = {
    *("accuracy", "accuracy_vision", "accuracy_text", "by_kind", "kl_mean", "kl_p95", "top1_agreement"),
    *("kl_vision", "kl_text"),
    *("perplexity", "cross_entropy", "agreed_prefix", "agreed_prefix_share"),
}
QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
FEW = ["--num-samples", "5", "--max-new-tokens", "3"]


@pytest.fixture
def run(
    student: Callable[..., Any],
    teacher_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A finished run's folder in the current one, which holds a student and what else the command reads."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    student().save_pretrained(folder / "final")
    load_processor(find_model(str(teacher_folder()))).save_pretrained(folder / "final")
    overrides = ["evaluation.sources=[{name: shapes, split: test, num_samples: 7}]", "output.name=run"]
    (folder / "config.yaml").write_text(dump_config(load_config(QUICKSTART, overrides)))
    (folder / "summary.json").write_text(json.dumps({"steps": 3}))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table_row(printed: str, label: str) -> list[str]:
    [line] = [line for line in printed.splitlines() if line.startswith(f"{label}  ")]
    return line.removeprefix(label).split()


def test_a_student_gets_every_figure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Outside a run: evaluation.json lies in the current folder, and what is printed is what it says. This teacher of
    random weights has nothing right: then exact match is not spoken of."""
    shutil.copytree(run / "final", "student")
    assert main(["--model", "student", *FEW]) == 0
    printed = capsys.readouterr().out
    evaluation = json.loads(Path("evaluation.json").read_text())
    sides = [evaluation[side] for side in ("teacher", "student_before", "student")]
    assert all(side.keys() >= FIGURES for side in sides)
    assert evaluation["student"]["kl_mean"] > 0 == evaluation["teacher"]["kl_mean"]
    assert (evaluation["samples"], evaluation["sources"]) == (5, ["shapes/test"])
    for label, name, form in (
        ("KL per token, mean", "kl_mean", decimal),
        ("KL per token, 95th percentile", "kl_p95", decimal),
        ("top-1 agreement", "top1_agreement", percent),
        ("perplexity", "perplexity", decimal),
        ("cross-entropy", "cross_entropy", decimal),
        ("agreed greedy prefix, tokens", "agreed_prefix", decimal),
        ("agreed greedy prefix, share", "agreed_prefix_share", percent),
    ):
        assert table_row(printed, label) == [form(side[name]) for side in sides]
    assert evaluation["teacher"]["accuracy"] == 0 and printed.count("ccuracy") == 1
    assert "None of the teacher's matches its reference word for word, so no accuracy is shown." in printed
    example = evaluation["examples"][0]
    for label, name in (("teacher", "teacher"), ("student copied", "student_before"), ("student", "student")):
        assert f"\n{label:20}{printable(' '.join(example[name].split()))}" in printed
    for label, name in (
        ("prefill CPU time", "prefill_cpu_time_ratio"),
        ("prefill time", "prefill_time_ratio"),
        ("prefill operations", "prefill_flops_ratio"),
        ("cache bytes per token", "cache_bytes_ratio"),
    ):
        assert table_row(printed, label)[-1] == f"{evaluation['savings'][name]:.2f}"
    assert evaluation["savings"]["prefill_flops_ratio"] < 1
    assert printed.endswith("written: evaluation.json\n")


def test_a_run_gets_its_report_and_card_anew(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the run's own held-out samples, told from others by their number; nothing else of the run is touched."""
    for name in ("evaluation.json", "report.html", "final/README.md"):
        (run / name).write_text("{}")
    before = files(run)
    assert main(["--model", "run/final/", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.endswith("written: run/evaluation.json, run/report.html, run/final/README.md\n")
    after = files(run)
    assert after.keys() == before.keys() and not Path("evaluation.json").exists()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"evaluation.json", "report.html", "final/README.md"}
    evaluation = json.loads(after["evaluation.json"])
    assert evaluation["samples"] == 7
    shown = percent(evaluation["student"]["top1_agreement"])
    assert shown in after["report.html"].decode() and shown in after["final/README.md"].decode()


def test_text_alone_is_measured(run: Path, odds_and_ends: None, capsys: pytest.CaptureFixture[str]) -> None:
    """As all else is, what a prefill of text saves included; an image among the samples is what is prefilled."""
    for name, data, images in (("text", ["text.jsonl"], 0), ("both", ["text.jsonl", "shapes"], 1)):
        flags = [word for source in data for word in ("--data", source)]
        assert main(["--model", "run/final", *FEW, *flags, "--output", f"{name}.json"]) == 0
        evaluation = json.loads(Path(f"{name}.json").read_text())
        assert evaluation["savings"]["prompt_images"] == images
    printed = capsys.readouterr().out
    evaluation = json.loads(Path("text.json").read_text())
    assert (evaluation["samples"], evaluation["left_out"]) == (2, {"answer_empty": 1})
    assert "Prefill of a prompt of 512 tokens of text, with threads: 1." in printed
    for side in ("teacher", "student_before", "student"):
        figures = evaluation[side]
        assert all(figures[name] is not None for name in FIGURES - {"accuracy_vision", "kl_vision"})
        assert figures["kl_mean"] == figures["details"]["text"]["kl_mean"] and figures["accuracy_vision"] is None
    assert evaluation["savings"]["prefill_flops_ratio"] < 1 and len(evaluation["examples"]) == 2


def test_output_and_another_teacher(run: Path, teacher_folder: Callable[..., Path]) -> None:
    """The figures go where they are asked to and the run's files stay as they are. The student's own teacher, given as
    another model, gives the same figures; a different one does not."""
    before = files(run)
    other = teacher_folder(num_hidden_layers=3)
    figures = {}
    for name, teacher in (("own", []), ("plain", [teacher_folder()]), ("other", [other])):
        flags = [word for folder in teacher for word in ("--teacher", str(folder))]
        assert main(["--model", "run/final", *FEW, *flags, "--output", f"{name}.json"]) == 0
        evaluation = json.loads(Path(f"{name}.json").read_text())
        figures[name] = [evaluation[side]["cross_entropy"] for side in ("teacher", "student")]
        figures[name] += [evaluation["student"][key] for key in ("kl_mean", "top1_agreement", "agreed_prefix")]
    assert files(run) == before
    assert figures["plain"] == pytest.approx(figures["own"], rel=1e-5)
    assert abs(figures["other"][0] - figures["own"][0]) > 0.01 and figures["other"][1] == figures["own"][1]


PROBLEMS = {
    "no folder": (["--model", "./nowhere"], "--model: there is no folder './nowhere'; wanted a preset"),
    "no model": (["--model", "empty"], "--model: empty holds no config.json"),
    "plain model": (
        ["--model", "plain"],
        "--model: plain holds no SwiftKV weights; wanted a student, such as the fold",
    ),
    "preset": (["--model", "small-llava-next"], "--model: small-llava-next holds no SwiftKV weights"),
    "damaged weights": (["--model", "damaged"], "--model: damaged: weights cannot be loaded"),
    "another's template": (
        ["--model", "text-template"],
        "--model: text-template: its chat template cannot be used: the model's chat template does",
    ),
    "no file": (["--data", "missing.jsonl"], "missing.jsonl: no such file"),
    "empty file": (["--data", "empty.jsonl"], "empty.jsonl: the file is empty"),
    "no rows": (["--data", "broken.jsonl"], "no row of the file can be read; the first: "),
    "no usable row": (
        ["--data", "unusable.jsonl"],
        "--data: none of the samples of unusable.jsonl can be used (left out: 2 x image_missing, 1 x answer_empty)",
    ),
    "no split": (["--data", "shapes", "--split", "dev"], "shapes has no split 'dev'; wanted one of train, test"),
    "no image root": (
        ["--data", "text.jsonl", "--image-root", "nowhere"],
        "text.jsonl: image_root: there is no folder",
    ),
    "no teacher": (["--teacher", "empty"], "--teacher: empty holds no config.json"),
    "another vocabulary": (["--teacher", "words"], "--teacher: words has another vocabulary than the student, so that"),
    "other pixels": (
        ["--teacher", "shapes-llava-next"],
        "has another vocabulary, another image size, another grid of image tiles, another scale of pixels than",
    ),
    "no output folder": (["--output", "there/is/none.json"], "--output: there is no folder"),
    "output is a folder": (["--output", "empty"], "--output: empty is no regular file; wanted a file"),
    "output is a pipe": (["--output", "pipe"], "--output: pipe is no regular file; wanted a file"),
    "output is the data": (["--output", "text.jsonl"], "--output: text.jsonl holds something else than figures, which"),
    "output is nothing": (["--output", ""], "--output: . is no regular file; wanted a file"),
    "settings of generate": (
        ["--model", "odd-settings"],
        "--model: odd-settings: generation_config.json cannot be used: ",
    ),
    "a run instead of its model": (["--model", "run"], "; did you mean run/final?"),
    "a path, not a hub data set": (["--data", "./missing.txt"], "missing.txt: no such file"),
}


@pytest.fixture
def odds_and_ends(run: Path, teacher_folder: Callable[..., Path]) -> None:
    """Models and data that cannot be used, by the names that PROBLEMS has for them."""
    os.mkdir("empty")
    os.mkfifo("pipe")
    shutil.copytree(teacher_folder(), "plain")
    save_teacher(Path("words"), tiny_config(vocab_size=310))
    for name, file, content in (
        ("damaged", "model.safetensors", "damaged"),
        ("odd-settings", "generation_config.json", '{"eos_token_id": "x"}'),
        ("text-template", "chat_template.jinja", "{{ 'USER: ' + messages[0]['content'] }}"),
    ):
        shutil.copytree("run/final", name)
        Path(name, file).write_text(content)

    def row(answer: str, **images: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": answer}], **images}

    for name, rows in (
        ("unusable", [row("b", images=["none.png"]), row(" "), row("c", images=["none.png"])]),
        ("text", [row("b"), row(" "), row("c")]),
    ):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("empty.jsonl").touch()
    Path("broken.jsonl").write_text("not json\n")


@pytest.mark.parametrize(("arguments", "message"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_wrong_input_gives_one_line_and_status_2(
    arguments: list[str], message: str, odds_and_ends: None, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is measured or written, and without naming a key of a run's config."""
    before = files(Path())
    capsys.readouterr()
    assert main(["--model", "run/final", *FEW, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert message in printed.err and "name_or_path" not in printed.err
    assert files(Path()) == before
