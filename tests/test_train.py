"""The command: what it says to wrong input and of odd names, and a config as it is shipped."""

import json
import math
from pathlib import Path

import pytest
from conftest import conversation
from runs import NO_ANSWERS, main

import vlskv_ray.train


def test_the_original_projects_layout_runs_as_shipped(tmp_path: Path) -> None:
    """Two steps of configs/small-llava-next-swiftkv-cpu.yaml, nothing left out."""
    shipped = Path(__file__).parent.parent / "configs" / "small-llava-next-swiftkv-cpu.yaml"
    options = ("cluster.num_workers=0", "max_steps=2", f"output.dir={tmp_path}")
    assert vlskv_ray.train.main(["--config", str(shipped), *options]) == 0
    summary = json.loads((tmp_path / shipped.stem / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["rejected"] == {}


WRONG = {
    "data.max_lenght=5": "command line: data.max_lenght: unknown key, did you mean data.max_length?",
    "epochs=many": "command line: epochs: wanted an integer > 0, got 'many'",
    "model.num_key_value_layers=6": "model.num_key_value_layers: 6, but the text model has 6 layers",
    "model.key_value_group_size=2": "key_value_group_size=2 does not divide the 3 layers",
    "model.name_or_path=./nowhere": "there is no folder",
    "data.sources.0.path=nowhere.jsonl": "nowhere.jsonl",
    "data.max_length=9999": "data.max_length: 9999, but the model has positions up to 512 only",
    "model.attn_implementation=flash_attention_2": "flash_attention_2",
    "objective=sft": "objective",
}


@pytest.mark.parametrize("option", WRONG)
def test_wrong_input_is_one_line_and_exit_status_2(
    files: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert main(files / "run.yaml", "output.name=wrong", option) == 2
    printed = capsys.readouterr()
    assert WRONG[option] in printed.err and printed.err.count("\n") == 1
    assert not (files / "runs" / "wrong").exists()


def test_all_of_a_configs_problems_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_text(
        "epochs: 1\nmodel:\n  name_or_path: a\ndata:\n  max_lenght: 3\n  sources: [s]\nepochs: 2\n"
    )
    assert vlskv_ray.train.main(["--config", str(tmp_path / "x.yaml")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}/x.yaml:5: data.max_lenght: unknown key, did you mean data.max_length?",
        f"{tmp_path}/x.yaml:7: epochs: given twice, first in line 1; keep one of them",
    ]
    assert vlskv_ray.train.main(["--config", str(tmp_path / "y.yaml")]) == 2
    assert capsys.readouterr().err == f"{tmp_path}/y.yaml: can not be read: No such file or directory\n"


def test_a_run_on_text_alone_is_measured_whole(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At its end, in report and card: distances, perplexities and answers to read, and what a prefill of text saves."""
    turns = [("what is it?", "it is a cat"), ("and this?", "this is a dog"), ("why?", "who knows")]
    text = files / "text.jsonl"
    text.write_text("".join(json.dumps({"messages": conversation(*turn)}) + "\n" for turn in turns))
    sources = f"sources=[{{path: {text}}}]"
    options = (f"data.{sources}", f"evaluation.{sources}", "evaluation.every_steps=null", "max_steps=1")
    assert main(files / "run.yaml", *options, "output.name=text") == 0
    run = files / "runs" / "text"
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["savings"]["prompt_images"] == 0 and evaluation["savings"]["prefill_flops_ratio"] < 1
    for side in ("teacher", "student_before", "student"):
        assert evaluation[side]["perplexity"] == pytest.approx(math.exp(evaluation[side]["cross_entropy"]))
        assert evaluation[side]["kl_mean"] is not None
    card, report = (run / "final" / "README.md").read_text(), (run / "report.html").read_text()
    for shown in (capsys.readouterr().out, card, report.partition("Configuration")[0]):
        for words in ("perplexity", "agreed greedy prefix", "and this?", "prefill CPU time", "tokens of text,"):
            assert words in shown, words
        assert shown.count("accuracy") == shown.count("so no accuracy is shown") == 1


def test_what_data_are_called_does_not_steer_the_terminal(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of files and images, which become ids and details of rows."""
    evil = files / "a\x1b[31m\nb.jsonl"
    rows = [{"messages": conversation("a?", "b", images=1), "images": [f"\x1b]0;owned\x07{i}.png"]} for i in range(30)]
    evil.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("output.name=evil", *NO_ANSWERS, f"data.sources=[{{path: {json.dumps(str(evil))}}}]", "max_steps=3")
    options += ("data.image_processing_batch_size=1", f"data.sources.0.image_root={files / 'images'}")
    assert main(files / "run.yaml", *options, "--dry-run") == 2
    assert main(files / "run.yaml", *options) == 1
    printed = capsys.readouterr()
    assert "left out a\\x1b[31m\\nb.jsonl:" in printed.out and "For one, a\\x1b[31m\\nb.jsonl:" in printed.err
    assert not set("\x1b\x07") & set(printed.out + printed.err)
    evil.unlink()
