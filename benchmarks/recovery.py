"""What a lost worker and a checkpoint cost a run: `python -m benchmarks.recovery --help`.

worker   the shipped teacher is distilled by two workers; one is killed, and the time is taken until the next step
         that had not been made before is done
save     the loop's wait for a checkpoint of the mid-size model, and what writing one takes altogether
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.end_to_end import config_of, write_data
from benchmarks.workloads import CONFIGS, build
from vlskv_ray.launch.prepare import prepare
from vlskv_ray.model import presets
from vlskv_ray.model.build import trainable_parameters
from vlskv_ray.storage.run_log import RunLog
from vlskv_ray.storage.saving import Counts, Saver
from vlskv_ray.training.objective import build_model
from vlskv_ray.training.step import GradientBuffer, build_optimizer

CONFIG = """
micro_batch_size: 8
max_steps: 400
model: {name_or_path: shapes-teacher, num_key_value_layers: 4}
data: {sources: [{name: shapes, split: train, num_samples: 8000}]}
cluster: {num_workers: 2, threads_per_worker: 1, address: local}
checkpoint: {every_steps: 20}
output: {name: run, tensorboard: false}
"""


def last_step(run: Path) -> int:
    try:
        return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError):
        return 0


def processes(title: bytes, ancestor: int) -> list[int]:
    """Process ids of the processes of that title on this machine that descend from another one."""
    parents, found = {}, []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if title in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:  # it has ended meanwhile
                continue

    def is_below(pid: int) -> bool:
        return pid == ancestor or (pid in parents and is_below(parents[pid]))

    return [pid for pid in found if is_below(pid)]


def seconds_to_recover(folder: Path, times: int) -> list[float]:
    """From a worker's death to the next new step, so many times in one run."""
    (folder / "run.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "vlskv_ray.train", "--config", str(folder / "run.yaml"), f"output.dir={folder}"]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    seconds: list[float] = []
    run, wanted = folder / "run", 30
    try:
        while len(seconds) < times:
            while last_step(run) < wanted:
                if process.poll() is not None:
                    raise RuntimeError((folder / "log.txt").read_text())
                time.sleep(0.01)
            began, at = time.perf_counter(), last_step(run)
            os.kill(processes(b"RayTrainWorker", process.pid)[-1], signal.SIGKILL)
            time.sleep(1)  # the others may finish the step that they are in
            at = max(at, last_step(run))
            while last_step(run) != at + 1:
                time.sleep(0.01)
            seconds.append(time.perf_counter() - began)
            wanted = at + 30
    finally:
        process.terminate()
        process.wait()
    return seconds


def seconds_of_saving(folder: Path, times: int) -> dict[str, float]:
    """The loop's wait, and all of it, for a checkpoint; and its size."""
    write_data(folder, 4)
    model = build(CONFIGS["mid"]())
    model.save_pretrained(folder / "model")
    presets.llava_next_processor(model.config).save_pretrained(folder / "model")
    run, _ = prepare(config_of(folder, 1, 1, "save"))
    run.checkpoints.mkdir(parents=True)
    student = build_model(run)
    trained = trainable_parameters(student)
    optimizer, gradients = build_optimizer(run.config, student), GradientBuffer(trained.values())
    gradients.flat.normal_()
    optimizer.step()  # which makes its moments
    saver = Saver(run, RunLog(run.folder, 0, order=False, tensorboard=False))
    waits, wholes = [], []
    for step in range(times):
        began = time.perf_counter()
        saver.save(step, trained, optimizer, Counts(), {})
        waits.append(time.perf_counter() - began)
        saver.finish()
        wholes.append(time.perf_counter() - began)
    size = sum(path.stat().st_size for path in (run.checkpoints / f"step-{times - 1:08d}").iterdir())
    return {"wait": median(waits), "whole": median(wholes), "mebibytes": size / 2**20}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        saving = seconds_of_saving(Path(name), max(5, options.repeats))
    with tempfile.TemporaryDirectory() as name:
        recovery = seconds_to_recover(Path(name), options.repeats)
    print(f"from a worker's death to the next new step: {', '.join(f'{s:.1f}' for s in recovery)} s")
    print(
        f"a checkpoint of {saving['mebibytes']:.0f} MiB: the loop waits {1000 * saving['wait']:.0f} ms, "
        f"writing it takes {1000 * saving['whole']:.0f} ms"
    )
    print(f"{date.today()}, torch {torch.__version__}, two workers with one thread each")
    if options.json:
        figures: dict[str, Any] = {"seconds_to_recover": recovery, "saving": saving}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
