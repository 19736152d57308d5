"""Before any worker loads a model: what is judged of what nodes say, and nodes that share nothing or all they need."""

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clusters import Command, head_node, small_run, worker_processes
from runs import run_of
from waiting import HANG_SECONDS, wait_until

from benchmarks.recovery import last_step
from vlskv_ray.cluster import node, preflight
from vlskv_ray.cluster.findings import Need, findings_of, of_all_reduce, of_hub_model, problems_of, shares
from vlskv_ray.cluster.preflight import need_of
from vlskv_ray.cluster.shares import Reserved
from vlskv_ray.cluster.start import ray_cluster
from vlskv_ray.model.build import load_config, parameter_counts, trainable_parameters
from vlskv_ray.training.objective import build_model, objective_of

GIB = 2**30
MODEL = ("some/model", "0" * 40)


def report(name: str = "a (10.0.0.1)", **differing: Any) -> dict[str, Any]:
    """What a node says that has all it needs."""
    return {
        "id": name,
        "name": name,
        "cpus": 4.0,
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "memory": 10 * GIB,
        "storage": {"output.dir": ""},
        "lacking": {"data.sources": []},
        "interface": "eth0",
        "interfaces": ["eth0", "lo"],
    } | differing


NEED = Need(
    shared={"output.dir": Path("/shared/run")},
    files={"data.sources": {"/data/a.jsonl": 10}},
    workers=4,
    weight_bytes=GIB,
    worker_bytes=2 * GIB,
)
B = "b (10.0.0.2)"


# ------------------------------------------------------------------------------------------------------------ judging
def test_nothing_is_wrong() -> None:
    found = findings_of([report(), report(B)], NEED, here=report()["versions"])
    assert [(finding.mark, finding.what, finding.text) for finding in found] == [
        ("ok", "storage", "output.dir is shared"),
        ("ok", "versions", "versions are the same"),
        ("ok", "memory", "2.00 GiB of memory a worker, without activations, are there"),
        ("ok", "files", "data.sources is there"),
    ]


@pytest.mark.parametrize(
    ("differing", "message"),
    [
        ({"error": "no answer within 120 s"}, f"a node cannot be asked what it has for the run: {B}: no answer within"),
        ({"storage": {"output.dir": "is missing"}}, f"output.dir: /shared/run is missing on node {B}; wanted storage"),
        (
            {"versions": {"python": "3.11", "torch": "2.12.0"}},
            f"versions differ: torch 2.13.0 on a (10.0.0.1), this command and 2.12.0 on {B}; wanted the same",
        ),
        (
            {"memory": 1.5 * GIB},
            "cluster.num_workers: a worker needs 1.00 GiB for the weights alone, and there will be "
            f"2 on node {B} with 1.50 GiB free; use fewer",
        ),
        (
            {"lacking": {"data.sources": [f"/data/{i}" for i in range(5)]}},
            "data.sources: missing or of another size: /data/0, /data/1, /data/2 and 2 more on node "
            f"{B}; wanted the same files under the same paths on all nodes, as shared storage has them; Parquet and",
        ),
    ],
)
def test_each_problem_names_the_node_and_the_key(differing: dict[str, Any], message: str) -> None:
    (problem,) = problems_of(findings_of([report(), report(B, **differing)], NEED, here=report()["versions"]))
    assert problem.startswith(message) and "\n" not in problem


def test_all_problems_are_told_together() -> None:
    broken = report(B, storage={"output.dir": "is another folder"}, memory=0, lacking={"data.sources": ["/data/a"]})
    assert len(problems_of(findings_of([report(), broken, report("c", error="gone")], NEED))) == 4


def test_tight_memory_is_a_warning() -> None:
    found = findings_of([report(memory=5.1 * GIB), report(B)], NEED)
    (warning,) = [finding.text for finding in found if finding.mark == "warning"]
    assert "a worker needs 2.00 GiB without activations" in warning and "2 on node a (10.0.0.1) with 5.10" in warning
    assert not problems_of(found)


def test_an_interface_must_be_on_all_nodes() -> None:
    found = findings_of([report(), report(B, interfaces=["ens5", "lo"])], Need(interface="eth0"))
    assert problems_of(found) == [
        f"cluster.network_interface: wanted 'eth0' on all nodes, but node {B} has ens5, lo",
    ]


def test_nodes_that_do_not_reach_each_other() -> None:
    answers = [report(error=""), report(B, interface=None, error="connection refused")]
    (problem,) = problems_of([of_all_reduce(answers, None)])
    assert f"node {B} by no interface of that address: connection refused; open all ports" in problem
    assert "cluster.network_interface" in problem and "127.0.0.1" in problem and "10.0.0.1" not in problem
    assert of_all_reduce([report(error=""), report(error="")], None).text == "gloo adds up over 2 nodes"


def test_a_hub_model_must_be_had_and_whole() -> None:
    need = Need(hub_model=MODEL, hub_files={"config.json": 5, "model.safetensors": 100})
    whole = report(files={"config.json": 5, "model.safetensors": 100})
    assert of_hub_model([whole, whole], need).mark == "ok"
    (problem,) = problems_of([of_hub_model([whole, report(B, files={"config.json": 5})], need)])
    assert problem.startswith(f"model.name_or_path: some/model is not on node {B}: model.safetensors not whole there")
    (problem,) = problems_of([of_hub_model([whole, report(B, error="no network")], need)])
    assert problem.endswith(f"node {B}: no network")


@pytest.mark.parametrize(
    ("cpus", "workers", "per_worker", "given"),
    [([4, 4], 2, 2, [1, 1]), ([4, 2], 3, 2, [2, 1]), ([0.5, 4], 4, 1, [0, 4]), ([2, 2], 9, 0.6667, [2, 2])],
)
def test_workers_are_spread(cpus: list[float], workers: int, per_worker: float, given: list[int]) -> None:
    """`given`: how many workers come to each node."""
    assert shares(cpus, Need(workers=workers, cpus_per_worker=per_worker)) == given


@pytest.mark.parametrize(
    ("objective", "model"),
    [
        ("distill", {"num_key_value_layers": 2, "key_value_group_size": 2, "dtype": "bfloat16"}),
        ("sft", {}),
        ("sft", {"num_hidden_layers": 7}),
        ("sft", {"trainable": ["projector"], "dtype": "bfloat16"}),
        ("sft", {"trainable": ["swiftkv"], "dtype": "bfloat16"}),
    ],
)
def test_weights_are_counted_without_loading_them(
    teacher_folder: Callable[..., Path], tmp_path: Path, objective: str, model: dict[str, Any]
) -> None:
    """What a worker needs is the bytes of its weights, gradients and moments, and of what it rounds once it is read."""
    folder = teacher_folder(tie_word_embeddings=True)
    run = run_of(folder, tmp_path / "run", objective=objective, model={"name_or_path": str(folder)} | model)
    model_config = objective_of(run.config).configure(load_config(run.model_files), run.model_files, run.config)
    run = replace(run, parameters=parameter_counts(run.model_files, model_config))
    built = build_model(run)
    trained = sum(parameter.numel() for parameter in trainable_parameters(built).values())
    count = sum(parameter.numel() for parameter in built.parameters())
    assert sum(run.trained_parameters.values()) == trained
    assert sum(run.frozen_parameters.values()) == count - trained
    held = sum(parameter.numel() * parameter.element_size() for parameter in built.parameters())
    loading = held if objective_of(run.config).has_student else 4 * count
    need = need_of(run, [], Reserved(1, 1, 1, 1))
    assert (need.weight_bytes, need.worker_bytes) == (loading, max(loading, held + 12 * trained))


# --------------------------------------------------------------------------------------------------- what a node says
def test_storage_is_shared_if_the_same_can_be_read_and_it_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / "run" / "nonce"
    assert node.trouble_with(file, "1") == "is missing"
    file.parent.mkdir()
    assert node.trouble_with(file, "1") == "is another folder"
    file.write_text("2")
    assert node.trouble_with(file, "1") == "is another folder"
    file.write_text("1")
    assert node.trouble_with(file, "1") == "" and list(file.parent.iterdir()) == [file]
    assert node.trouble_with(file.parent, "1") == "cannot be read (Is a directory)"


def test_the_interface_that_carries_an_address() -> None:
    assert node.interface_of("127.0.0.1") == "lo"
    assert node.interface_of("203.0.113.1") is None


def test_the_code_of_this_package_is_a_version(tmp_path: Path) -> None:
    """Two nodes with one version number and another line of code differ; neither is imported for it."""
    package = tmp_path / "vlskv_ray"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "9.9"\nraise RuntimeError("imported")\n')
    code = f"from runpy import run_path; print(run_path({node.__file__!r})['versions']()['vlskv_ray'])"
    found = set()
    for text in ("a = 1", "a = 2", "a = 2"):
        (package / "more.py").write_text(text)
        found.add(subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True).stdout)
    assert len(found) == 2 and all(version.startswith("9.9 (code ") for version in found)


def test_a_model_that_cannot_be_had_is_told_not_raised(teacher_folder: Callable[..., Path]) -> None:
    folder = teacher_folder()
    found = node.fetch_model(str(folder), None)["files"]
    assert found["model.safetensors"] == (folder / "model.safetensors").stat().st_size and "config.json" in found
    assert "neither a folder nor to be had from the hub" in node.fetch_model("nobody/nothing", "0" * 40)["error"]


def test_a_node_that_reaches_no_other_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves no process group behind."""
    monkeypatch.setenv(node.INTERFACE, "lo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert node.all_reduce(0, 1, "127.0.0.1", port, None) == {"error": ""}
    monkeypatch.setattr(node, "REDUCE_SECONDS", 1)
    assert node.all_reduce(0, 2, "127.0.0.1", port, None)["error"]
    assert not torch.distributed.is_initialized()


# -------------------------------------------------------------------------------------------------------- real nodes
@pytest.mark.cluster
def test_memory_that_comes_free_in_a_moment_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a run that was killed just before; memory that does not is a problem."""
    account_of, asked = node.account, []
    frees = iter((0, 0, 2 * GIB, 0, 0, 0))

    def account(*_: Any) -> dict[str, Any]:
        asked.append(1)
        return account_of({}, "", {}) | {"memory": next(frees)}

    monkeypatch.setattr(preflight, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(node, "account", account)
    need = Need(workers=1, weight_bytes=GIB, worker_bytes=GIB)
    with ray_cluster("local") as cluster:
        (_, good), (_, bad) = preflight.examine(need, cluster), preflight.examine(need, cluster)
    assert not problems_of(good) and len(problems_of(bad)) == 1 and len(asked) == 6


@contextmanager
def blind_node(nodes: Any, environment: dict[str, str], hidden: Path) -> Iterator[None]:
    """A second node of its own view of the file system, in which `hidden` is an empty folder."""
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--address", nodes.address, "--num-cpus=2"]
    hide = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", hide, str(hidden), *start, "--block"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until(
                lambda: sum(one["Alive"] for one in nodes.global_state.node_table()) == 2,
                lambda: process.poll() is None,
            )
            yield
        finally:
            process.terminate()


def may_hide_folders() -> bool:
    hide = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(hide, capture_output=True).returncode == 0


@pytest.mark.cluster
def test_two_nodes_that_share_what_they_need(tmp_path: Path, teacher_folder: Callable[..., Path]) -> None:
    """A run on two nodes comes to its end, with a worker on each, whose gradients go by the address of their nodes."""
    small_run(tmp_path, teacher_folder(), epochs=30)
    with head_node() as (nodes, environment):
        import psutil  # comes with Ray

        second = nodes.add_node(num_cpus=2)
        process = Command("train", "--config", str(tmp_path / "run.yaml"), env=environment)
        process.wait_until(lambda: last_step(tmp_path / "runs" / "run") >= 2)
        workers = [psutil.Process(pid) for pid in worker_processes()]
        assert len(workers) == 2 and len({worker.ppid() for worker in workers}) == 2
        ends = [{(c.laddr, c.raddr) for c in worker.net_connections("tcp") if c.raddr} for worker in workers]
        between = {here for here, there in ends[0] if (there, here) in ends[1]}
        assert {end.ip.removeprefix("::ffff:") for end in between} == {second.node_ip_address}
        log = process.ended()
    assert "nodes         output.dir is shared; versions are the same; " in log
    assert "gloo adds up over 2 nodes\n" in log and not list(tmp_path.glob("runs/run/.preflight*"))


@pytest.mark.cluster
@pytest.mark.skipif(not may_hide_folders(), reason="making a mount namespace is not permitted")
def test_storage_that_a_node_does_not_see(tmp_path: Path, teacher_folder: Callable[..., Path]) -> None:
    """One clear line before any worker is started; nothing is left of the attempt."""
    small_run(tmp_path, teacher_folder())
    (tmp_path / "runs").mkdir()
    with head_node() as (nodes, environment), blind_node(nodes, environment, hidden=tmp_path / "runs"):
        log = Command("train", "--config", str(tmp_path / "run.yaml"), env=environment).ended(2)
        doctor = [sys.executable, "-m", "vlskv_ray.doctor", "--config", str(tmp_path / "run.yaml")]
        told = subprocess.run(doctor, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
        start = "from vlskv_ray.cluster import start\nwith start.ray_cluster(None): 1"
        other = f"import ray; ray.__version__ = '1.0'; {start}"
        refused = subprocess.run([sys.executable, "-c", other], env=environment, capture_output=True, text=True)
    assert told.returncode == 1 and told.stdout.endswith("\n1 problem\n"), told
    assert f"  problem  storage       output.dir: {tmp_path}/runs is another folder on node " in told.stdout
    assert len(re.findall(r"\n  warning  node .* token authentication off; whoever", told.stdout)) == 2
    assert "ValueError: cluster.address: the cluster at " in refused.stderr and "Ray: 1.0 Python:" in refused.stderr
    *_, before, problem = log.splitlines()
    assert problem.startswith(f"output.dir: {tmp_path}/runs/run is missing on node ")
    assert "wanted storage that all nodes share" in problem and before.startswith("cluster ")
    assert not list((tmp_path / "runs").iterdir())
