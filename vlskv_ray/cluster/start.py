"""Starting or joining Ray, what of it a run may reserve, and one live line instead of its noise."""

import json
import math
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from vlskv_ray.config import ClusterConfig, Config, DataConfig
from vlskv_ray.words import printable_lines

ENVIRONMENT = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "killed by `ray.kill`",  # so data workers end where a run stops early
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead worker is noticed
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Read by Ray when it is imported and when it starts, so set before; what the user has set stays."""
LONGEST_SOCKET = 107
"""Bytes that the path of a socket has at most."""
TOKEN = "~/.ray/auth_token"
"""Where Ray keeps a user's token."""


@dataclass(frozen=True)
class Reserved:
    """Logical CPUs and threads of a run; a logical CPU is a ticket to run, not a core."""

    cpus_per_worker: float
    cpus_per_task: float
    num_tasks: int
    threads_per_worker: int


@dataclass(frozen=True)
class Cluster:
    """The cluster a run is on."""

    cpus: float
    joined: bool
    """It was there before; otherwise it was started for this run, on this machine."""
    largest_node: float = 0.0
    """Its CPUs."""
    gpus: float = 0.0


@contextmanager
def ray_cluster(address: str | None, quiet: bool = True) -> Iterator[Cluster]:
    """Joins the Ray cluster there is, else starts one on this machine; leaves or ends it again.

    Args:
        address: None: that of RAY_ADDRESS, or of a `ray start` on this machine, else a new one. "local": always a new
            one. Anything else is joined. A process that has called `ray.init()` itself stays in that cluster.
        quiet: show nothing of what Ray and the workers print.

    Raises:
        ValueError: a cluster that was asked for cannot be reached, has other versions, or does not let this user in.
    """
    had_token = has_token()
    if "ray" not in sys.modules:  # what it has read already must not change under it
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if had_token:  # who has none makes one for a cluster that is started, and may still join one that is open
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray
    from ray._common.utils import get_default_system_temp_dir, get_ray_address_file
    from ray.exceptions import AuthenticationError

    if ray.is_initialized():
        yield _cluster(joined=True)
        return
    level = "ERROR" if quiet else "INFO"
    options: dict[str, Any] = {
        "logging_level": level,
        "logging_config": ray.LoggingConfig(log_level=level),
        "log_to_driver": not quiet,
    }
    asked_for = address or os.environ.get("RAY_ADDRESS")
    # "auto" would join any Ray of this machine, that of another run too, and end with it
    wanted = asked_for or left_by_ray_start(Path(get_ray_address_file(None))) or "local"
    try:
        if wanted != "local":
            ray.init(address=wanted, **options)
    except (ConnectionError, AuthenticationError) as error:
        if asked_for:
            reason = str(error).partition(". ")[0]
            raise ValueError(
                f"cluster.address: no Ray cluster answers at {wanted!r} ({reason}); start one with `ray start --head`, "
                f"name the file of its token with RAY_AUTH_TOKEN_PATH if it wants one, or use cluster.address=local"
            ) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise ValueError(
            f"cluster.address: the cluster at {wanted!r} has another Ray or Python: {' '.join(str(error).split())}; "
            f"install the same on all machines, or use cluster.address=local"
        ) from error
    joined = ray.is_initialized()
    short = None if joined else short_folder(Path(get_default_system_temp_dir()))
    if not joined:
        if short:
            options |= {"_temp_dir": short, "object_spilling_directory": get_default_system_temp_dir()}
        ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, **options)
        if not had_token:  # Ray has made one just now, for everybody to read
            with suppress(OSError):
                os.chmod(os.path.expanduser(TOKEN), 0o600)
    try:
        yield _cluster(joined)
    finally:
        ray.shutdown()
        if short:
            shutil.rmtree(short, ignore_errors=True)


def has_token() -> bool:
    """Whether this user has a token for Ray clusters, in one of the places where Ray looks for it."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or os.path.exists(os.path.expanduser(TOKEN))


def left_by_ray_start(file: Path) -> str | None:
    """The address that `ray start` wrote, unless its cluster is gone, for which Ray would wait minutes, or the file is
    another user's, whose cluster would be shown this user's token."""
    try:
        if os.lstat(file).st_uid not in (0, os.geteuid()):
            return None
        address = file.read_text().strip()
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError):
        return None
    return address


def short_folder(temporary: Path) -> str | None:
    """A folder for Ray's sockets, where their paths would be too long below the one for temporary files; ValueError
    where none can be made."""
    # as Ray calls them, see ray/_private/node.py
    below = f"ray/session_2000-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    length = len(os.fsencode(temporary / below))
    if length <= LONGEST_SOCKET:
        return None
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    why = (
        f"{name}: {temporary} has {len(os.fsencode(temporary))} bytes, so that paths of Ray's sockets below it would "
        f"have {length}, and {LONGEST_SOCKET} at most can be"
    )
    try:
        short = tempfile.mkdtemp(prefix="vlskv_ray-", dir="/tmp")
    except OSError as error:
        raise ValueError(f"{why}; set RAY_TMPDIR to a shorter one (/tmp: {error.strerror})") from None
    print(f"warning: {why}; Ray uses {short} meanwhile, set RAY_TMPDIR to choose another", file=sys.stderr)
    return short


def _cluster(joined: bool) -> Cluster:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = ([float(resources.get(kind, 0)) for resources in nodes] for kind in ("CPU", "GPU"))
    return Cluster(sum(cpus), joined, max(cpus, default=0.0), sum(gpus))


def free_what_the_dead_reserved() -> None:
    """Gives back what processes of this job have reserved that are dead: Ray keeps it for as long as the job lasts, and
    who comes next would wait for it."""
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for group, state in _groups_of_this_job():
        by_an_actor = group.creator_actor_id.strip(b"\xff") != b""  # else by the driver, which is alive
        if by_an_actor and group.creator_actor_dead and state != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def asks_in_vain() -> bool:
    """Whether something that this job has asked Ray to reserve is not there yet."""
    return any(state == "PENDING" for _, state in _groups_of_this_job())


def _groups_of_this_job() -> Iterator[tuple[Any, str]]:
    """Its placement groups, as Ray has them, and the states that they are in."""
    import ray
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    job = ray.get_runtime_context().get_job_id()
    # the public table does not tell who made a group
    for entry in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(entry)
        if group.creator_job_id.hex() == job:
            yield group, PlacementGroupTableData.PlacementGroupState.Name(group.state)


def reserve(cluster: ClusterConfig, data: DataConfig, cpus: float, largest_node: float = 0.0) -> Reserved:
    """How a cluster of so many CPUs is shared out between training and data, where the config leaves it open.

    Workers take half of it and data tasks the rest. Ray starts no data task for which no CPU is free, and the workers
    would wait for it forever, so that is refused. Where the number of workers follows the cluster, Ray puts as many on
    each node as fit there: they are given so much that something is left for data on whatever nodes there are.
    """
    workers, elastic = max(cluster.most_workers, 1), cluster.fewest_workers < cluster.most_workers
    per_worker, per_task = cluster.cpus_per_worker, data.cpus_per_task
    if elastic:
        node = largest_node or cpus
        on_a_node = max(1, math.ceil(workers * node / cpus))
        per_worker = per_worker or math.floor(1e4 * node / (on_a_node + 0.5)) / 1e4
        workers = min(workers, int(cpus // per_worker)) or 1  # as many as there are at first
        left = node - node // per_worker * per_worker  # on one node, which may be all that there will be
        per_task = per_task or max(0.1, min(1.0, math.floor(1e4 * left) / 1e4))
    if per_worker is None:
        most = 1.0 if cluster.use_gpu else largest_node or cpus  # a GPU needs no more than one to be driven
        share = min(cpus / 2 / workers, most)  # a worker is on one node
        per_worker = float(math.floor(share)) if share >= 1 else math.floor(share * 1e4) / 1e4  # whole above 1
    per_task = per_task or (1.0 if cpus - workers * per_worker >= 2 else 0.5)
    if workers * per_worker + per_task > cpus + 1e-6:
        raise ValueError(
            f"cluster.num_workers: {workers} workers of {per_worker:g} CPUs and one data task of {per_task:g} need "
            f"{workers * per_worker + per_task:g} CPUs, the cluster has {cpus:g}, so no data would ever come; "
            f"lower cluster.cpus_per_worker, data.cpus_per_task or cluster.num_workers"
        )
    for key, share in (("cluster.cpus_per_worker", per_worker), ("data.cpus_per_task", per_task)):
        if share > (largest_node or cpus) + 1e-6:
            raise ValueError(
                f"{key}: {share:g}, but no machine of the cluster has more than {largest_node:g}; lower it"
            )
    tasks = data.num_proc or max(1, int((cpus - workers * per_worker + 1e-6) / per_task))
    return Reserved(per_worker, per_task, tasks, threads_of(cluster, cpus))


def threads_of(cluster: ClusterConfig, cpus: float) -> int:
    """Of each worker; all CPUs shared out where the config leaves it open and they are what computes."""
    return cluster.threads_per_worker or max(1, 0 if cluster.use_gpu else int(cpus // max(cluster.most_workers, 1)))


def check_gpus(cluster: ClusterConfig, gpus: float) -> None:
    """ValueError where there are too few, for which Ray would wait forever."""
    workers = max(cluster.fewest_workers, 1)
    if cluster.use_gpu and workers > gpus:
        fewer = "lower cluster.num_workers, or " if gpus >= 1 else ""
        raise ValueError(
            f"cluster.use_gpu: wanted a GPU for each worker, {workers} in all, the cluster has {gpus:g}; "
            f"{fewer}use cluster.use_gpu=false to compute on CPUs"
        )


class Follower:
    """What is added to a file of lines, from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset, self.partial = path.stat().st_size if path.exists() else 0, ""
        self.taken_back = False
        """The file was shorter than before when it was looked at last, and is read from its start again."""

    def new_lines(self) -> list[str]:
        """Whole lines that have not been seen."""
        size = self.path.stat().st_size if self.path.exists() else 0
        self.taken_back = size < self.offset
        if self.taken_back:
            self.offset, self.partial = 0, ""
        if size == self.offset:
            return []
        with open(self.path) as file:
            file.seek(self.offset)
            *lines, self.partial = (self.partial + file.read()).split("\n")
            self.offset = file.tell()
        return lines


class ProgressLine:
    """Follows what a run adds to metrics.jsonl: one line redrawn on a terminal, plain lines now and then elsewhere."""

    def __init__(
        self,
        metrics: Path,
        total_steps: int,
        shown: bool = True,
        out: TextIO | None = None,
        afterwards: str = "",
        on_metrics: Callable[[dict[str, Any]], None] | None = None,
        notes: Path | None = None,
    ) -> None:
        self.total_steps, self.shown, self.afterwards, self.on_metrics = total_steps, shown, afterwards, on_metrics
        self.out = out or sys.stdout
        self.live = self.out.isatty()
        self.metrics, self.warnings = Follower(metrics), Follower(metrics.with_name("warnings.jsonl"))
        self.notes = Follower(notes) if notes else None
        self.waits = False
        """No step was made since a note told that workers wait to be started."""
        self.began, self.printed_at = time.monotonic(), -math.inf
        self.seconds: deque[float] = deque(maxlen=100)
        self.latest: dict[str, Any] = {}

    def update(self) -> None:
        """Reads what is new, tells it and shows the latest step."""
        warned = [printable_lines(f"warning: {json.loads(line)['warning']}") for line in self.warnings.new_lines()]
        notes = self.notes.new_lines() if self.notes else []
        for text in warned + notes:
            self._write(text, lasting=True) if self.shown else print(text, file=sys.stderr)
        lines = self.metrics.new_lines()
        self.waits = not lines and (self.waits or bool(notes))
        for line in lines if self.on_metrics else ():
            self.on_metrics(json.loads(line))  # type: ignore[misc]
        if not self.shown:
            return
        if self.metrics.taken_back:  # by new workers, which go on from their checkpoint
            self._write("a worker was lost; all were started again from the newest checkpoint", lasting=True)
        if not lines:
            if self.live and not self.latest:
                self._write(f"starting {duration(time.monotonic() - self.began)}")
            return
        for line in lines:
            self.latest |= json.loads(line)  # a step may have samples of one modality only: show the other's last
            self.seconds.append(self.latest["step_seconds"])
        is_last = self.latest["step"] >= self.total_steps
        if self.live or is_last or time.monotonic() - self.printed_at >= 10:
            self._write(self.text(), lasting=is_last)
            self.printed_at = time.monotonic()
        if is_last and self.afterwards:
            self._write(self.afterwards, lasting=True)
            self.afterwards = ""

    def text(self) -> str:
        """The latest step in one line."""
        m = self.latest
        parts = [f"step {m['step']}/{self.total_steps}"]
        means = {"loss": "loss", "kl_vision": "image", "kl_text": "text", "ce_vision": "image", "ce_text": "text"}
        parts += [f"{label} {m[key]:.4g}" for key, label in means.items() if key in m]
        shares = {"top1_agreement": "agree", "token_accuracy": "right"}
        parts += [f"{label} {m[key]:.0%}" for key, label in shares.items() if key in m]
        parts += [f"{m['tokens_per_second']:,.0f} tok/s"]
        if len(self.seconds) > 1:
            parts.append(f"{duration((self.total_steps - m['step']) * fmean(self.seconds))} left")
        return "  ".join(parts)

    def close(self) -> None:
        self.update()
        if self.live and self.shown and self.latest.get("step", 0) < self.total_steps:
            self.out.write("\n")

    def _write(self, text: str, lasting: bool = False) -> None:
        if self.live:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be redrawn
            self.out.write(f"\r\x1b[K{text}\n" if lasting else f"\r\x1b[K{text[:width]}")
        else:
            self.out.write(f"{text}\n")
        self.out.flush()


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def describe(config: Config, reserved: Reserved, cluster: Cluster) -> str:
    """One line on what runs where."""
    where = "joined a cluster of" if cluster.joined else "started Ray on this machine,"
    threads = config.cluster.most_workers * reserved.threads_per_worker
    crowded = ""
    if threads > cluster.cpus:
        crowded = (
            f"\nwarning: {threads} threads of all workers together on {cluster.cpus:g} CPUs get into each other's way; "
            f"lower cluster.threads_per_worker or cluster.num_workers"
        )
    least, most = config.cluster.fewest_workers, config.cluster.most_workers
    threads = reserved.threads_per_worker
    workers = f"{least} to {most} workers" if least < most else f"{most} worker{'s' * (most > 1)}"
    gpu = " and a GPU" if config.cluster.use_gpu else ""
    return (
        f"{where} {cluster.cpus:g} CPUs: {workers} x {threads} thread{'s' * (threads > 1)} "
        f"({reserved.cpus_per_worker:g} CPUs{gpu} each), up to {reserved.num_tasks} data tasks of "
        f"{reserved.cpus_per_task:g} CPUs{crowded}"
    )
