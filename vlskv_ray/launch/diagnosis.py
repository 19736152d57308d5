"""Whether a run would start here, and what is in its way if not."""

import math
import os
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import torch

from vlskv_ray.cluster.findings import Finding, Need, Report, problems_of
from vlskv_ray.cluster.preflight import examine, existing, need_of
from vlskv_ray.cluster.shares import check_gpus, describe, reserve
from vlskv_ray.cluster.start import ray_cluster
from vlskv_ray.command import DONE, FAILED
from vlskv_ray.config import Config, changed, load_config_and_notices
from vlskv_ray.launch.prepare import prepare
from vlskv_ray.words import format_bytes

PACKAGES = ("ray", "torch", "transformers", "datasets", "pillow", "pyarrow", "numpy")


LITTLE_SHARED_MEMORY = 512 * 2**20


LITTLE_DISK = 2**30


FEW_FILES = 4096


CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")


CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def examine_all(file: str | None, overrides: list[str]) -> int:
    """Prints what is found; the exit status. ValueError for a config with which no run would come to its workers."""
    config = load_config_and_notices(file, overrides)[0] if file else None
    found = [*told("this machine", machine(Path(config.output.dir if config else "runs")))]
    found += told("versions", [packages()])
    run = None
    if config is not None:
        run, loader = prepare(quiet(config))
        text = f"{config.model.name_or_path}: {run.total_steps} steps of {len(loader.plan.lengths)} samples"
        found += told("run", [judged("config", f"model and data can be read, {text}")])
    if config is None or config.cluster.most_workers:
        told("Ray", [])
        try:
            with ray_cluster(config.cluster.address if config else None) as cluster:
                where = f"joined a cluster of {cluster.cpus:g} CPUs" if cluster.joined else "starts on this machine"
                found += told("", [judged("start", where), *dashboard(cluster.joined)])
                need = Need()
                if run is not None:
                    check_gpus(run.config.cluster, cluster.gpus)
                    reserved = reserve(run.config.cluster, run.config.data, cluster.cpus, cluster.largest_node)
                    share, _, crowded = describe(run.config, reserved, cluster).partition("\nwarning: ")
                    found += told("", [Finding("warning", "CPUs", crowded) if crowded else judged("CPUs", share)])
                    need = need_of(run, loader.sources, reserved)
                reports, of_nodes = examine(need, cluster)
            found += told("nodes", [*map(node_line, reports), *of_nodes])
        except (ValueError, ConnectionError) as error:  # no such cluster, or too small a one
            found += told("", [Finding("problem", "start", str(error))])
    elif config.cluster.use_gpu and not torch.cuda.is_available():
        found += told("GPUs", [Finding("problem", "GPU", "cluster.use_gpu is set, and torch finds no GPU here")])
    problems = len(problems_of(found))
    print(f"{problems} problem{'s' * (problems > 1)}" if problems else "no problem was found")
    return FAILED if problems else DONE


def quiet(config: Config) -> Config:
    return changed(config, {"output.level": "error"})


def told(title: str, found: Sequence[Finding] | Iterator[Finding]) -> list[Finding]:
    """Prints a group of findings as they come."""
    if title:
        print(title)
    kept = []
    for finding in found:
        print(f"  {finding.mark:<8} {finding.what:<13} {finding.text}", flush=True)
        kept.append(finding)
    return kept


def judged(what: str, text: str, remedy: str = "") -> Finding:
    """A warning where there is something to do about it."""
    return Finding("warning" if remedy else "ok", what, f"{text}; {remedy}" if remedy else text)


def machine(output: Path) -> Iterator[Finding]:
    """What of this machine matters to a run that writes below `output`."""
    yield of_cpus(os.cpu_count() or 1, len(os.sched_getaffinity(0)), quota(CPU_QUOTA))
    total, free = memory(MEMINFO)
    yield judged("memory", f"{format_bytes(total)}, of which {format_bytes(free)} are free")
    shm = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    remedy = "Ray hands samples over there; give a container more, as with `docker run --shm-size=2g`"
    yield judged("/dev/shm", f"{format_bytes(shm)} free", remedy if shm < LITTLE_SHARED_MEMORY else "")
    disk = shutil.disk_usage(existing(output)).free
    remedy = "make room, or set output.dir to a folder on another disk"
    yield judged("disk", f"{format_bytes(disk)} free for {output}", remedy if disk < LITTLE_DISK else "")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # up to which Ray raises its own
    most = sys.maxsize if most == resource.RLIM_INFINITY else most
    remedy = "Ray may run out of them; raise it with `ulimit -n 65536`"
    yield judged("open files", f"at most {most:,}" if most < sys.maxsize else "no limit", remedy * (most < FEW_FILES))
    yield of_bfloat16(CPUINFO.read_text())
    threads = os.environ.get("OMP_NUM_THREADS")
    yield judged("threads", f"OMP_NUM_THREADS is {threads or 'not set'}; cluster.threads_per_worker decides")


def memory(file: Path) -> tuple[int, int]:
    """Bytes that there are and that are free, by what Linux says; limits of a container are told with the nodes."""
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in file.read_text().splitlines()}
    return 1024 * kilobytes["MemTotal"], 1024 * kilobytes["MemAvailable"]


def quota(file: Path) -> float:
    """CPUs that a container may use at once, infinity where that is not limited."""
    try:
        most, period = file.read_text().split()
        return math.inf if most == "max" else int(most) / int(period)
    except (OSError, ValueError):
        return math.inf


def of_cpus(there: int, allowed: int, most: float) -> Finding:
    """`allowed` by affinity; `most` as `quota` has it."""
    usable = min(allowed, most)
    remedy = f"Ray counts all {there}; start it with `ray start --head --num-cpus={max(1, int(usable))}`"
    return judged("CPUs", f"{there}, of which {usable:g} can be used", remedy if usable < there else "")


def of_bfloat16(cpuinfo: str) -> Finding:
    """What speaks for model.dtype=bfloat16, by what Linux says of a CPU."""
    flags = set(cpuinfo.replace(":", " ").split())
    units = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512", "bf16": "ARM"}
    name = next((units[flag] for flag in units if flag in flags), None)
    if name is None:
        return judged("bfloat16", "no units for it: it halves memory and takes longer than float32")
    return judged("bfloat16", f"{name} units: model.dtype=auto measures whether it is faster than float32")


def packages() -> Finding:
    return judged("packages", "  ".join(f"{name} {version(name)}" for name in PACKAGES))


def dashboard(joined: bool) -> Iterator[Finding]:
    """Whether the dashboard, which takes jobs, can be reached from outside."""
    import ray

    url = ray._private.worker.get_dashboard_url() if joined else None
    host = urlsplit(f"//{url}").hostname if url else None
    remedy = "whoever reaches it can run code; start Ray with --dashboard-host=127.0.0.1 and use a tunnel"
    at = f"at {url}" if host else "none"
    yield judged("dashboard", at, remedy if host and not (host == "localhost" or host.startswith("127.")) else "")


def node_line(report: Report) -> Finding:
    """A node in one line; what is wrong with it is told beside."""
    if "error" in report:
        return Finding("problem", "node", f"{report['name']}: {report['error']}")
    text = (
        f"{report['name']}: {report['cpus']:g} CPUs, {format_bytes(report['memory'])} of memory and "
        f"{format_bytes(report['shm'] or 0)} of /dev/shm free, network {report['interface'] or 'unknown'}, "
        f"token authentication {'on' if report['token'] else 'off'}"
    )
    remedy = "whoever reaches its ports can run code; set RAY_AUTH_MODE=token before `ray start` on every machine"
    return judged("node", text, "" if report["token"] else remedy)
