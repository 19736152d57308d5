"""What each trial of a sweep may use of the cluster."""

from typing import Any

from vlskv_ray.cluster.shares import Cluster, check_gpus, reserve
from vlskv_ray.config import Config, changed
from vlskv_ray.sweep.sweep import Sweep


def concurrent_trials(config: Config, cluster: Cluster, trials: int) -> int:
    """How many trials run at once: each has a CPU for every worker and one for its data, as far as there are so many.

    ValueError where more were asked for than can all have a worker and a data task, or where a trial lacks GPUs.
    """
    workers = config.cluster.most_workers
    needs = workers + 1 if workers else config.cluster.threads_per_worker or 1
    room = max(1, int(cluster.cpus // needs))
    if config.cluster.use_gpu:
        check_gpus(config.cluster, cluster.gpus)
        room = min(room, int(cluster.gpus // max(workers, 1)))
    count = min(config.tune.max_concurrent_trials or room, max(1, trials))
    if workers:
        # only for its error: a share that is too small is told before any trial begins
        reserve(config.cluster, config.data, cluster.cpus / count, cluster.largest_node)
    return count


def trial_takes(config: Config, sweep: Sweep) -> list[dict[str, float]]:
    """What a trial must have of the cluster to begin."""
    gpu = {"GPU": 1.0} if config.cluster.use_gpu else {}
    if not config.cluster.most_workers:
        return [{"CPU": sweep.cpus_per_trial} | gpu]
    reserved = reserve(config.cluster, config.data, sweep.cpus_per_trial, sweep.largest_node)
    worker, data_task = {"CPU": reserved.cpus_per_worker} | gpu, {"CPU": reserved.cpus_per_task}
    return [*[worker] * config.cluster.fewest_workers, data_task]


def with_share(config: Config, sweep: Sweep, is_new: bool) -> Config:
    """The config of a trial with what of the cluster it may use. One that goes on keeps its threads: they decide the
    last bits."""
    share: dict[str, Any] = {}
    threads = config.cluster.threads_per_worker
    if config.cluster.most_workers:
        reserved = reserve(config.cluster, config.data, sweep.cpus_per_trial, sweep.largest_node)
        share = {"data.cpus_per_task": reserved.cpus_per_task, "data.num_proc": reserved.num_tasks}
        share["cluster.cpus_per_worker"] = reserved.cpus_per_worker
        threads = reserved.threads_per_worker
    if is_new:
        share["cluster.threads_per_worker"] = threads or max(1, int(sweep.cpus_per_trial))
    return changed(config, share)
