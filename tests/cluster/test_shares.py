"""Sharing out a cluster so that data always has room."""

import pytest

from vlskv_ray.cluster.shares import Cluster, Reserved, check_gpus, describe, reserve
from vlskv_ray.config import ClusterConfig, Config, DataConfig, SourceConfig

DATA = DataConfig(sources=(SourceConfig(name="shapes"),))
CONFIG = Config.model_validate({"model": {"name_or_path": "x"}, "data": {"sources": ["shapes"]}})


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 7, 16, 96])
@pytest.mark.parametrize("workers", [1, 2, 3, 8, 64])
def test_whatever_the_cluster_one_data_task_fits(cpus: int, workers: int) -> None:
    """Ray waits forever for a CPU that all workers hold; the defaults never let it come to that."""
    reserved = reserve(ClusterConfig(num_workers=workers), DATA, cpus)
    assert reserved.cpus_per_worker * workers + reserved.cpus_per_task <= cpus
    assert reserved.cpus_per_worker > 0 and reserved.threads_per_worker >= 1
    assert reserved.cpus_per_worker < 1 or reserved.cpus_per_worker.is_integer()


def test_two_workers_on_two_cores() -> None:
    reserved = reserve(ClusterConfig(num_workers=2), DATA, 2)
    assert (reserved.cpus_per_worker, reserved.cpus_per_task, reserved.threads_per_worker) == (0.5, 0.5, 1)


def test_a_share_that_would_hang_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 workers of 1 CPUs and one data task of 0.5 need 2.5 CPUs, .* has 2,"):
        reserve(ClusterConfig(num_workers=2, cpus_per_worker=1.0), DATA, 2)


def test_a_share_that_no_machine_has_is_refused() -> None:
    """Together the machines have enough, but a worker is on one of them, and so is a data task."""
    for key, cluster, data in (
        ("cluster.cpus_per_worker", ClusterConfig(cpus_per_worker=3.0), DATA),
        ("data.cpus_per_task", ClusterConfig(), DATA.model_copy(update={"cpus_per_task": 3.0})),
    ):
        with pytest.raises(ValueError, match=rf"^{key}: 3, but no machine of the cluster has more than 2; lower it"):
            reserve(cluster, data, cpus=8, largest_node=2)
        reserve(cluster, data, cpus=8, largest_node=4)


def test_a_worker_on_a_gpu_takes_one_cpu_and_leaves_the_others_to_data() -> None:
    gpu = ClusterConfig(num_workers=2, use_gpu=True)
    reserved = reserve(gpu, DATA, 16)
    assert reserved == Reserved(cpus_per_worker=1.0, cpus_per_task=1.0, num_tasks=14, threads_per_worker=1)
    assert reserve(gpu, DATA, 2).cpus_per_worker == 0.5
    assert "(1 CPUs and a GPU each)" in describe(
        CONFIG.model_copy(update={"cluster": gpu}), reserved, Cluster(16, joined=True, gpus=2)
    )


def test_gpus_that_are_not_there_are_not_waited_for() -> None:
    with pytest.raises(ValueError, match=r"^cluster.use_gpu: .* for each worker, 3 in all, the cluster has 2; lower "):
        check_gpus(ClusterConfig(num_workers=3, use_gpu=True), 2)
    check_gpus(ClusterConfig(num_workers=(2, 3), use_gpu=True), 2)
    check_gpus(ClusterConfig(num_workers=3), 0)


@pytest.mark.parametrize(("cpus", "node", "most"), [(4, 2, 2), (2, 2, 2), (32, 8, 8), (16, 16, 3)])
def test_elastic_workers_leave_cpus_for_data_on_any_nodes(cpus: float, node: float, most: int) -> None:
    """Ray fills each node with as many workers as fit there."""
    reserved = reserve(ClusterConfig(num_workers=(1, most)), DATA, cpus, node)
    on_a_node = int(node // reserved.cpus_per_worker)
    assert on_a_node * cpus / node >= most  # all of them fit
    assert node - on_a_node * reserved.cpus_per_worker >= reserved.cpus_per_task  # on one node that is left


def test_more_threads_than_cpus_are_warned_of() -> None:
    config = CONFIG.model_copy(update={"cluster": ClusterConfig(num_workers=2)})
    assert "warning" not in describe(config, Reserved(1, 1, 1, threads_per_worker=2), Cluster(4, joined=False))
    crowded = describe(config, Reserved(1, 1, 1, threads_per_worker=3), Cluster(4, joined=False))
    assert "warning: 6 threads of all workers together on 4 CPUs" in crowded
