"""`ray job submit` to a head node of its own: what a job tells and leaves, what stops it, and who may submit one."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from clusters import HOLDER, free_ports, plan_faults
from runs import assert_same_run, lines
from waiting import HANG_SECONDS, wait_until

import vlskv_ray.train
from vlskv_ray.training import faults

ROOT = Path(__file__).parent.parent
TRAIN = ("python", "-m", "vlskv_ray.train", "--config", "configs/quickstart.yaml")
SHORT = ("--num-samples", "64", "micro_batch_size=4", "evaluation.num_samples=4", "cluster.num_workers=1")
STEPS = 16


@dataclass(frozen=True)
class Head:
    """A head node, and how to give it jobs."""

    url: str
    folder: Path
    environment: dict[str, str]
    """Of its processes, and of the commands of those who may submit jobs."""

    def job(self, command: str, *arguments: str, **settings: str) -> "subprocess.Popen[bytes]":
        """`ray job COMMAND ...` in the project's folder, with settings of the environment."""
        ray = [sys.executable, "-m", "ray.scripts.scripts", "job", command]
        return subprocess.Popen(
            [*ray, "--log-color", "false", "--address", self.url, *arguments],
            cwd=ROOT,
            env=self.environment | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def processes(self) -> list[int]:
        """All that live of what was started here: whatever else they are, they have its environment."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdecimal() and os.fsencode(self.folder) in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found


def ended(process: "subprocess.Popen[bytes]") -> tuple[int, str]:
    """Exit status and output, with its carriage returns, which Python takes from text."""
    out, _ = process.communicate(timeout=HANG_SECONDS)
    return process.returncode, out.decode()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head node of two CPUs that wants a token; nothing of it is left behind, and no other run comes to join it."""
    folder = Path(tempfile.mkdtemp(prefix="jobs-", dir="/tmp"))  # a short path, for Ray makes sockets below it
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    of_others = ("RAY_", "PYTHONPATH", faults.FOLDER)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(of_others)} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # jobs say `python`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": str(HANG_SECONDS),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    gcs, dashboard, agent, client = free_ports(4)
    options = {"temp-dir": folder, "num-cpus": 2, "port": gcs, "dashboard-host": "127.0.0.1"}
    options |= {"dashboard-port": dashboard, "dashboard-agent-listen-port": agent, "ray-client-server-port": client}
    options |= {"min-worker-port": 0, "max-worker-port": 0}  # any that are free, beside other clusters
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--{name}={value}" for name, value in options.items()]
    head = Head(f"http://127.0.0.1:{dashboard}", folder, environment)
    log = folder / "head.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: process.poll() is not None or ended(head.job("list"))[0] == 0, why=log.read_text)
        assert process.poll() is None, log.read_text()
        yield head
        assert process.poll() is None, log.read_text()
        from ray._private.utils import read_ray_address

        assert not (read_ray_address() or "").endswith(f":{gcs}")  # by which commands on this machine find a cluster
    finally:
        process.terminate()
        with suppress(AssertionError):
            wait_until(lambda: not head.processes())
        left = head.processes()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        told = log.read_text()
        shutil.rmtree(folder)
        assert not left, told


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of faults that happen to workers of jobs."""
    return tmp_path_factory.mktemp("planned")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def training(runs: Path, name: str) -> list[str]:
    """`--working-dir . -- python -m vlskv_ray.train ...`: the shortened quickstart."""
    where = (f"output.dir={runs}", f"output.name={name}", "output.order=true")
    return ["--working-dir", ".", "--", *TRAIN, *SHORT, *where]


@pytest.fixture(scope="module")
def left_alone(head: Head, runs: Path) -> tuple[Path, int, str]:
    """The folder of a run that nothing happens to, exit status and output of its submission."""
    return runs / "alone", *ended(head.job("submit", *training(runs, "alone")))


@pytest.mark.cluster
def test_a_job_tells_and_leaves_what_the_command_does(left_alone: tuple[Path, int, str]) -> None:
    """Exit status 0, plain lines that can be kept as a log, none of them Ray's own, and a finished run."""
    run, status, out = left_alone
    assert status == 0, out
    assert "joined a cluster of 2 CPUs: 1 worker" in out and f"step {STEPS}/{STEPS}" in out
    assert "\r" not in out and "\x1b" not in out
    of_the_run = out[out.index("vlskv_ray ", out.index("Running entrypoint")) : out.index("report: ")]
    assert not re.search(r"^(\(|\[|\d{4}-)", of_the_run, re.MULTILINE), of_the_run
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    for name in ("final/model.safetensors", "evaluation.json", "report.html", "summary.json"):
        assert (run / name).exists(), name
    assert not (run / "ray").exists()


@pytest.mark.cluster
def test_only_what_a_job_needs_is_uploaded(head: Head, tmp_path: Path) -> None:
    """`.rayignore` keeps out what is large or of this machine only; the package that runs is the uploaded one."""
    kept = ["configs", "vlskv_ray"]
    for name in kept:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".rayignore", tmp_path)
    expected = {f"./{path.relative_to(tmp_path)}" for path in tmp_path.rglob("*") if path.is_file()}
    for name in (".git", ".venv", "runs/quickstart", "build", "x.egg-info", "vlskv_ray/__pycache__", ".ruff_cache"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "large").write_text("of no use")
    where = "from importlib.util import find_spec; print(find_spec('vlskv_ray').origin)"
    entrypoint = ("sh", "-c", f'find . -type f; python -c "{where}"')
    status, out = ended(head.job("submit", "--working-dir", str(tmp_path), "--", *entrypoint))
    assert status == 0, out
    assert {line for line in out.splitlines() if line.startswith("./")} == expected
    assert any(line.endswith("/vlskv_ray/__init__.py") and str(head.folder) in line for line in out.splitlines()), out


REFUSED = {
    "data.max_lenght=5": "command line: data.max_lenght: unknown key, did you mean data.max_length?\n",
    "output.name=lost": "output.dir: runs is in the copy of the working directory that Ray made for this job",
}


@pytest.mark.cluster
@pytest.mark.parametrize("option", REFUSED)
def test_what_is_wrong_fails_the_job(head: Head, option: str) -> None:
    """The message is in the output, and the exit status 1, which is Ray's for every job that fails; without a folder
    that lasts nothing is begun."""
    status, out = ended(head.job("submit", "--working-dir", ".", "--", *TRAIN, option))
    assert status == 1 and REFUSED[option] in out
    assert "failed with exit code 2" in out and "Traceback" not in out


def test_a_run_is_not_written_where_ray_deletes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run says so too."""
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    arguments = ["--config", str(ROOT / "configs" / "quickstart.yaml"), *SHORT, "cluster.num_workers=0", "--dry-run"]
    for dry in (False, True):
        assert vlskv_ray.train.main(arguments[: None if dry else -1]) == 2
        assert "output.dir: runs is in the copy of the working directory" in capsys.readouterr().err
    assert not list(copy.iterdir())


@pytest.mark.cluster
def test_without_the_token_nothing_is_run(head: Head, tmp_path: Path) -> None:
    """Neither by the command nor by a plain request, nor with a wrong token."""
    ran = tmp_path / "ran"
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    submission = ("--submission-id", "strangers", "--", "touch", str(ran))
    for settings, told in (
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": ""}, "Unauthorized: Missing authentication token"),
        ({"RAY_AUTH_TOKEN_PATH": str(wrong)}, "Forbidden: Invalid authentication token"),
    ):
        status, out = ended(head.job("submit", *submission, **settings))
        assert status == 1 and told in out
    body = f'{{"entrypoint": "touch {ran}", "submission_id": "strangers"}}'.encode()
    for headers, code in (({}, 401), ({"Authorization": "Bearer 0000"}, 403)):
        request = Request(f"{head.url}/api/jobs/", body, headers | {"Content-Type": "application/json"})
        with pytest.raises(HTTPError) as error:
            urlopen(request, timeout=HANG_SECONDS)
        assert error.value.code == code
    status, out = ended(head.job("list"))
    assert status == 0 and "strangers" not in out and not ran.exists()


@pytest.mark.cluster
def test_a_stopped_job_has_saved_and_goes_on(
    head: Head, runs: Path, planned: Path, left_alone: tuple[Path, int, str]
) -> None:
    """`ray job stop` in the middle of a step; submitted again, the run ends with the bits of one left alone."""
    run = runs / "stopped"
    plan_faults(planned, ("micro_batch", 5, 0, "wait"))
    variables = f'{{"env_vars": {{"{faults.FOLDER}": "{planned}"}}}}'
    options = ("--submission-id", "first", "--no-wait", "--runtime-env-json", variables)
    status, out = ended(head.job("submit", *options, *training(runs, "stopped")))
    assert status == 0, out

    def log() -> str:
        return ended(head.job("logs", "first"))[1]

    wait_until((planned / "00.json.done").exists, why=log)
    assert not list((run / "checkpoints").iterdir())
    stop = head.job("stop", "first")
    wait_until((run / "STOP").exists, why=log)
    (planned / "00.json.go").touch()
    status, out = ended(stop)
    assert status == 0 and "Job 'first' was stopped" in out, log()
    (saved,) = (int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())
    assert saved in (6, 7) and f"saved at step {saved} of {STEPS}; the same command goes on from there\n" in log()
    assert not (run / "final").exists()

    status, out = ended(head.job("submit", *training(runs, "stopped")))
    assert status == 0, out
    assert f"resume        from step {saved}\n" in out and f"step {STEPS}/{STEPS}" in out
    assert_same_run(run, left_alone[0])


# ----------------------------------------------------------------------------------------- a cluster that others are on
NEEDED = r"1 worker and a data task must have 1\.5 CPUs at once"


@contextmanager
def held(head: Head, file: Path, cpus: float) -> Iterator[None]:
    """A job that is none of ours holds CPUs meanwhile."""
    process = head.job("submit", "--", "python", "-c", HOLDER, str(file), str(cpus))
    wait_until(file.exists)
    try:
        yield
    finally:
        file.unlink()
        ended(process)


def waiting(head: Head, runs: Path, name: str, *options: str, settings: str = "{}") -> Callable[[], str]:
    """Submits a run as a job that is not waited for; returns what reads its output."""
    what = ("--submission-id", name, "--no-wait", "--runtime-env-json", settings, *training(runs, name), *options)
    status, out = ended(head.job("submit", *what))
    assert status == 0, out
    return lambda: ended(head.job("logs", name))[1]


def status_of(head: Head, name: str) -> str:
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    out = ended(head.job("status", name))[1]
    return next(word for word in ("PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED") if word in out.upper())


def is_over(head: Head, name: str) -> bool:
    return status_of(head, name) in ("STOPPED", "SUCCEEDED", "FAILED")


@pytest.mark.cluster
def test_the_second_of_two_runs_says_what_it_waits_for(
    head: Head, runs: Path, tmp_path: Path, left_alone: tuple[Path, int, str]
) -> None:
    """And begins when the first has ended; its result is that of a run which had the cluster for itself."""
    moments = range(3, STEPS)  # at each of which it waits
    plan_faults(tmp_path, *(("micro_batch", step, 0, "wait") for step in moments))
    variables = f'{{"env_vars": {{"{faults.FOLDER}": "{tmp_path}"}}}}'
    first = waiting(head, runs, "holds", settings=variables)
    wait_until((tmp_path / "00.json.done").exists, why=first)
    second = waiting(head, runs, "waits")
    wait_until(lambda: "waiting  " in second(), why=second)
    told = rf"waiting       {NEEDED}, and (0|0\.5|1) of the cluster's 2 CPUs are free; for "
    assert re.search(rf"^{told}\d+ s by now, 600 s at most$", second(), re.MULTILINE), second()
    assert not is_over(head, "holds") and not (runs / "waits" / "metrics.jsonl").exists()
    for i in range(len(moments)):
        (tmp_path / f"{i:02}.json.go").touch()
    for name, log in (("holds", first), ("waits", second)):
        wait_until(lambda name=name: is_over(head, name), why=log)
        assert status_of(head, name) == "SUCCEEDED", log()
    assert_same_run(runs / "waits", left_alone[0])


@pytest.mark.cluster
def test_two_runs_that_each_get_half_of_what_they_need(head: Head, runs: Path) -> None:
    """Of two CPUs each run needs one for its worker and one for its data; neither keeps the other from both."""
    each = ("cluster.cpus_per_worker=1", "data.cpus_per_task=1", "max_steps=2")
    logs = {name: waiting(head, runs, name, *each) for name in ("half", "other-half")}
    for name, log in logs.items():
        wait_until(lambda name=name: is_over(head, name), why=log)
        assert status_of(head, name) == "SUCCEEDED", log()


@pytest.mark.cluster
def test_what_others_do_not_give_back_ends_the_run(head: Head, runs: Path, tmp_path: Path) -> None:
    """With exit status 1 and the numbers; asked to stop meanwhile, it ends at once."""
    with held(head, tmp_path / "held", cpus=2):
        status, out = ended(head.job("submit", *training(runs, "ends"), "cluster.wait_seconds=3"))
        assert status == 1 and "failed with exit code 1" in out and "Traceback" not in out, out
        told = rf"error: cluster\.wait_seconds: {NEEDED}, and 0 of the cluster's 2 CPUs are"
        assert re.search(rf"^{told} free after 3 s; wait for what else runs on the cluster, ", out, re.MULTILINE), out
        log = waiting(head, runs, "stops")
        wait_until(lambda: "waiting  " in log(), why=log)
        ended(head.job("stop", "stops"))
        assert is_over(head, "stops") and "ended at once; the same command goes on" in log(), log()
