"""How a cluster's CPUs are shared out between training and data, and what a run may ask for."""

import math
from dataclasses import dataclass

from vlskv_ray.config import ClusterConfig, Config, DataConfig
from vlskv_ray.words import plural


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
    # the small number is for shares that were rounded down to four digits
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
    workers = f"{least} to {most} workers" if least < most else plural(most, "worker")
    gpu = " and a GPU" if config.cluster.use_gpu else ""
    return (
        f"{where} {cluster.cpus:g} CPUs: {workers} x {plural(threads, 'thread')} "
        f"({reserved.cpus_per_worker:g} CPUs{gpu} each), up to {reserved.num_tasks} data tasks of "
        f"{reserved.cpus_per_task:g} CPUs{crowded}"
    )
