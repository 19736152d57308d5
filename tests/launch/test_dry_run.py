"""A dry run says what would happen, and does nothing that lasts."""

import re
from pathlib import Path

import pytest
from clusters import Command, has_ended, worker_processes
from runs import main
from waiting import wait_until

import vlskv_ray.train


def test_a_dry_run_writes_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(files.rglob("*"))
    assert main(files / "run.yaml", "output.name=dry", "--dry-run", "--num-samples", "5") == 0
    printed = capsys.readouterr().out
    assert "data          5 samples an epoch, of 4 + 1 rows" in printed
    assert "dry run: all is well" in printed and "supervised in all" in printed
    assert [path for path in sorted(files.rglob("*")) if "cache" not in path.parts] == [
        path for path in before if "cache" not in path.parts
    ]


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


def test_a_dry_run_that_is_killed_leaves_no_process(files: Path) -> None:
    """Those that keep the other CPUs busy meanwhile end with it."""
    options = ["cluster.num_workers=2", "micro_batch_size=50", "data.sources=[{name: shapes, num_samples: 400}]"]
    process = Command("train", "--config", str(files / "run.yaml"), "--dry-run", *options)
    process.wait_until(lambda: worker_processes(b"spawn_main"))
    (beside,) = worker_processes(b"spawn_main")
    process.kill()
    process.wait()
    wait_until(lambda: has_ended(beside))
