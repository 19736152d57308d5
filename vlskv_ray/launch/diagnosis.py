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
from vlskv_ray.config import Config, changed
from vlskv_ray.data.pipeline import Loader
from vlskv_ray.launch.prepare import prepare
from vlskv_ray.training.run import Run
from vlskv_ray.words import format_bytes, plural

PACKAGES = ("ray", "torch", "transformers", "datasets", "pillow", "pyarrow", "numpy")
LITTLE_SHARED_MEMORY = 512 * 2**20
LITTLE_DISK = 2**30
FEW_FILES = 4096
CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def examine_all(config: Config | None) -> int:
    """Prints what is found; the exit status. ValueError for a config with which no run would come to its workers."""
    output = Path(config.output.dir if config else "runs")
    found = [*print_findings("this machine", examine_machine(output)), *print_findings("versions", [judge_packages()])]
    run = loader = None
    if config is not None:
        run, loader = prepare(quieten(config))
        text = f"{config.model.name_or_path}: {run.total_steps} steps of {len(loader.plan.lengths)} samples"
        found += print_findings("run", [judge("config", f"model and data can be read, {text}")])
    if config is None or config.cluster.most_workers:
        found += examine_ray(run, loader)
    elif config.cluster.use_gpu and not torch.cuda.is_available():
        lacks_gpu = Finding("problem", "GPU", "cluster.use_gpu is set, and torch finds no GPU here")
        found += print_findings("GPUs", [lacks_gpu])
    problems = len(problems_of(found))
    print(plural(problems, "problem") if problems else "no problem was found")
    return FAILED if problems else DONE


def examine_ray(run: Run | None, loader: Loader | None) -> list[Finding]:
    """Starts or joins Ray and asks its nodes, for what a run needs of them where there is one."""
    found = print_findings("Ray", [])
    try:
        with ray_cluster(run.config.cluster.address if run else None) as cluster:
            where = f"joined a cluster of {cluster.cpus:g} CPUs" if cluster.joined else "starts on this machine"
            found += print_findings("", [judge("start", where), *examine_dashboard(cluster.joined)])
            need = Need()
            if run is not None and loader is not None:
                check_gpus(run.config.cluster, cluster.gpus)
                reserved = reserve(run.config.cluster, run.config.data, cluster.cpus, cluster.largest_node)
                share, _, crowded = describe(run.config, reserved, cluster).partition("\nwarning: ")
                cpus = Finding("warning", "CPUs", crowded) if crowded else judge("CPUs", share)
                found += print_findings("", [cpus])
                need = need_of(run, loader.sources, reserved)
            reports, of_nodes = examine(need, cluster)
        found += print_findings("nodes", [*map(node_line, reports), *of_nodes])
    except (ValueError, ConnectionError) as error:  # no such cluster, or too small a one
        found += print_findings("", [Finding("problem", "start", str(error))])
    return found


def quieten(config: Config) -> Config:
    return changed(config, {"output.level": "error"})


def print_findings(title: str, found: Sequence[Finding] | Iterator[Finding]) -> list[Finding]:
    """Prints a group of findings as they come."""
    if title:
        print(title)
    kept = []
    for finding in found:
        print(f"  {finding.mark:<8} {finding.what:<13} {finding.text}", flush=True)
        kept.append(finding)
    return kept


def judge(what: str, text: str, remedy: str = "") -> Finding:
    """A warning where there is something to do about it."""
    return Finding("warning" if remedy else "ok", what, f"{text}; {remedy}" if remedy else text)


def examine_machine(output: Path) -> Iterator[Finding]:
    """What of this machine matters to a run that writes below `output`."""
    yield judge_cpus(os.cpu_count() or 1, len(os.sched_getaffinity(0)), quota(CPU_QUOTA))
    total, free = memory(MEMINFO)
    yield judge("memory", f"{format_bytes(total)}, of which {format_bytes(free)} are free")
    shm = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    remedy = "Ray hands samples over there; give a container more, as with `docker run --shm-size=2g`"
    yield judge("/dev/shm", f"{format_bytes(shm)} free", remedy if shm < LITTLE_SHARED_MEMORY else "")
    disk = shutil.disk_usage(existing(output)).free
    remedy = "make room, or set output.dir to a folder on another disk"
    yield judge("disk", f"{format_bytes(disk)} free for {output}", remedy if disk < LITTLE_DISK else "")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # up to which Ray raises its own
    most = sys.maxsize if most == resource.RLIM_INFINITY else most
    remedy = "Ray may run out of them; raise it with `ulimit -n 65536`"
    yield judge("open files", f"at most {most:,}" if most < sys.maxsize else "no limit", remedy * (most < FEW_FILES))
    yield judge_bfloat16(CPUINFO.read_text())
    threads = os.environ.get("OMP_NUM_THREADS")
    yield judge("threads", f"OMP_NUM_THREADS is {threads or 'not set'}; cluster.threads_per_worker decides")


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


def judge_cpus(there: int, allowed: int, most: float) -> Finding:
    """`allowed` by affinity; `most` as `quota` has it."""
    usable = min(allowed, most)
    remedy = f"Ray counts all {there}; start it with `ray start --head --num-cpus={max(1, int(usable))}`"
    return judge("CPUs", f"{there}, of which {usable:g} can be used", remedy if usable < there else "")


def judge_bfloat16(cpuinfo: str) -> Finding:
    """What speaks for model.dtype=bfloat16, by what Linux says of a CPU."""
    flags = set(cpuinfo.replace(":", " ").split())
    units = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512", "bf16": "ARM"}
    name = next((units[flag] for flag in units if flag in flags), None)
    if name is None:
        return judge("bfloat16", "no units for it: it halves memory and takes longer than float32")
    return judge("bfloat16", f"{name} units: model.dtype=auto measures whether it is faster than float32")


def judge_packages() -> Finding:
    return judge("packages", "  ".join(f"{name} {version(name)}" for name in PACKAGES))


def examine_dashboard(joined: bool) -> Iterator[Finding]:
    """Whether the dashboard, which takes jobs, can be reached from outside."""
    import ray

    url = ray._private.worker.get_dashboard_url() if joined else None
    host = urlsplit(f"//{url}").hostname if url else None
    remedy = "whoever reaches it can run code; start Ray with --dashboard-host=127.0.0.1 and use a tunnel"
    at = f"at {url}" if host else "none"
    yield judge("dashboard", at, remedy if host and not (host == "localhost" or host.startswith("127.")) else "")


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
    return judge("node", text, "" if report["token"] else remedy)
