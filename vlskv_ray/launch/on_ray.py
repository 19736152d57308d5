"""A run's workers on Ray: a TorchTrainer on the cluster there is, or on this machine."""

import os
import pickle
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any

from vlskv_ray.cluster.node import process_group, send_by_value
from vlskv_ray.cluster.placement import Bundles, Wait, ask_together, write_waits_to
from vlskv_ray.cluster.preflight import check_nodes
from vlskv_ray.cluster.shares import Reserved, check_gpus, describe, reserve
from vlskv_ray.cluster.start import end_actors, ray_cluster, release_dead_placement_groups
from vlskv_ray.command import print_info
from vlskv_ray.config import ClusterConfig
from vlskv_ray.data.collate import Batch
from vlskv_ray.data.pipeline import Loader, begin_at, executions, ray_batches, ray_dataset
from vlskv_ray.errors import NoRoom, RunFailed
from vlskv_ray.launch.watch import OnMetrics, watch, with_threads
from vlskv_ray.storage.checkpoint import newest_step
from vlskv_ray.train_loop import train_worker
from vlskv_ray.training.outcome import Outcome
from vlskv_ray.training.run import Run, Worker

GROUP_TIMEOUT_SECONDS = 30 * 24 * 3600
"""Seconds that workers wait for each other: of one that ends they hear at once, and of one that stalls the watchdog."""
LEAVE_SECONDS = 20.0
"""Seconds to wait for a controller that is ended, at most."""
RESIZE_CHECK_SECONDS = 30.0
"""Seconds, where the number of workers follows the cluster."""


def run_on_ray(run: Run, loader: Loader, on_metrics: OnMetrics = None) -> tuple[Outcome, int | None]:
    """A TorchTrainer on the cluster there is, or on this machine."""
    config = run.config
    with ray_cluster(config.cluster.address, quiet=config.output.level != "debug") as cluster:
        # nodes of a cluster may be taken away with notice; this machine is not, and watching costs a process
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", str(int(cluster.joined)))
        run = replace(run, watches_nodes=os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "1")
        check_gpus(config.cluster, cluster.gpus)
        reserved = reserve(config.cluster, config.data, cluster.cpus, cluster.largest_node)
        run = with_threads(run, reserved.threads_per_worker)
        print_info(config, f"cluster       {describe(config, reserved, cluster)}")
        check_nodes(run, loader.sources, reserved, cluster)
        print_info(config, "starting      the workers, which takes Ray a while: up to a minute on two cores")
        try:
            return fit_again(run, loader, reserved, on_metrics)
        finally:
            shutil.rmtree(run.folder / "ray", ignore_errors=True)  # Ray's own notes; ours are all that is resumed from


def fit_again(run: Run, loader: Loader, reserved: Reserved, on_metrics: OnMetrics) -> tuple[Outcome, int | None]:
    """Runs the workers, and again where Ray's controller is lost, which Ray does not replace."""
    failures = 0
    while True:
        try:
            return watch(run, lambda: fit(run, loader, reserved), end_controller_of, on_metrics)
        except RunFailed as error:
            if lacks := missing_room(error.__cause__):
                return Outcome("failed", message=str(lacks)), None
            if not is_lost_controller(error.__cause__) or failures == run.config.cluster.max_failures:
                raise
        failures += 1
        print_info(run.config, "Ray's controller of this run was lost or gave up; it is started again with the workers")
        # the workers' CPUs, which the next ones need. The logs are left to these: a worker that outlives the controller
        # by a moment may yet commit a checkpoint, and lines of its steps must not be gone then
        release_dead_placement_groups()


def end_controller_of(fitting: Future[Outcome]) -> None:
    """Ends Ray's controller of a run that is left, and with it the workers, until the thread that waits for it knows.

    Were that thread still waiting while Ray is shut down, the process would now and then end by SIGSEGV.
    """
    until = time.monotonic() + LEAVE_SECONDS
    while not fitting.done() and time.monotonic() < until:  # again and again: it may be about to be started
        end_actors("TrainController")
        wait([fitting], 0.2)


def missing_room(error: BaseException | None) -> NoRoom | None:
    """What says that the cluster had no room for the workers in time, if that is what ended a run."""
    from ray.train import ControllerError

    while isinstance(error, ControllerError):
        error = error.controller_failure
    return error if isinstance(error, NoRoom) else None


def is_lost_controller(error: BaseException | None) -> bool:
    """Whether the process died that holds the workers together, or gave up because one of theirs died while they were
    being started; what Ray replaces itself is no such case."""
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.train import ControllerError

    if isinstance(error, ControllerError):
        error = error.controller_failure
    return isinstance(error, RayActorError | OutOfMemoryError)


def fit(run: Run, loader: Loader, reserved: Reserved) -> Outcome:
    """Runs the workers; Ray starts all of them again when one dies, and they go on from the newest checkpoint."""
    from ray.data import ExecutionOptions
    from ray.train import DataConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    config = run.config

    def dataset() -> Any:  # called at every start of the workers, when it is known which step comes next
        return ray_dataset(
            loader,
            executions(newest_step(run.checkpoints), run.total_steps, run.micro_batches_per_step).step,
            run.first_step_file,
            cpus_per_task=reserved.cpus_per_task,
            num_tasks=reserved.num_tasks,
            first_task=asking.bundles.first_data_task(),
        )

    each = share_of_worker(config.cluster, reserved)
    asking = ask_together(
        Bundles(
            {"CPU": reserved.cpus_per_task},
            each["resources_per_worker"],
            config.cluster.fewest_workers,
            Wait(config.cluster.wait_seconds, write_waits_to(run.waiting_file)),
        )
    )
    send_by_value()
    trainer = TorchTrainer(
        ray_worker,
        train_loop_config={"run": run, "loader": pickle.dumps(replace(loader, cache=None))},
        torch_config=process_group(backend_of(config.cluster), config.cluster.network_interface, GROUP_TIMEOUT_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=config.cluster.num_workers,
            **each,
            placement_strategy="SPREAD",
            elastic_resize_monitor_interval_s=RESIZE_CHECK_SECONDS,
        ),
        datasets={"train": dataset},
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
        run_config=RunConfig(
            name=f"attempt-{time.time_ns()}",  # a new one each time: Ray's own records are never resumed from
            storage_path=str(run.folder / "ray"),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            callbacks=[asking],
            logging_config=LoggingConfig(log_level="INFO" if config.output.level == "debug" else "ERROR"),
        ),
    )
    outcome: Outcome = trainer.fit().return_value
    return outcome


def backend_of(cluster: ClusterConfig) -> str:
    """By what tensors travel between workers. What workers tell each other beside gradients stays on CPUs, for which
    gloo is there in any case."""
    return "cpu:gloo,cuda:nccl" if cluster.use_gpu else "gloo"


def share_of_worker(cluster: ClusterConfig, reserved: Reserved) -> dict[str, Any]:
    """What Ray's ScalingConfig is told of each worker's share of the cluster."""
    resources = {"CPU": reserved.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {})
    return {"use_gpu": cluster.use_gpu, "resources_per_worker": resources}


def ray_worker(settings: dict[str, Any]) -> Outcome:
    """What Ray runs on each worker: where `train_worker` meets Ray Train."""
    import ray.train

    run: Run = settings["run"]
    loader: Loader = pickle.loads(settings["loader"])
    context = ray.train.get_context()

    def is_warned() -> bool:
        return ray.train.get_preemption_info() is not None  # the same on all workers

    rank, world_size = context.get_world_rank(), context.get_world_size()
    worker = Worker(rank, world_size, is_warned if run.watches_nodes else lambda: False)

    def batches_from(step: int) -> Iterator[Batch]:
        shard = ray.train.get_dataset_shard("train")
        for first_step in executions(step, run.total_steps, run.micro_batches_per_step):
            if worker.rank == 0:  # the steps before are done, and Ray begins when every worker has come here
                begin_at(run.first_step_file, first_step)
            yield from ray_batches(shard)

    return train_worker(run, worker, batches_from, loader.batch_of)
