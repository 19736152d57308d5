"""The command: what it says to wrong input, and whole runs on real files with real workers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from conftest import conversation, picture
from safetensors.torch import load_file, save_file
from test_checkpoint import seal, with_state
from test_run_page import PLOTS, SECTIONS
from transformers import AutoModelForImageTextToText, AutoProcessor
from waiting import HANG_SECONDS

import vlskv_ray.train
from benchmarks.recovery import processes
from vlskv_ray import evaluate
from vlskv_ray.cluster.start import ray_cluster
from vlskv_ray.data.images import load_image
from vlskv_ray.evaluation.evaluator import SIDES
from vlskv_ray.launch.on_ray import is_lost_controller
from vlskv_ray.model.swiftkv import swiftkv_backbone
from vlskv_ray.report.figures import decimal, percent
from vlskv_ray.storage.lease import own_run_folder
from vlskv_ray.training import faults


# -------------------------------------------------------------------------------------------------------- real files
def write_files(folder: Path) -> tuple[list[str], list[str]]:
    """A JSONL with pictures beside it and a Parquet file with pictures in it; ids that are good, and that are not."""
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    formats = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
    rows: list[dict[str, Any]] = []
    for i in range(40):
        question, answer = f"what is in picture {i}?", f"thing {i % 7}"
        kind = i % 4
        names = []
        for k in range({0: 1, 1: 0, 2: 2, 3: 1}[kind]):
            format = list(formats)[(i + k) % 3]
            names.append(f"{i}-{k}.{formats[format]}")
            width, height = (int(x) for x in rng.integers(16, 200, 2))
            (images / names[-1]).write_bytes(picture(width, height, i, format))
        turns = [question, answer, "are you sure?", "yes"] if kind in (2, 3) else [question, answer]
        rows.append({"messages": conversation(*turns, images=len(names)), "images": names})
    rows[8]["images"] = ["missing.png"]
    rows[13]["messages"][1]["content"][0]["text"] = "long " * 300
    lines = [json.dumps(row) for row in rows]
    lines[21] = lines[21][:30]
    (folder / "chat.jsonl").write_text("\n".join(lines))
    table = [
        {
            "messages": [{"role": "user", "content": f"<image>say {i}"}, {"role": "assistant", "content": f"{i}"}],
            "images": [{"bytes": picture(30 + i, 40, i), "path": None}],
        }
        for i in range(12)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / "more.parquet")
    ids = [f"chat.jsonl:{i + 1}" for i in range(40)] + [f"more.parquet:{i + 1}" for i in range(12)]
    bad = ["chat.jsonl:9", "chat.jsonl:14", "chat.jsonl:22"]
    return [i for i in ids if i not in bad], bad


def write_config(folder: Path, model: Path, **options: Any) -> Path:
    config = {
        "epochs": 3,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "model": {"name_or_path": str(model), "num_key_value_layers": 3},
        "data": {
            "sources": [
                {"path": str(folder / "chat.jsonl"), "image_root": str(folder / "images")},
                {"path": str(folder / "more.parquet")},
            ],
            "max_length": 400,
            "cache_dir": str(folder / "cache"),
        },
        "optimizer": {"lr": 3e-3},
        "cluster": {"num_workers": 2, "threads_per_worker": 1},
        "checkpoint": {"every_steps": 4},
        "evaluation": {"sources": [{"path": str(folder / "more.parquet")}], "max_new_tokens": 4, "every_steps": 10},
        "output": {"dir": str(folder / "runs"), "name": "run", "order": True},
    }
    (folder / "run.yaml").write_text(yaml.dump(config | options))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    write_config(folder, teacher_folder())
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(*arguments: str) -> tuple[int, str, str]:
    result = subprocess.run(
        [sys.executable, "-m", "vlskv_ray.train", *arguments], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    return result.returncode, result.stdout, result.stderr


# ---------------------------------------------------------------------------------- without Ray: cluster.num_workers=0
LOCAL = ("cluster.num_workers=0", "gradient_accumulation_steps=4")


def main(config: Path, *arguments: str) -> int:
    return vlskv_ray.train.main(["--config", str(config), *LOCAL, *arguments])


def test_a_run_in_one_process(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Done, then done already, then set back to its checkpoint or started anew, with nothing deleted."""
    assert main(files / "run.yaml", "output.name=here", "epochs=1", "data.max_rejected_fraction=0.2") == 0
    printed = capsys.readouterr().out
    assert "global batch  8 = 2 samples x 4 accumulation x 1 worker\n" in printed
    assert "3 samples left out: 1 image_missing, 1 json_line, 1 too_long" in printed
    run = files / "runs" / "here"
    for weights in run.glob("*/**/*.safetensors"):  # whoever may read the folder may read them
        assert weights.stat().st_mode & 0o777 == (run / "summary.json").stat().st_mode & 0o777
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 7 and summary["last"]["loss"] < summary["first"]["loss"]
    assert "12 questions of 12 held-out samples" in printed and "warning: more.parquet of evaluation.sources" in printed
    page, card = (run / "report.html").read_text(), (run / "final" / "README.md").read_text()
    assert all(f'id="{section}"' in page for section in (*SECTIONS, *PLOTS)) and page.count("data:image/png") == 8
    teacher, before, after = (json.loads((run / "evaluation.json").read_text())[side] for side in SIDES)
    assert teacher["kl_mean"] == 0 < after["kl_mean"] < before["kl_mean"]
    for figure in (decimal(before["kl_mean"]), decimal(after["kl_mean"]), percent(after["top1_agreement"])):
        assert figure in printed and figure in page and figure in card

    assert main(files / "run.yaml", "output.name=here", "epochs=1") == 0
    assert "already finished" in capsys.readouterr().out
    (run / "final" / "model.safetensors").write_bytes(b"junk")  # seen, and made again from the last checkpoint
    assert main(files / "run.yaml", "output.name=here", "epochs=1", "data.max_rejected_fraction=0.2") == 0
    assert "already finished" not in capsys.readouterr().out and load_file(run / "final" / "model.safetensors")
    assert main(files / "run.yaml", "output.name=here", "epochs=1", "optimizer.lr=1e-4") == 2
    assert "cannot go on from here: optimizer.lr was 0.003 and is 0.0001; use --resume never" in capsys.readouterr().err
    assert main(files / "run.yaml", "output.name=here", "epochs=1", "--num-samples", "9") == 2
    assert "the data changed since" in capsys.readouterr().err
    assert main(files / "run.yaml", "output.name=here", "epochs=1", "gradient_accumulation_steps=3") == 2
    assert "gradient_accumulation_steps was 4 and is 3" in capsys.readouterr().err
    for fixed in ("model.num_key_value_layers=4", "gradient_accumulation_steps=2"):
        allowed = f"checkpoint.allow_changed=[{fixed.partition('=')[0]}]"
        assert main(files / "run.yaml", "output.name=here", "epochs=1", fixed, allowed) == 2
        assert "use --resume never to start anew, or another output.name\n" in capsys.readouterr().err
    assert main(files / "run.yaml", "output.name=here", "epochs=1", "cluster.num_workers=3") == 2
    assert "3 workers cannot share the 4 micro-batches of a step equally" in capsys.readouterr().err
    assert main(files / "run.yaml", "output.name=here", "epochs=1", "cluster.num_workers=[1,4]") == 2
    assert "3 workers cannot share the 4 micro-batches of a step equally" in capsys.readouterr().err
    assert main(files / "run.yaml", "output.name=here", "epochs=1", "cluster.threads_per_worker=2") == 2
    assert "threads_per_worker was 1 and is 2; use --resume never" in capsys.readouterr().err
    assert main(files / "run.yaml", "output.name=here", "epochs=1", "cluster.use_gpu=true") == 2
    refused = capsys.readouterr().err
    assert "the run was on CPUs and is on GPUs (cluster.use_gpu); use --resume never" in refused
    assert "allow it with checkpoint.allow_changed=[device]" in refused

    assert main(files / "run.yaml", "output.name=here", "epochs=1", "--resume", "never", "--num-samples", "9") == 0
    older = [path for path in run.parent.iterdir() if path.name.startswith("here-until-")]
    assert len(older) == 1 and (older[0] / "final" / "model.safetensors").exists()
    assert json.loads((run / "summary.json").read_text())["steps"] == 2


def test_the_final_folder_continues_as_a_student(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run on the first one's `final/` starts from its SwiftKV weights."""
    assert main(files / "run.yaml", "output.name=first", "max_steps=3", "optimizer.lr=0.02") == 0
    final = files / "runs" / "first" / "final"
    options = (f"model.name_or_path={final}", "optimizer.lr=1e-12", "max_steps=1")
    assert main(files / "run.yaml", "output.name=second", *options) == 0
    first, second = (load_file(files / "runs" / name / "final" / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_nothing_to_resume(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files / "run.yaml", "output.name=nothing", "--resume", "must") == 2
    assert "there is no checkpoint to go on from" in capsys.readouterr().err


def test_what_a_run_was_made_of_must_not_change(
    files: Path, teacher_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other answers of equal length in the data, other weights in the model's folder: noticed before going on."""
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    shutil.copytree(teacher_folder(), model)
    rows = [json.dumps({"messages": conversation("a?", f"thing {i}")}) + "\n" for i in range(16)]
    data.write_text("".join(rows))
    options = (f"data.sources=[{{path: {data}}}]", f"model.name_or_path={model}", f"output.dir={tmp_path}", "epochs=2")
    assert main(files / "run.yaml", *options, "checkpoint.every_steps=1") == 0
    shutil.rmtree(tmp_path / "run" / "final")
    data.write_text("".join(rows).replace("thing 3", "gniht 3"))
    assert main(files / "run.yaml", *options) == 2
    assert "the data changed since" in capsys.readouterr().err
    data.write_text("".join(rows))
    weights = load_file(model / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    assert main(files / "run.yaml", *options) == 2
    refused = capsys.readouterr().err
    assert "the model changed since" in refused and "allow it with checkpoint.allow_changed=[model]" in refused
    assert main(files / "run.yaml", *options, "optimizer.lr=1e-5", "checkpoint.allow_changed=[model]") == 2
    assert "checkpoint.allow_changed=[optimizer.lr]" in capsys.readouterr().err
    assert main(files / "run.yaml", *options, "checkpoint.allow_changed=[model]") == 0
    shutil.rmtree(tmp_path / "run" / "final")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    shutil.copytree(teacher_folder(), model, dirs_exist_ok=True)
    assert main(files / "run.yaml", *options) == 0  # what was missing of a finished run is made again
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_a_run_without_a_whole_checkpoint_is_not_overwritten(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files / "run.yaml", "output.name=lost", "max_steps=2") == 0
    run = files / "runs" / "lost"
    metrics = (run / "metrics.jsonl").read_text()
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text("{}")
    assert main(files / "run.yaml", "output.name=lost", "max_steps=2") == 2
    assert "holds a run, but no checkpoint of it that is whole" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    assert main(files / "run.yaml", "output.name=lost", "max_steps=2") == 2
    assert (run / "metrics.jsonl").read_text() == metrics


def test_weights_that_are_not_finite_are_not_saved(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("output.name=ruined", "optimizer.lr=1e38", "optimizer.max_grad_norm=null", "max_steps=1")
    assert main(files / "run.yaml", *options) == 1
    assert "weights are not finite any more" in capsys.readouterr().err
    assert not list((files / "runs" / "ruined" / "checkpoints").iterdir())


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


def test_logs_with_junk_in_them_do_no_harm(files: Path) -> None:
    assert main(files / "run.yaml", "output.name=junk", "max_steps=3", "checkpoint.every_steps=2") == 0
    run = files / "runs" / "junk"
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'5\nnull\n[]\n{}\n{"step": null}\n{"step": Infinity}\n\xff\n{"step": 1')
    assert main(files / "run.yaml", "output.name=junk", "max_steps=3") == 0
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3]


def test_the_original_projects_layout_runs_as_shipped(tmp_path: Path) -> None:
    """Two steps of configs/small-llava-next-swiftkv-cpu.yaml, nothing left out."""
    shipped = Path(__file__).parent.parent / "configs" / "small-llava-next-swiftkv-cpu.yaml"
    options = ("cluster.num_workers=0", "max_steps=2", f"output.dir={tmp_path}")
    assert vlskv_ray.train.main(["--config", str(shipped), *options]) == 0
    summary = json.loads((tmp_path / shipped.stem / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["rejected"] == {}


def test_the_faster_precision_is_chosen_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """model.dtype=auto: measured at the start, and as it was when the run goes on."""
    auto = ("output.name=auto", "model.dtype=auto", "max_steps=1")
    monkeypatch.setattr(vlskv_ray.launch.prepare, "matmul_seconds", lambda *_: {"float32": 2.0, "bfloat16": 1.0})
    assert main(files / "run.yaml", *auto) == 0
    assert yaml.safe_load((files / "runs" / "auto" / "config.yaml").read_text())["model"]["dtype"] == "bfloat16"
    monkeypatch.setattr(vlskv_ray.launch.prepare, "matmul_seconds", lambda *_: {"float32": 1.0, "bfloat16": 2.0})
    assert main(files / "run.yaml", *auto) == 0  # finished; as float32 it would be another run


def test_without_a_gpu_a_run_on_one_is_refused(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line; it would be in bfloat16. Trying it here says that what it says is of CPUs."""
    gpu = ("output.name=gpu", "cluster.use_gpu=true", "model.dtype=auto", "max_steps=1")
    assert main(files / "run.yaml", *gpu) == 2
    refused = capsys.readouterr().err
    assert refused.startswith("cluster.use_gpu: torch ") and refused.count("\n") == 1
    assert yaml.safe_load((files / "runs" / "gpu" / "config.yaml").read_text())["model"]["dtype"] == "bfloat16"
    assert main(files / "run.yaml", *gpu, "--dry-run") == 0
    assert "no GPU is to be found here: all below is of this machine's CPUs, where" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(files.rglob("*"))
    assert main(files / "run.yaml", "output.name=dry", "--dry-run", "--num-samples", "5") == 0
    printed = capsys.readouterr().out
    assert "data          5 samples an epoch, of 4 + 1 rows" in printed
    assert "dry run: all is well" in printed and "supervised in all" in printed
    assert [path for path in sorted(files.rglob("*")) if "cache" not in path.parts] == [
        path for path in before if "cache" not in path.parts
    ]


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


def test_a_dry_run_that_is_killed_leaves_no_process(files: Path) -> None:
    """Those that keep the other CPUs busy meanwhile end with it."""
    options = ["cluster.num_workers=2", "micro_batch_size=50", "data.sources=[{name: shapes, num_samples: 400}]"]
    arguments = ["--config", str(files / "run.yaml"), "--dry-run", *options]
    process = subprocess.Popen([sys.executable, "-m", "vlskv_ray.train", *arguments], stdout=subprocess.DEVNULL)
    wait_until(lambda: bool(worker_processes(b"spawn_main")), process)
    (beside,) = worker_processes(b"spawn_main")
    process.kill()
    process.wait()
    deadline = time.monotonic() + HANG_SECONDS
    while Path(f"/proc/{beside}/stat").exists() and Path(f"/proc/{beside}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)


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


def test_two_commands_never_run_one_run(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with own_run_folder(files / "runs" / "taken"):
        assert main(files / "run.yaml", "output.name=taken") == 2
        assert "another process runs this run" in capsys.readouterr().err


def test_rows_that_cannot_be_used_stop_a_run_with_exit_status_1(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(files / "run.yaml", "output.name=short", "data.max_length=40") == 1
    assert "samples so far had to be left out" in capsys.readouterr().err
    assert len(lines(files / "runs" / "short" / "rejected.jsonl")) > 10


NO_ANSWERS = ("evaluation.sources=[]", "evaluation.every_steps=null", "output.tensorboard=false")
PLAIN = ("objective=sft", "model.num_key_value_layers=null")


@pytest.mark.parametrize("objective", ["distill", "sft"])
def test_a_run_that_learnt_from_nothing_has_failed(
    files: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    """Though it made all its steps, and as often as it is asked; stopped on the way, it goes on to the same end."""
    options = (f"output.name=nothing-{objective}", *NO_ANSWERS, "data.max_length=20", "max_steps=3")
    options += ("data.max_rejected_fraction=1", "checkpoint.every_steps=1", *(PLAIN if objective == "sft" else ()))
    run = files / "runs" / f"nothing-{objective}"
    for last in (None, "step-00000003", None):
        if last:
            shutil.rmtree(run / "checkpoints" / last)
            (run / "rejected.jsonl").unlink()
        assert main(files / "run.yaml", *options) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: the run has come to its end and learnt nothing: ") and error.count("\n") == 1
        assert re.search(r"all 2[24] samples had to be left out \(", error)
        assert "x too_long" in error and "For one, " in error and "data.max_length=20" in error
        assert "mend the data, and start anew with --resume never" in error
        assert not (run / "final").exists() and not (run / "summary.json").exists()


def test_samples_without_weight_teach_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of these have images."""
    source = f"data.sources=[{{path: {files / 'more.parquet'}}}]"
    options = ("output.name=weightless", *NO_ANSWERS, source, "max_steps=1", "vision_loss_weight=0")
    assert main(files / "run.yaml", *options) == 1
    assert "all its samples have images, and vision_loss_weight is 0; raise it" in capsys.readouterr().err
    assert not (files / "runs" / "weightless" / "final").exists()


def test_steps_without_samples_are_told(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where others had some: the run is done, and says how many had none."""
    few = ("gradient_accumulation_steps=1", "micro_batch_size=1", "data.max_rejected_fraction=1", "data.max_length=150")
    options = ("output.name=holes", *NO_ANSWERS, *few, "epochs=1", "--num-samples", "12")
    assert main(files / "run.yaml", *options) == 0
    empty = sum(not line["supervised_tokens"] for line in lines(files / "runs" / "holes" / "metrics.jsonl"))
    assert 0 < empty < 12
    assert f"warning: {empty} of the 12 steps had no sample to learn from\n" in capsys.readouterr().out
    assert json.loads((files / "runs" / "holes" / "summary.json").read_text())["empty_steps"] == empty


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


def test_a_crafted_checkpoint_is_refused_in_one_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its hashes right, its weights of another model; moved away, the run goes on from the one before."""
    options = ("output.name=crafted", *NO_ANSWERS, "max_steps=2", "checkpoint.every_steps=1")
    assert main(files / "run.yaml", *options) == 0
    run = files / "runs" / "crafted"
    newest = run / "checkpoints" / "step-00000002"
    weights = load_file(newest / "trainable.safetensors")
    save_file({name: weight.flatten() for name, weight in weights.items()}, newest / "trainable.safetensors")
    seal(newest)
    shutil.rmtree(run / "final")
    capsys.readouterr()
    assert main(files / "run.yaml", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{newest}/trainable.safetensors: is not what this run wrote: ") and error.count("\n") == 1
    save_file(weights, newest / "trainable.safetensors")
    with_state(newest, fingerprints={"versions": "\x1b[2J"})
    assert main(files / "run.yaml", *options) == 2
    error = capsys.readouterr().err
    assert "the model changed since, the data changed since, the versions changed since" in error
    assert error.count("\n") == 1 and "\x1b" not in error
    newest.rename(run / "aside")
    assert main(files / "run.yaml", *options) == 0
    again = load_file(newest / "trainable.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_ctrl_c_and_sigterm_save_first(files: Path) -> None:
    """Exit status 130 and 143; the same command goes on, and ends as the run that was left alone."""
    arguments = ["--config", str(files / "run.yaml"), *LOCAL, "epochs=6"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    for name, number, status in (("interrupted", signal.SIGINT, 130), ("terminated", signal.SIGTERM, 143)):
        process = subprocess.Popen(
            [sys.executable, "-m", "vlskv_ray.train", *arguments, f"output.name={name}"],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        wait_for_steps(files / "runs" / name, 3, process)
        process.send_signal(number)
        out, _ = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == status, out
        assert "the same command goes on from there" in out
    assert main(files / "run.yaml", "epochs=6", "output.name=interrupted", "--resume", "must") == 0
    assert main(files / "run.yaml", "epochs=6", "output.name=alone") == 0
    assert_same_weights(files / "runs" / "interrupted", files / "runs" / "alone")


# ------------------------------------------------------------------------------------------------------------ with Ray
@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of faults that happen to workers of the cluster."""
    return tmp_path_factory.mktemp("planned")


@pytest.fixture(scope="module")
def cluster(planned: Path) -> Iterator[dict[str, str]]:
    """One local cluster for all tests; the environment that makes commands join it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(faults.FOLDER, str(planned))
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        context = ray_cluster("local")
        context.__enter__()
    try:
        import ray

        yield os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONUNBUFFERED": "1"}
    finally:
        context.__exit__(None, None, None)


def start(cluster: dict[str, str], files: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "vlskv_ray.train", "--config", str(files / "run.yaml"), *arguments],
        env=cluster,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> str:
    out, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, out
    return out


def wait_for_steps(run: Path, count: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"{run}: step {count} did not come\n{process.communicate()[0]}")


def worker_processes(title: bytes = b"RayTrainWorker") -> list[int]:
    """Process ids of the processes of that title that descend from this process: those of its cluster."""
    return processes(title, os.getpid())


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = (load_file(run / "final" / "model.safetensors") for run in (first, second))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def left_alone(cluster: dict[str, str], files: Path) -> Path:
    """The run of two gloo workers on the real files."""
    out = finish(start(cluster, files))
    assert "joined a cluster of" in out and "CPUs: 2 workers x 1 thread (" in out
    assert "9 samples left out: 3 image_missing, 3 json_line, 3 too_long" in out
    return files / "runs" / "run"


@pytest.mark.ray
def test_two_workers_on_real_files(left_alone: Path, teacher_folder: Callable[..., Path]) -> None:
    """Every good sample once an epoch, every bad one listed, a loss that falls, only SwiftKV weights moved."""
    steps = 7
    metrics = lines(left_alone / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 3 * steps + 1))
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    good, bad = [], ["chat.jsonl:9", "chat.jsonl:14", "chat.jsonl:22"]
    good = [i for i in [f"chat.jsonl:{n}" for n in range(1, 41)] if i not in bad]
    good += [f"more.parquet:{n}" for n in range(1, 13)]
    order = [i for line in lines(left_alone / "order.jsonl") for batch in line["micro_batches"] for i in batch]
    assert Counter(order) == dict.fromkeys(good, 3)
    for epoch in range(3):
        of_epoch = lines(left_alone / "order.jsonl")[epoch * steps : (epoch + 1) * steps]
        assert {i for line in of_epoch for batch in line["micro_batches"] for i in batch} == set(good)
    assert Counter(row["id"] for row in lines(left_alone / "rejected.jsonl")) == dict.fromkeys(bad, 3)

    final = load_file(left_alone / "final" / "model.safetensors")
    stock = load_file(teacher_folder() / "model.safetensors")
    assert all(torch.equal(final[name], weight) for name, weight in stock.items())
    assert {name for name in final if name not in stock} == {name for name in final if "_swiftkv" in name}


@pytest.mark.ray
def test_two_workers_measure_what_one_process_does(left_alone: Path, tmp_path: Path) -> None:
    """Each its share of the held-out samples, together all of them; on the way too."""
    assert [m["step"] for m in lines(left_alone / "metrics.jsonl") if "eval_accuracy" in m] == [10, 20]
    arguments = [
        "--model",
        str(left_alone / "final"),
        "--max-new-tokens",
        "4",
        "--output",
        str(tmp_path / "again.json"),
    ]
    assert evaluate.main(arguments) == 0
    ours, again = (json.loads(path.read_text()) for path in (left_alone / "evaluation.json", tmp_path / "again.json"))
    assert ours["questions"] == again["questions"] == 12
    for side in SIDES:
        for name in ("accuracy", "kl_mean", "kl_p95", "top1_agreement", "agreed_prefix", "cross_entropy"):
            assert ours[side][name] == pytest.approx(again[side][name], rel=1e-4, abs=1e-7), (side, name)


@pytest.mark.ray
def test_the_student_answers_about_a_new_image(left_alone: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(left_alone / "final")
    processor = AutoProcessor.from_pretrained(left_alone / "final")
    text = processor.apply_chat_template(conversation("what is it?", images=1), add_generation_prompt=True)
    inputs = processor(
        text=text, images=load_image(picture(123, 77, 99)), add_special_tokens=False, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 6
    assert swiftkv_backbone(model).config.swiftkv and len(model._forward_pre_hooks) == 1


@pytest.mark.ray
def test_the_readmes_snippet_runs(left_alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On this run's student, as it stands there; the random model says something, if only syllables."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(snippet.replace("runs/quickstart/final", str(left_alone / "final")), {})
    question, _, answer = capsys.readouterr().out.partition("ASSISTANT:\n")
    assert "What is in the picture?" in question and answer.strip()


def untimed(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run without those that a clock makes."""
    timed = ("tokens_per_second", "data_wait_seconds", "step_seconds")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines(run / "metrics.jsonl")]


@pytest.mark.ray
def test_killed_and_resumed_it_ends_with_the_same_bits(cluster: dict[str, str], files: Path, left_alone: Path) -> None:
    """A worker killed and replaced, the command asked to stop, then killed: the weights are those of the run alone."""
    run, arguments = files / "runs" / "killed", ("output.name=killed",)
    process = start(cluster, files, *arguments)
    wait_for_steps(run, 5, process)
    workers = worker_processes()
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    wait_for_steps(run, 9, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 143, out
    process = start(cluster, files, *arguments, "--resume", "must")
    wait_for_steps(run, 14, process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + HANG_SECONDS
    while worker_processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    finish(start(cluster, files, *arguments))
    assert_same_run(run, left_alone)


# ---------------------------------------------------------------------------------------- anything killed, any moment
def plan_faults(planned: Path, *wanted: tuple[str, int, int, str]) -> None:
    """Phase, step, rank and action of what is to happen next."""
    for path in planned.iterdir():
        path.unlink()
    for i, (phase, step, rank, action) in enumerate(wanted):
        fault = {"phase": phase, "step": step, "rank": rank, "action": action}
        (planned / f"{i:02}.json").write_text(json.dumps(fault))


def assert_same_run(run: Path, alone: Path) -> None:
    """Weights, moments, and everything that was logged, but for what a clock tells."""
    assert_same_weights(run, alone)
    last = max(path.name for path in (alone / "checkpoints").iterdir())
    for name in ("trainable", "optimizer"):
        file = f"checkpoints/{last}/{name}.safetensors"
        assert (run / file).read_bytes() == (alone / file).read_bytes()
    assert untimed(run) == untimed(alone)
    for name in ("order", "rejected"):
        assert lines(run / f"{name}.jsonl") == lines(alone / f"{name}.jsonl")


def assert_ended_as(run: Path, alone: Path) -> None:
    """And what was measured of the student."""
    assert_same_run(run, alone)
    assert (run / "checkpoints" / "step-00000021").is_dir()
    assert (
        json.loads((run / "evaluation.json").read_text())["student"]
        == (json.loads((alone / "evaluation.json").read_text())["student"])
    )


@pytest.mark.ray
def test_workers_killed_at_any_moment(cluster: dict[str, str], files: Path, left_alone: Path, planned: Path) -> None:
    """One run in which both workers die at moments all over a step, a save, a measurement and the run; test_faults.py
    has many more of them, without Ray."""
    moments = [("reduce", 5, 1), ("save_renamed", 8, 0), ("evaluate_on_the_way", 10, 1), ("end", 21, 0)]
    plan_faults(planned, *((phase, step, rank, "kill") for phase, step, rank in moments))
    finish(start(cluster, files, "output.name=often", f"cluster.max_failures={len(moments)}"))
    assert len(list(planned.glob("*.done"))) == len(moments)
    assert_ended_as(files / "runs" / "often", left_alone)


@pytest.mark.ray
def test_the_controller_and_a_data_worker_killed(
    cluster: dict[str, str], files: Path, left_alone: Path, planned: Path
) -> None:
    """While the workers wait in the middle of a step; and the next controller again, while it starts its workers, which
    have not come so far as to say what is reserved for them."""
    plan_faults(planned, ("micro_batch", 6, 1, "wait"), ("micro_batch", 13, 0, "wait"))
    process = start(cluster, files, "output.name=headless")
    for i, title in enumerate((b"MapWorker", b"TrainController")):
        wait_until((planned / f"{i:02}.json.done").exists, process)
        victims = worker_processes(title)
        assert victims, title
        os.kill(victims[0], signal.SIGKILL)
        (planned / f"{i:02}.json.go").touch()
    wait_until(lambda: worker_processes(b"TrainController") not in ([], victims), process)
    wait_until(lambda: bool(worker_processes()), process)
    for pid in worker_processes(b"TrainController"):
        os.kill(pid, signal.SIGKILL)
    assert finish(process).count("Ray's controller of this run was lost or gave up") == 2
    assert_ended_as(files / "runs" / "headless", left_alone)


def wait_until(happened: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not happened():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_what_ray_gives_up_on_is_started_again() -> None:
    """A worker that dies while its group is being started; not what is wrong with the run itself."""
    from ray.exceptions import ActorDiedError, OutOfMemoryError
    from ray.train import ControllerError

    lost = is_lost_controller
    assert lost(ActorDiedError()) and lost(ControllerError(ActorDiedError())) and lost(OutOfMemoryError("full"))
    assert not lost(ControllerError(ValueError("x"))) and not lost(ValueError("x")) and not lost(None)


@pytest.mark.ray
def test_a_worker_that_does_not_answer(cluster: dict[str, str], files: Path, left_alone: Path, planned: Path) -> None:
    """Stopped in the middle of a step: the other one notices, says what it waited for, and both are started again; as
    they are when one is asked to end before."""
    plan_faults(planned, ("micro_batch", 2, 1, "term"), ("micro_batch", 6, 1, "stop"))
    run = files / "runs" / "stalled"
    finish(start(cluster, files, "output.name=stalled", "cluster.stall_seconds=3"))
    assert_ended_as(run, left_alone)
    stacks = "".join(path.read_text() for path in (run / "stacks").iterdir())
    assert "Timeout (" in stacks and "all_reduce" in stacks
    assert len(list(planned.glob("*.done"))) == 2
