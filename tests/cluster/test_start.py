"""Sharing out a cluster so that data always has room, and the progress line."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from waiting import HANG_SECONDS

from vlskv_ray.cluster.shares import Cluster, Reserved, check_gpus, describe, reserve
from vlskv_ray.cluster.start import address_of_ray_start, has_token, short_folder
from vlskv_ray.config import ClusterConfig, Config, DataConfig, SourceConfig
from vlskv_ray.launch.on_ray import backend_of, share_of_worker
from vlskv_ray.launch.progress import ProgressLine
from vlskv_ray.words import format_duration

DATA = DataConfig(sources=(SourceConfig(name="shapes"),))
CONFIG = Config.model_validate({"model": {"name_or_path": "x"}, "data": {"sources": ["shapes"]}})


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 7, 16, 96])
@pytest.mark.parametrize("workers", [1, 2, 3, 8, 64])
def test_whatever_the_cluster_one_data_task_fits(cpus: int, workers: int) -> None:
    """Ray waits forever for a CPU that all workers hold; the defaults never let it come to that."""
    reserved = reserve(ClusterConfig(num_workers=workers), DATA, cpus)
    assert reserved.cpus_per_worker * workers + reserved.cpus_per_task <= cpus
    assert reserved.cpus_per_worker > 0 and reserved.threads_per_worker >= 1
    assert reserved.cpus_per_worker < 1 or reserved.cpus_per_worker.is_integer()


def test_two_workers_on_two_cores() -> None:
    reserved = reserve(ClusterConfig(num_workers=2), DATA, 2)
    assert (reserved.cpus_per_worker, reserved.cpus_per_task, reserved.threads_per_worker) == (0.5, 0.5, 1)


def test_a_share_that_would_hang_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 workers of 1 CPUs and one data task of 0.5 need 2.5 CPUs, .* has 2,"):
        reserve(ClusterConfig(num_workers=2, cpus_per_worker=1.0), DATA, 2)


def test_a_share_that_no_machine_has_is_refused() -> None:
    """Together the machines have enough, but a worker is on one of them, and so is a data task."""
    for key, cluster, data in (
        ("cluster.cpus_per_worker", ClusterConfig(cpus_per_worker=3.0), DATA),
        ("data.cpus_per_task", ClusterConfig(), DATA.model_copy(update={"cpus_per_task": 3.0})),
    ):
        with pytest.raises(ValueError, match=rf"^{key}: 3, but no machine of the cluster has more than 2; lower it"):
            reserve(cluster, data, cpus=8, largest_node=2)
        reserve(cluster, data, cpus=8, largest_node=4)


def test_a_worker_on_a_gpu_takes_one_cpu_and_leaves_the_others_to_data() -> None:
    gpu = ClusterConfig(num_workers=2, use_gpu=True)
    reserved = reserve(gpu, DATA, 16)
    assert reserved == Reserved(cpus_per_worker=1.0, cpus_per_task=1.0, num_tasks=14, threads_per_worker=1)
    assert reserve(gpu, DATA, 2).cpus_per_worker == 0.5
    assert "(1 CPUs and a GPU each)" in describe(
        CONFIG.model_copy(update={"cluster": gpu}), reserved, Cluster(16, joined=True, gpus=2)
    )


def test_what_ray_is_asked_for() -> None:
    """A GPU each where the config says so, and by what tensors of either kind travel."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig

    for use_gpu, resources in ((False, {"CPU": 2.5}), (True, {"CPU": 2.5, "GPU": 1})):
        cluster = ClusterConfig(num_workers=3, use_gpu=use_gpu)
        asked = ScalingConfig(num_workers=3, **share_of_worker(cluster, Reserved(2.5, 1, 1, 1)))
        assert asked.use_gpu == use_gpu and asked.resources_per_worker == resources
        assert asked.total_resources == {name: 3 * count for name, count in resources.items()}
        backends = TorchConfig(backend=backend_of(cluster)).backend
        assert torch.distributed.BackendConfig(torch.distributed.Backend(backends)).get_device_backend_map() == (
            {"cpu": "gloo", "cuda": "nccl"} if use_gpu else {"cpu": "gloo", "cuda": "gloo"}
        )


def test_gpus_that_are_not_there_are_not_waited_for() -> None:
    with pytest.raises(ValueError, match=r"^cluster.use_gpu: .* for each worker, 3 in all, the cluster has 2; lower "):
        check_gpus(ClusterConfig(num_workers=3, use_gpu=True), 2)
    check_gpus(ClusterConfig(num_workers=(2, 3), use_gpu=True), 2)
    check_gpus(ClusterConfig(num_workers=3), 0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, **metrics: Any) -> str:
    always = {"step": number, "loss": 0.5, "top1_agreement": 0.9, "tokens_per_second": 1234.5, "step_seconds": 2.0}
    return json.dumps(always | metrics) + "\n"


def test_a_terminal_gets_one_line_redrawn(tmp_path: Path) -> None:
    path, out = tmp_path / "metrics.jsonl", Terminal()
    progress = ProgressLine(path, 10, out=out)
    progress.update()
    assert out.getvalue() == "\r\x1b[Kstarting 0:00"
    path.write_text(step(1, kl_vision=0.25))
    progress.update()
    path.write_text(step(1, kl_vision=0.25) + step(2, kl_text=0.125) + step(3)[:20])
    progress.update()
    progress.close()
    _, first, second = out.getvalue().removeprefix("\r\x1b[K").split("\r\x1b[K")
    assert first == "step 1/10  loss 0.5  image 0.25  agree 90%  1,234 tok/s"
    assert second.startswith("step 2/10  loss 0.5  image 0.25  text 0.125  agree 90%  1,234 tok/s  ")
    assert second.endswith("  0:16 left\n")  # by the seconds that steps take, whatever else there was between them


def test_a_log_gets_plain_lines_and_always_the_last(tmp_path: Path) -> None:
    path, out = tmp_path / "metrics.jsonl", io.StringIO()
    progress = ProgressLine(path, 3, out=out)
    for count in (1, 2, 3):
        path.write_text("".join(step(i) for i in range(1, count + 1)))
        progress.update()
    progress.close()
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == ["step 1/3", "step 3/3"]
    assert "\r" not in out.getvalue()


def test_what_is_waited_for_is_told_in_whole_lines(tmp_path: Path) -> None:
    """Also on a terminal, and there is nothing to save until the next step."""
    path, out, notes = tmp_path / "metrics.jsonl", Terminal(), tmp_path / "ray" / "waiting"
    progress = ProgressLine(path, 10, out=out, notes=notes)
    path.write_text(step(1))
    progress.update()
    assert not progress.waits
    notes.parent.mkdir()
    notes.write_text(f"waiting {'x' * 200}\n")
    for _ in range(2):
        progress.update()
        assert progress.waits
    assert f"waiting {'x' * 200}\n" in out.getvalue()
    path.write_text(step(1) + step(2))
    progress.update()
    assert not progress.waits


def test_steps_taken_back_by_a_restart_are_shown_again(tmp_path: Path) -> None:
    path, out = tmp_path / "metrics.jsonl", Terminal()
    progress = ProgressLine(path, 10, out=out)
    path.write_text(step(1) + step(2) + step(3))
    progress.update()
    path.write_text(step(1))
    progress.update()
    assert "step 3/10" in out.getvalue() and "step 1/10" in out.getvalue().rpartition("\r")[2]
    assert "a worker was lost; all were started again from the newest checkpoint\n" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("cpus", "node", "most"), [(4, 2, 2), (2, 2, 2), (32, 8, 8), (16, 16, 3)])
def test_elastic_workers_leave_cpus_for_data_on_any_nodes(cpus: float, node: float, most: int) -> None:
    """Ray fills each node with as many workers as fit there."""
    reserved = reserve(ClusterConfig(num_workers=(1, most)), DATA, cpus, node)
    on_a_node = int(node // reserved.cpus_per_worker)
    assert on_a_node * cpus / node >= most  # all of them fit
    assert node - on_a_node * reserved.cpus_per_worker >= reserved.cpus_per_task  # on one node that is left


def test_more_threads_than_cpus_are_warned_of() -> None:
    config = CONFIG.model_copy(update={"cluster": ClusterConfig(num_workers=2)})
    assert "warning" not in describe(config, Reserved(1, 1, 1, threads_per_worker=2), Cluster(4, joined=False))
    crowded = describe(config, Reserved(1, 1, 1, threads_per_worker=3), Cluster(4, joined=False))
    assert "warning: 6 threads of all workers together on 4 CPUs" in crowded


@pytest.mark.cluster
def test_the_cluster_of_another_run_is_not_joined() -> None:
    """Runs side by side on one machine each have their own: one that joined the other's would end with it. Nor is one
    waited for that `ray start` has left the address of and that has ended."""
    other = (
        "import ray; ray.init(address='local', num_cpus=1, include_dashboard=False); print('up', flush=True); input()"
    )
    mine = "from vlskv_ray.cluster.start import ray_cluster\nwith ray_cluster(None) as cluster: print(cluster.joined)"
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # a short path, for Ray makes sockets below it
    (temporary / "ray").mkdir()
    (temporary / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"RAY_TMPDIR": str(temporary)}
    with subprocess.Popen(
        [sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdin and process.stdout
        assert any(line == "up\n" for line in process.stdout)
        found = subprocess.run(
            [sys.executable, "-c", mine], capture_output=True, text=True, env=env, timeout=HANG_SECONDS
        )
        process.stdin.close()
    shutil.rmtree(temporary, ignore_errors=True)
    assert found.stdout.split() == ["False"], found.stderr


def test_a_token_is_looked_for_where_ray_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_token()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert has_token()
    monkeypatch.setenv("HOME", "/nowhere")
    assert not has_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / ".ray" / "auth_token"))
    assert has_token()


@pytest.mark.cluster
def test_who_has_no_token_joins_clusters_that_want_none(tmp_path: Path) -> None:
    """And gets one for a cluster of their own, without a word; a cluster that cannot be joined is one line."""
    open_one = (
        "import ray; print(ray.init(address='local', num_cpus=1, include_dashboard=False).address_info['gcs_address'], "
        "flush=True); input()"
    )
    mine = (
        "import os, sys\nfrom vlskv_ray.cluster.start import ray_cluster\n"
        "with ray_cluster(sys.argv[1]) as cluster: print(cluster.joined, os.environ.get('RAY_AUTH_MODE'))"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"HOME": str(tmp_path)}

    def joined(address: str, **settings: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", mine, address]
        return subprocess.run(command, capture_output=True, text=True, env=env | settings, timeout=HANG_SECONDS)

    with subprocess.Popen(
        [sys.executable, "-c", open_one],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env | {"RAY_AUTH_MODE": "disabled"},
    ) as process:
        assert process.stdin and process.stdout
        address = next(line for line in process.stdout if ":" in line).strip()
        found = joined(address)
        refused = joined(address, RAY_AUTH_MODE="token")
        process.stdin.close()
    assert found.stdout.split() == ["True", "None"], found.stderr
    assert "name the file of its token with RAY_AUTH_TOKEN_PATH" in refused.stderr.splitlines()[-1]
    own = joined("local")
    assert own.stdout.split() == ["False", "token"] and own.stderr == ""
    assert (tmp_path / ".ray" / "auth_token").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_the_address_that_another_user_has_left_is_not_joined(tmp_path: Path) -> None:
    """Who can write where `ray start` does could have anybody's run, and token, come to a cluster of theirs."""
    file = tmp_path / "ray_current_cluster"
    assert address_of_ray_start(file) is None
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        file.write_text(f"{address}\n")
        assert address_of_ray_start(file) == address
        os.chown(file, 54321, 54321)
        assert address_of_ray_start(file) is None
    os.chown(file, 0, 0)
    assert address_of_ray_start(file) is None


def test_paths_of_sockets_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the byte; else a folder of this user's alone takes their place, or one line says what to do."""
    monkeypatch.setattr("os.getpid", lambda: 1234567)
    fits = Path("/" + "a" * (107 - len("/ray/session_2026-11-30_11-31-51_167763_1234567/sockets/plasma_store") - 1))
    assert short_folder(fits) is None and capsys.readouterr().err == ""
    short = short_folder(Path(f"{fits}a"))
    assert short is not None and os.stat(short).st_mode & 0o777 == 0o700
    os.rmdir(short)
    told = capsys.readouterr().err
    assert told.startswith(f"warning: TMPDIR: {fits}a has {len(str(fits)) + 1} bytes, ") and told.count("\n") == 1
    assert f"would have 108, and 107 at most can be; Ray uses {short} meanwhile, set RAY_TMPDIR" in told

    def there_is_none(**_: str) -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("tempfile.mkdtemp", there_is_none)
    with pytest.raises(ValueError, match=r"^TMPDIR: .* set RAY_TMPDIR to a shorter one \(/tmp: No such file"):
        short_folder(Path(f"{fits}a"))


@pytest.mark.cluster
def test_ray_starts_whatever_tmpdir_is(tmp_path: Path) -> None:
    """And nothing is left of the folder that it used."""
    long = tmp_path / ("a" * 60)
    long.mkdir()
    start = "from vlskv_ray.cluster import start\nwith start.ray_cluster('local')"
    mine = f"import ray\n{start}: print(ray.is_initialized())"
    of_others = ("RAY_ADDRESS", "RAY_TMPDIR")
    env = {key: value for key, value in os.environ.items() if key not in of_others} | {"TMPDIR": str(long)}
    found = subprocess.run([sys.executable, "-c", mine], capture_output=True, text=True, env=env, timeout=HANG_SECONDS)
    assert (found.returncode, found.stdout) == (0, "True\n"), found.stderr
    told = re.fullmatch(r"warning: TMPDIR: .* Ray uses (/tmp/vlskv_ray-\w+) meanwhile, .*\n", found.stderr)
    assert told and not Path(told[1]).exists(), found.stderr
