"""Commands in processes of their own, and clusters for them to join."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from runs import write_config, write_files
from waiting import wait_until

from benchmarks.recovery import processes
from vlskv_ray.cluster.start import ray_cluster
from vlskv_ray.training import faults

HOLDER = """
import pathlib, sys, time, ray
ray.init(log_to_driver=False)
@ray.remote(num_cpus=float(sys.argv[2]))
class Holder:
    def holds(self): return True
holder = Holder.remote()
ray.get(holder.holds.remote())
file = pathlib.Path(sys.argv[1])
file.touch()
while file.exists(): time.sleep(0.1)
"""
"""Its arguments: a file that it makes once it holds CPUs, and how many; it holds them as long as the file is there."""


class Command(subprocess.Popen[bytes]):
    """`python -m vlskv_ray.MODULE ...`; all that it prints goes into a file that has no name."""

    def __init__(self, module: str, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - it lasts as long as this
        command = [sys.executable, "-m", f"vlskv_ray.{module}", *arguments]
        super().__init__(command, env=env, stdout=self.output, stderr=subprocess.STDOUT)

    def printed(self) -> str:
        file = self.output.fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode()

    def wait_until(self, happened: Callable[[], object]) -> None:
        wait_until(happened, lambda: self.poll() is None, self._given_up)

    def ended(self, status: int = 0) -> str:
        """What it printed until it ended with that exit status."""
        self.wait_until(lambda: self.poll() is not None)
        assert self.returncode == status, self.printed()
        return self.printed()

    def _given_up(self) -> str:
        self.kill()
        return self.printed()


def worker_processes(title: bytes = b"RayTrainWorker") -> list[int]:
    """Process ids of the processes of that title that descend from this process: those of its cluster."""
    return processes(title, os.getpid())


def has_ended(pid: int) -> bool:
    """A zombie has, though nobody has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def plan_faults(planned: Path, *wanted: tuple[str, int, int, str]) -> None:
    """Phase, step, rank and action of what is to happen next."""
    for path in planned.iterdir():
        path.unlink()
    for i, (phase, step, rank, action) in enumerate(wanted):
        fault = {"phase": phase, "step": step, "rank": rank, "action": action}
        (planned / f"{i:02}.json").write_text(json.dumps(fault))


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]


@contextmanager
def head_node() -> Iterator[tuple[Any, dict[str, str]]]:
    """A cluster of one node so far, with a folder of its own, and the environment that makes commands join it."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="vlskv-")  # short: paths of sockets are at most 107 characters long
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONUNBUFFERED", "1")
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        try:
            yield nodes, os.environ | {"RAY_ADDRESS": nodes.address}
        finally:
            nodes.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def small_run(folder: Path, teacher: Path, **options: Any) -> None:
    write_files(folder)
    output = {"dir": str(folder / "runs"), "name": "run", "tensorboard": False}
    cluster = {"num_workers": 2, "threads_per_worker": 1}
    write_config(folder, teacher, **({"cluster": cluster, "evaluation": {}, "output": output} | options))


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


@pytest.fixture(scope="module")
def left_alone(cluster: dict[str, str], files: Path) -> Path:
    """The run of two gloo workers on the real files."""
    out = Command("train", "--config", str(files / "run.yaml"), env=cluster).ended()
    assert "joined a cluster of" in out and "CPUs: 2 workers x 1 thread (" in out
    assert "9 samples left out: 3 image_missing, 3 json_line, 3 too_long" in out
    return files / "runs" / "run"
