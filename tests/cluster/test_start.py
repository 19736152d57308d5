"""A cluster of one's own, and those that can be joined."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from waiting import HANG_SECONDS

from vlskv_ray.cluster.start import address_of_ray_start, has_token, short_folder


@pytest.mark.cluster
def test_actors_that_are_ended_are_this_processs_own_of_one_class() -> None:
    """Who waits for one is told, which a thread must be before Ray is taken down under it."""
    mine = """
import ray, time
from vlskv_ray.cluster.start import end_actors, ray_cluster

class Sleeper:
    def sleeps(self): time.sleep(600)
    def answers(self): return 3

class Controller(Sleeper): pass

class Starter:
    def starts(self):
        self.controller = ray.remote(num_cpus=0)(Controller).remote()
        return ray.get(self.controller.answers.remote())
    def asks(self): return ray.get(self.controller.answers.remote())

with ray_cluster("local"):
    other, starter = (ray.remote(num_cpus=0)(kind).remote() for kind in (Sleeper, Starter))
    assert ray.get(starter.starts.remote()) == 3
    controller = ray.remote(num_cpus=0)(Controller).remote()  # ended while it is started
    sleeps = controller.sleeps.remote()
    end_actors("Controller")
    try: ray.get(sleeps, timeout=60)
    except ray.exceptions.RayActorError: print("ended")
    print(ray.get(other.answers.remote()), ray.get(starter.asks.remote()))
"""
    found = subprocess.run([sys.executable, "-c", mine], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert found.stdout.split() == ["ended", "3", "3"], found


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
