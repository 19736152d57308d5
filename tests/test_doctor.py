"""The command that tells whether a run would start here."""

import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from waiting import HANG_SECONDS

from vlskv_ray import doctor
from vlskv_ray.doctor import main
from vlskv_ray.launch.diagnosis import (
    examine_dashboard,
    examine_machine,
    judge_bfloat16,
    judge_cpus,
    memory,
    node_line,
    quota,
)

GIB = 2**30


def test_cpus_that_a_container_may_not_use_are_warned_of(tmp_path: Path) -> None:
    assert judge_cpus(8, 8, math.inf).mark == "ok"
    limited = judge_cpus(8, 4, 2.5)
    assert limited.mark == "warning" and limited.text.startswith("8, of which 2.5 can be used; Ray counts all 8;")
    file = tmp_path / "cpu.max"
    assert quota(file) == math.inf
    for text, cpus in (("max 100000", math.inf), ("250000 100000", 2.5)):
        file.write_text(text)
        assert quota(file) == cpus


@pytest.mark.parametrize(
    ("flags", "text"),
    [("amx_bf16 avx512_bf16", "AMX"), ("avx512_bf16", "AVX-512"), ("asimd bf16", "ARM"), ("avx512f", "no units")],
)
def test_units_for_bfloat16(flags: str, text: str) -> None:
    assert judge_bfloat16(f"flags\t\t: fpu {flags} sse\n").text.startswith(text)


def test_a_machine_with_little_of_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 1024))
    warned = {
        finding.what: finding.text for finding in examine_machine(tmp_path / "a" / "b") if finding.mark == "warning"
    }
    assert "give a container more" in warned["/dev/shm"] and "set output.dir" in warned["disk"]
    assert warned["open files"].startswith("at most 1,024; ") and "ulimit -n" in warned["open files"]
    assert not (tmp_path / "a").exists()


def test_memory_as_linux_tells_it(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  2048 kB\nMemFree: 1 kB\nMemAvailable:  1024 kB\nHugePages: 0\n")
    assert memory(tmp_path / "meminfo") == (2 * 2**20, 2**20)


def report(**differing: Any) -> dict[str, Any]:
    known = {"name": "a (10.0.0.1)", "cpus": 4.0, "memory": 8 * GIB, "shm": GIB, "interface": "eth0", "token": True}
    return known | differing


def test_a_node_in_one_line() -> None:
    assert node_line(report()).text == (
        "a (10.0.0.1): 4 CPUs, 8.00 GiB of memory and 1.00 GiB of /dev/shm free, network eth0, token authentication on"
    )
    assert node_line(report(token=False)).mark == "warning"
    assert "set RAY_AUTH_MODE=token" in node_line(report(token=False)).text
    assert node_line({"name": "b", "error": "gone"}).mark == "problem"


@pytest.mark.parametrize(
    ("url", "mark"), [(None, "ok"), ("127.0.0.1:8265", "ok"), ("localhost:8265", "ok"), ("10.0.0.1:8265", "warning")]
)
def test_a_dashboard_that_others_reach_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, url: str | None, mark: str
) -> None:
    monkeypatch.setattr("ray._private.worker.get_dashboard_url", lambda: url)
    assert [finding.mark for finding in examine_dashboard(joined=True)] == [mark]


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["cluster.num_workers=2"])
    assert ended.value.code == 2 and "add --config FILE" in capsys.readouterr().err
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


QUICKSTART = str(Path(doctor.__file__).parents[1] / "configs" / "quickstart.yaml")


@pytest.mark.cluster
@pytest.mark.parametrize(("overrides", "status"), [((), 0), (("cluster.cpus_per_worker=999",), 1)])
def test_this_machine(tmp_path: Path, overrides: tuple[str, ...], status: int) -> None:
    """With a config all is looked at, and nothing written; workers that do not fit are a problem."""
    options = ["--config", QUICKSTART, f"output.dir={tmp_path}/runs", "cluster.address=local", *overrides]
    done = subprocess.run(
        [sys.executable, "-m", "vlskv_ray.doctor", *options], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == status and not done.stderr, done
    groups = [line for line in done.stdout.splitlines() if not line.startswith("  ")]
    nodes = [] if status else ["nodes"]
    ending = "1 problem" if status else "no problem was found"
    assert groups == ["this machine", "versions", "run", "Ray", *nodes, ending]
    marks = re.findall(r"^  (\w+) +(\S+)", done.stdout, re.MULTILINE)
    if status:
        assert ("problem", "start") in marks and "2 workers of 999 CPUs" in done.stdout
    else:
        assert {("ok", what) for what in ("config", "storage", "versions", "memory")} <= set(marks)
        assert "token authentication on" in done.stdout
    assert not list(tmp_path.iterdir())
