"""Starting or joining Ray, what of it a run may reserve, and one live line instead of its noise."""

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlskv_ray.cluster.shares import Cluster

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
    wanted = asked_for or address_of_ray_start(Path(get_ray_address_file(None))) or "local"
    joined = wanted != "local" and _join(wanted, options, must=bool(asked_for))
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


def _join(address: str, options: dict[str, Any], must: bool) -> bool:
    """Joins the cluster at an address; whether that was possible. ValueError where it `must` be and is not, or where it
    has other versions."""
    import ray
    from ray.exceptions import AuthenticationError

    try:
        ray.init(address=address, **options)
    except (ConnectionError, AuthenticationError) as error:
        if must:
            reason = str(error).partition(". ")[0]
            raise ValueError(
                f"cluster.address: no Ray cluster answers at {address!r} ({reason}); start one with "
                f"`ray start --head`, name the file of its token with RAY_AUTH_TOKEN_PATH if it wants one, or use "
                f"cluster.address=local"
            ) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise ValueError(
            f"cluster.address: the cluster at {address!r} has another Ray or Python: {' '.join(str(error).split())}; "
            f"install the same on all machines, or use cluster.address=local"
        ) from error
    return bool(ray.is_initialized())


def has_token() -> bool:
    """Whether this user has a token for Ray clusters, in one of the places where Ray looks for it."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or os.path.exists(os.path.expanduser(TOKEN))


def address_of_ray_start(file: Path) -> str | None:
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


def release_dead_placement_groups() -> None:
    """Gives back what processes of this job have reserved that are dead: Ray keeps it for as long as the job lasts, and
    who comes next would wait for it."""
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for group, state in _groups_of_this_job():
        by_an_actor = group.creator_actor_id.strip(b"\xff") != b""  # else by the driver, which is alive
        if by_an_actor and group.creator_actor_dead and state != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def end_actors(class_name: str) -> None:
    """Ends the actors of a class that this process itself has started; who waits for one gets RayActorError."""
    import ray
    from ray.core.generated.gcs_pb2 import ActorTableData

    context = ray.get_runtime_context()
    job = ray.JobID.from_hex(context.get_job_id())
    # neither the public table nor Ray Train tells which actor its controller is
    for entry in ray._private.state.state._connect_and_get_accessor().get_actor_table(job, None):
        actor = ActorTableData.FromString(entry)
        own = actor.owner_address.worker_id.hex() == context.get_worker_id()
        if own and actor.class_name.rpartition(".")[2] == class_name and actor.state != ActorTableData.DEAD:
            ray._private.worker.global_worker.core_worker.kill_actor(ray.ActorID(actor.actor_id), True)


def has_unmet_requests() -> bool:
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
