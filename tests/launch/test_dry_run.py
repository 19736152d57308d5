"""A dry run says what would happen, and does nothing that lasts."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from clusters import Command, has_ended, worker_processes
from conftest import conversation, save_teacher, tiny_config
from runs import main
from waiting import wait_until

import vlskv_ray.train
from vlskv_ray.words import format_bytes


def test_a_dry_run_writes_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(files.rglob("*"))
    assert main(files / "run.yaml", "output.name=dry", "--dry-run", "--num-samples", "5") == 0
    printed = capsys.readouterr().out
    assert "data          5 samples an epoch, of 4 + 1 rows" in printed
    assert "dry run: all is well" in printed and "supervised in all" in printed
    assert [path for path in sorted(files.rglob("*")) if "cache" not in path.parts] == [
        path for path in before if "cache" not in path.parts
    ]


def test_a_dry_run_tells_how_well_the_teacher_foretells_the_answers(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cross-entropy on these samples, not its worse student's; one near ln(vocabulary) is warned of, here that
    of random weights."""
    shapes = [
        *("model.num_key_value_layers=1", "optimizer.lr=1e-9"),
        "data.sources=[{name: shapes, num_samples: 4}]",
        "micro_batch_size=4",
        "--num-samples",
        "4",
    ]
    said = {}
    random = save_teacher(tmp_path / "random", tiny_config(initializer_range=0.02))
    for model, positions in ((str(random), 512), ("shapes-teacher", 2048)):
        options = [f"model.name_or_path={model}", f"data.max_length={positions}", "evaluation.sources=[]", *shapes]
        assert main(files / "run.yaml", *options, "--dry-run") == 0
        printed = capsys.readouterr().out
        found = re.search(r"^teacher +cross-entropy ([\d.e-]+) per supervised token of (\d+) samples$", printed, re.M)
        assert found is not None and found[2] == "4"
        said[model] = float(found[1]), "warning: that is near ln(" in printed
    (at_random, is_warned), (trained, is_warned_too) = said.values()
    assert at_random == pytest.approx(math.log(300), rel=0.1) and is_warned
    assert trained < 0.1 and not is_warned_too


def test_fine_tuning_has_no_teacher_to_tell_of(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["objective=sft", "model.num_key_value_layers=null", "evaluation.sources=[]", "--num-samples", "4"]
    assert main(files / "run.yaml", *options, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "dry run: all is well" in printed and "\nteacher " not in printed


def test_a_dry_run_tells_what_would_stop_the_run(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files / "run.yaml", "--dry-run", "data.max_length=60") == 2
    assert "cannot be used, more than data.max_rejected_fraction=0.1" in capsys.readouterr().err
    workers = ("cluster.num_workers=8", "cluster.cpus_per_worker=64")
    assert vlskv_ray.train.main(["--config", str(files / "run.yaml"), "--dry-run", *workers]) == 2
    assert "so no data would ever come" in capsys.readouterr().err
    elsewhere = (*workers, "cluster.address=10.0.0.1:6379")  # what that cluster has is not known here
    assert vlskv_ray.train.main(["--config", str(files / "run.yaml"), "--dry-run", *elsewhere]) == 0
    assert main(files / "run.yaml", "--dry-run", "temperature=1e200") == 1
    assert re.search(r"error: step \d+: the loss is", capsys.readouterr().err)


def test_a_dry_run_counts_what_trains(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights by part, and bytes of them, gradients and moments by what is frozen in which type."""
    model = yaml.safe_load((files / "run.yaml").read_text())["model"]["name_or_path"]
    parts = f"model={{name_or_path: {model}, trainable: [projector], dtype: bfloat16}}"
    assert main(files / "run.yaml", "output.name=dry", "--dry-run", "objective=sft", parts) == 0
    printed = capsys.readouterr().out
    says = "parameters    89,696: 2,144 projector trained; 21,856 vision_tower, 65,696 text frozen\n"
    assert printed.count(says) == 2  # what the run is, and what was found
    frozen, trained = 2 * (21_856 + 65_696), 4 * 2_144
    of_memory = (frozen, "frozen weights"), (trained, "trained"), (trained, "gradients"), (2 * trained, "optimizer")
    assert ", ".join(f"{format_bytes(size)} {what}" for size, what in of_memory) in printed


def test_parts_that_see_pictures_alone_are_warned_of_texts(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is trained; the run itself would tell at its end."""
    (files / "texts.jsonl").write_text(json.dumps({"messages": conversation("a?", "b")}) + "\n")
    model = yaml.safe_load((files / "run.yaml").read_text())["model"]["name_or_path"]
    texts = f"data.sources=[{{path: {files}/texts.jsonl}}]"
    for parts, sources, warned in (("projector", [texts], True), ("projector", [], False), ("text", [texts], False)):
        trains = f"model={{name_or_path: {model}, trainable: [{parts}]}}"
        options = ("output.name=dry", "--dry-run", "micro_batch_size=1", "objective=sft", trains, *sources)
        assert main(files / "run.yaml", *options) == 0
        told = "warning: no row of data.sources seems to have an image, which projector would learn from; where none"
        assert (told in capsys.readouterr().out) == warned


def test_a_dry_run_that_is_killed_leaves_no_process(files: Path) -> None:
    """Those that keep the other CPUs busy meanwhile end with it."""
    options = ["cluster.num_workers=2", "micro_batch_size=50", "data.sources=[{name: shapes, num_samples: 400}]"]
    process = Command("train", "--config", str(files / "run.yaml"), "--dry-run", *options)
    process.wait_until(lambda: worker_processes(b"spawn_main"))
    (beside,) = worker_processes(b"spawn_main")
    process.kill()
    process.wait()
    wait_until(lambda: has_ended(beside))
