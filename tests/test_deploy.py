"""The files of deploy/ hold no unknown field, keep what docs/clusters.md promises, and name what exists."""

import copy
import importlib.util
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from waiting import HANG_SECONDS, wait_until

from vlskv_ray import __version__
from vlskv_ray.cluster.shares import reserve
from vlskv_ray.config import load_config
from vlskv_ray.training.run import Run

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
SCHEMAS = yaml.safe_load((ROOT / "tests" / "schemas" / "kubernetes.yaml").read_text())
CLAIM, POLICY, JOB = DOCUMENTS = list(yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text()))
HEAD = JOB["spec"]["rayClusterSpec"]["headGroupSpec"]
GROUPS = [HEAD, *JOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
CONTAINERS = [container for group in GROUPS for container in group["template"]["spec"]["containers"]]
RAY = Path(next(iter(importlib.util.find_spec("ray").submodule_search_locations)))  # not imported
BYTES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


# ----------------------------------------------------------------------------------------------------------- schemas
def strict(schema: Any) -> Any:
    """Every field that a schema does not name is an error, except where it says that it does not know them all."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
    return schema


def problems(document: Any, schema: Any) -> list[str]:
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


def schema_of(document: dict[str, Any]) -> Any:
    return {"$ref": f"#/$defs/{document['kind']}", "$defs": strict(SCHEMAS["$defs"])}


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key in a document, but not of maps whose keys are free."""
    free = ("labels", "matchLabels", "requests", "limits", "rayStartParams")
    if isinstance(node, dict) and not (path and path[-1] in free):
        for key, value in node.items():
            yield (*path, key)
            yield from places(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from places(value, (*path, index))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
def test_kubernetes_documents_are_of_their_schemas(document: dict[str, Any]) -> None:
    assert problems(document, schema_of(document)) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
def test_each_key_misspelt_is_an_error(document: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(schema_of(document))
    paths = list(places(document))
    for path in paths:
        wrong = node = copy.deepcopy(document)
        for part in path[:-1]:
            node = node[part]
        node[f"{path[-1]}x"] = node.pop(path[-1])
        assert not validator.is_valid(wrong), path
    assert len(paths) > 5


@pytest.mark.skipif("RAYJOB_CRD" not in os.environ, reason="see tests/schemas/kubernetes.yaml")
def test_rayjob_is_of_the_crd_of_a_cluster() -> None:
    crd = yaml.load(Path(os.environ["RAYJOB_CRD"]).read_text(), Loader=yaml.CSafeLoader)
    (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {}  # the API server's own
    assert problems(JOB, schema) == []


def test_cluster_file_is_of_rays_own_schema() -> None:
    schema = json.loads((RAY / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    assert problems(cluster, schema) == []
    assert problems(cluster | {"file_mount": {}}, schema)
    # what Ray itself asks of a local provider, see `prepare_manual`
    assert {"head_ip", "worker_ips"} <= cluster["provider"].keys()
    assert not {"head_node", "worker_nodes", "available_node_types"} & cluster.keys()


def test_runtime_env_holds_variables_and_nothing_to_install() -> None:
    runtime_env = yaml.safe_load((DEPLOY / "runtime_env.yaml").read_text())
    assert runtime_env.keys() == {"env_vars"}
    assert all(isinstance(value, str) for value in runtime_env["env_vars"].values())
    assert "GLOO_SOCKET_IFNAME" not in runtime_env["env_vars"]  # one name for all machines, none is needed
    assert yaml.safe_load(JOB["spec"]["runtimeEnvYAML"]) == runtime_env


# ---------------------------------------------------------------------------------------------------- what is promised
def size(quantity: str) -> int:
    return int(quantity[:-2]) * BYTES[quantity[-2:]]


def run_of(command: str) -> Any:
    """The config of a train command, whose module, config file and overrides must exist."""
    python, m, module, option, path, *overrides = shlex.split(command)
    assert (python, m, option) == ("python", "-m", "--config")
    assert importlib.util.find_spec(module) is not None
    return load_config(ROOT / path, overrides)


def test_job_trains_onto_the_shared_volume() -> None:
    config = run_of(JOB["spec"]["entrypoint"])
    folder = Path(config.output.dir) / config.output.name
    (mount,) = [mount for mount in CONTAINERS[0]["volumeMounts"] if mount["name"] == "shared"]
    assert folder.is_relative_to(mount["mountPath"])
    assert {"name": "RUN_FOLDER", "value": str(folder)} in CONTAINERS[0]["env"]


def test_workers_and_data_tasks_fit_on_the_pods_that_there_are() -> None:
    config = run_of(JOB["spec"]["entrypoint"])
    (workers,) = GROUPS[1:]
    assert workers["minReplicas"] == workers["replicas"] == workers["maxReplicas"] == config.cluster.num_workers
    cpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    reserved = reserve(config.cluster, config.data, cpus * workers["replicas"], cpus)
    assert reserved.cpus_per_worker == cpus / 2
    assert reserved.num_tasks == cpus


def test_head_does_no_training_work() -> None:
    assert HEAD["rayStartParams"]["num-cpus"] == "0"
    assert "num-cpus" not in GROUPS[1]["rayStartParams"]


@pytest.mark.parametrize("group", GROUPS, ids=["head", "workers"])
def test_pods_are_guaranteed_share_storage_and_are_not_root(group: dict[str, Any]) -> None:
    pod = group["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    for container in pod["containers"]:
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert resources["limits"].keys() == {"cpu", "memory"}
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["image"].endswith(f":{__version__}")
        shm = size(volumes["shm"]["emptyDir"]["sizeLimit"])
        assert int(group["rayStartParams"]["object-store-memory"]) < shm < size(resources["limits"]["memory"])
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]


def test_strangers_are_kept_out() -> None:
    """Ray asks for a token, and the dashboard's port is open to the operator and to the pods of the run only."""
    assert JOB["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert HEAD["serviceType"] == "ClusterIP"
    ours = {"matchLabels": HEAD["template"]["metadata"]["labels"]}
    assert POLICY["spec"]["podSelector"] == ours
    assert all(group["template"]["metadata"]["labels"] == ours["matchLabels"] for group in GROUPS)
    assert set(POLICY["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    pods, operator = POLICY["spec"]["ingress"]
    assert pods == {"from": [{"podSelector": ours}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    (peer,) = operator["from"]
    assert peer.keys() == {"namespaceSelector", "podSelector"}  # both: one alone would let in whole namespaces
    assert {port["port"] for rule in POLICY["spec"]["egress"][1:] for port in rule["ports"]} == {53}


def test_a_failed_or_evicted_job_goes_on() -> None:
    spec = JOB["spec"]
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"] and spec["submissionMode"] == "HTTPMode"
    stop_wait = int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    for group, container in zip(GROUPS, CONTAINERS, strict=True):
        *shell, script = container["lifecycle"]["preStop"]["exec"]["command"]
        assert shell == ["bash", "-c"]
        subprocess.run(["bash", "-n", "-c", script], check=True)
        (waits,) = re.findall(r"\$SECONDS -lt (\d+)", script)
        assert stop_wait <= int(waits) < group["template"]["spec"]["terminationGracePeriodSeconds"]
    run = Run.__new__(Run)
    object.__setattr__(run, "folder", Path("$RUN_FOLDER"))
    assert f'touch "{run.stop_file}"' in CONTAINERS[0]["lifecycle"]["preStop"]["exec"]["command"][-1]


def test_options_of_ray_start_exist() -> None:
    options = set(re.findall(r'"--([\w-]+)"', (RAY / "scripts" / "scripts.py").read_text()))
    given = {name for group in GROUPS for name in group["rayStartParams"]}
    cluster = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    for command in cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]:
        given |= set(re.findall(r"--([\w-]+)", command))
    assert "port" in given and given <= options


def test_clusters_on_own_machines_ask_for_a_token_and_show_no_dashboard() -> None:
    cluster = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in starts[0]
    for text in (starts[0], (DEPLOY / "slurm.sh").read_text()):
        assert "0.0.0.0" not in text
        (port,) = re.findall(r"--port=(\d+)|HEAD_IP:(\d+)", text)
        assert not 10002 <= int("".join(port)) <= 19999
    ignored = {line for line in (ROOT / ".rayignore").read_text().splitlines() if not line.startswith("#")}
    assert set(cluster["rsync_exclude"]) == ignored


# --------------------------------------------------------------------------------------------------------- Dockerfile
def test_image_is_of_the_pinned_versions_and_not_root() -> None:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    by_name = {name: [rest for other, rest in lines if other == name] for name, _ in lines}
    (base,) = by_name["FROM"]
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", base)
    assert "latest" not in text and not by_name.keys() & {"ADD", "EXPOSE"}
    assert by_name["USER"] == ["1000"] and lines[-2][0] == "USER"
    assert {group["template"]["spec"]["securityContext"]["runAsUser"] for group in GROUPS} == {1000}
    assert all("--no-cache-dir" in command for command in by_name["RUN"] if "pip install" in command)
    project = (ROOT / "pyproject.toml").read_text()
    (torch,) = re.findall(r'"(torch==[\d.]+)"', project)
    assert f"--index-url https://download.pytorch.org/whl/cpu {torch}+cpu" in text
    ray = JOB["spec"]["rayClusterSpec"]["rayVersion"]
    assert f">={'.'.join(ray.split('.')[:2])}," in project
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for copy in by_name["COPY"] for source in copy.split()[:-1]}
    assert copied == kept and all((ROOT / source).exists() for source in copied)
    assert {container["workingDir"] for container in CONTAINERS} == set(by_name["WORKDIR"])


# -------------------------------------------------------------------------------------------------------------- Slurm
@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder whose .venv/bin has stand-ins: srun and ray run what they are given, the driver waits for SIGTERM."""
    commands = {
        "srun": 'while [ "$1" != ray ]; do shift; done; exec "$@"',
        "ray": 'echo "$@" > ray.txt; while [ "$1" != -- ]; do shift; done; shift; "$@"',
        "scontrol": 'echo "$@" > scontrol.txt',
        "python": f"""[ "$1" != -c ] || exec {sys.executable} "$@"
            trap "exit 143" TERM; echo "$@" > driver.txt
            i=0; while [ $i -lt ${{STEPS:-100}} ]; do sleep 0.1; i=$((i+1)); done""",
    }
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, script in commands.items():
        path = tmp_path / ".venv" / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return tmp_path


def slurm(machine: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "4"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = kept | slurm | {"HOME": str(machine), "HEAD_IP": "192.0.2.1", "TMPDIR": str(machine)} | environment
    return subprocess.Popen(
        ["bash", str(DEPLOY / "slurm.sh"), *arguments], cwd=machine, env=environment, start_new_session=True
    )


def wait_for(path: Path) -> None:
    wait_until(lambda: path.exists() and path.read_text(), why=lambda: f"{path} did not come")


def test_slurm_script_is_a_script() -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / "slurm.sh")], check=True)
    assert os.access(DEPLOY / "slurm.sh", os.X_OK)


def test_slurm_before_the_time_limit_the_driver_is_told_to_save_and_the_job_is_requeued(machine: Path) -> None:
    job = slurm(machine)
    wait_for(machine / "driver.txt")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(HANG_SECONDS) == 143
    assert (machine / "scontrol.txt").read_text() == "requeue 7\n"
    assert "--address 192.0.2.1:6379 --min-nodes 2 --num-cpus=4 -- " in (machine / "ray.txt").read_text()
    run_of(f"python {(machine / 'driver.txt').read_text()}")
    token = machine / ".ray" / "auth_token"
    assert len(token.read_text()) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


def test_slurm_asked_to_stop_it_does_not_requeue(machine: Path) -> None:
    job = slurm(machine)
    wait_for(machine / "driver.txt")
    job.send_signal(signal.SIGTERM)
    assert job.wait(HANG_SECONDS) == 143
    assert not (machine / "scontrol.txt").exists()


def test_slurm_passes_arguments_and_leaves_a_token_as_it_is(machine: Path) -> None:
    (machine / "token").write_text("mine")
    job = slurm(machine, "--config", "my own.yaml", STEPS="0", RAY_AUTH_TOKEN_PATH=str(machine / "token"))
    assert job.wait(HANG_SECONDS) == 0
    assert (machine / "driver.txt").read_text() == "-m vlskv_ray.train --config my own.yaml\n"
    assert (machine / "token").read_text() == "mine" and not (machine / ".ray").exists()


# ----------------------------------------------------------------------------------------------------------- the page
def test_page_names_what_exists() -> None:
    page = (ROOT / "docs" / "clusters.md").read_text()
    assert len(page.splitlines()) < 180  # with what README had of clusters
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page):
        assert (ROOT / "docs" / target).exists(), target
    for path in re.findall(r"\b(?:deploy|configs)/[\w.-]+\w", page):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ([\w.]+)", page):
        assert importlib.util.find_spec(module) is not None, module
    for override in re.findall(r"\b([a-z_]+\.[a-z_]+=[\w/.]+)", page):
        load_config(ROOT / "configs" / "quickstart.yaml", [override])
