"""Who answers prompts: processes of a Ray cluster, or this one."""

import signal
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlskv_ray.cluster.placement import Wait, room_for
from vlskv_ray.cluster.shares import Cluster
from vlskv_ray.cluster.start import ray_cluster
from vlskv_ray.command import name_option
from vlskv_ray.config import ClusterConfig
from vlskv_ray.data.chat import Limits
from vlskv_ray.data.prompts import Prompts
from vlskv_ray.errors import StoppedRun
from vlskv_ray.evaluation.answers import Answerer, Part, Sampling, rows_of_window
from vlskv_ray.evaluation.loading import build_side
from vlskv_ray.launch.watch import signals_to
from vlskv_ray.model.build import ModelFiles, load_config, parameter_counts
from vlskv_ray.model.fingerprint import fingerprint_of
from vlskv_ray.model.processor import load_processor
from vlskv_ray.model.swiftkv import has_swiftkv
from vlskv_ray.training.faults import fault_point
from vlskv_ray.words import plural

FORMAT = 2
"""Of what is kept of answers, windows included; another one is not gone on with."""
MOST_LOST = 3
"""Workers that may be lost one after another, without an answer in between, before it is given up."""
WEIGHTS_AND_REST = 1.5
"""Memory of a worker over that of its model's weights, which are float32."""


@dataclass(frozen=True)
class Job:
    """What is to be answered by whom, and how. Small: it travels to workers."""

    files: ModelFiles
    """Of the model, which have been checked."""
    prompts: Prompts
    sampling: Sampling
    batch_size: int

    @property
    def num_windows(self) -> int:
        return -(-self.prompts.num_rows // rows_of_window(self.prompts.num_rows, self.batch_size))

    def settings(self) -> dict[str, Any]:
        """All that decides the answers."""
        sources = zip(self.prompts.sources, self.prompts.counts, strict=True)
        return {
            "format": FORMAT,
            "model": fingerprint_of(self.files),
            "data": [[source.name, source.fingerprint, count, *map(str, source.roots)] for source, count in sources],
            "replace": self.prompts.replace,
            "system": self.prompts.system,
            "batch_size": self.batch_size,
            **asdict(self.sampling),
        }

    def answerer(self) -> Answerer:
        """The model, loaded. ValueError where it cannot be."""
        config = load_config(self.files)
        processor = load_processor(self.files, tried=True)
        model = build_side(self.files, is_student=has_swiftkv(config), teacher=True)
        limits = Limits(config.text_config.max_position_embeddings, max_images_per_sample=2**30, is_of_model=True)
        return Answerer(model, processor, self.prompts, self.sampling, self.batch_size, limits)


def parts_of(
    job: Job, windows: Sequence[int], done: dict[int, set[int]], workers: int | None, threads: int | None
) -> Generator[Part, None, None]:
    """What becomes of the batches of some windows, but for those done, as they are finished."""
    if not windows:
        return
    if workers == 0:
        if threads:
            torch.set_num_threads(threads)
        with name_option("--model"):
            answerer = job.answerer()
            for window in windows:
                yield from answerer.parts(window, frozenset(done.get(window, ())))
        return
    with ray_cluster(None) as cluster, signals_to(end):  # Ray has taken SIGTERM, and would end this process at once
        num_workers, num_threads = share_out(job, len(windows), cluster, workers, threads)
        print(f"answering     with {plural(num_workers, 'process')} of {plural(num_threads, 'thread')}", flush=True)
        yield from parts_of_workers(job, windows, done, num_workers, num_threads, cluster)


def end(number: int) -> None:
    """Ends the command by a signal, as it ends without Ray."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def share_out(
    job: Job, num_windows: int, cluster: Cluster, workers: int | None, threads: int | None
) -> tuple[int, int]:
    """How many workers there are to be, and threads of each: one for each CPU, as far as memory lasts and there is work
    for them."""
    import ray

    free = ray.available_resources()
    cpus = max(1.0, free.get("CPU", 0) if cluster.joined else cluster.cpus)  # others may hold some
    if workers is None:
        sizes = parameter_counts(job.files, load_config(job.files))
        num_bytes = 4 * WEIGHTS_AND_REST * sum(sizes.values())
        workers = max(1, min(int(cpus // (threads or 1)), int(free.get("memory", 0) // num_bytes)))
    workers = min(workers, num_windows)
    return workers, threads or max(1, int(min(cpus // workers, cluster.largest_node)))


class AnswerWorker:
    """A process that answers windows of prompts."""

    def __init__(self, job: Job, threads: int) -> None:
        torch.set_num_threads(threads)
        self.job = job
        self.answerer: Answerer | None = None

    def parts(self, window: int, done: frozenset[int]) -> Iterator[Part]:
        self.answerer = self.answerer or self.job.answerer()  # not above: Ray tells of an error here as what it is
        for part in self.answerer.parts(window, done):
            fault_point("answers_of_worker", part.window)
            yield part


def parts_of_workers(
    job: Job, windows: Sequence[int], done: dict[int, set[int]], workers: int, threads: int, cluster: Cluster
) -> Iterator[Part]:
    """The same by processes of a Ray cluster. One that is lost is replaced; what it had not told of is answered again.

    Raises:
        StoppedRun: they are lost again and again.
        ValueError: they cannot load the model.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    cpus = min(float(threads), cluster.cpus / workers)
    wait = Wait(ClusterConfig().wait_seconds, print, "--workers", "or ask for fewer")
    left, lost = deque(windows), 0
    with room_for([{"CPU": cpus}] * workers, plural(workers, "process"), wait) as group:
        where = PlacementGroupSchedulingStrategy(group)
        start = ray.remote(num_cpus=cpus, scheduling_strategy=where)(AnswerWorker).remote
        running: dict[Any, tuple[Any, int]] = {}  # what a worker tells of a window, as it comes

        def give(worker: Any) -> None:
            if left:
                window = left.popleft()
                ahead = worker.parts.options(num_returns="streaming")
                running[ahead.remote(window, frozenset(done.get(window, ())))] = worker, window

        for _ in range(workers):
            give(start(job, threads))
        while running:
            (stream, *_), _ = ray.wait([*running], num_returns=1)
            worker, window = running[stream]
            try:
                part = ray.get(next(stream))
            except StopIteration:
                del running[stream]
                give(worker)
            except ray.exceptions.RayTaskError as error:
                with name_option("--model"):
                    raise error.cause from None
            except ray.exceptions.RayActorError as error:
                del running[stream]
                if (lost := lost + 1) > MOST_LOST:
                    raise StoppedRun(lost_message(error)) from error
                left.appendleft(window)
                give(start(job, threads))
            else:
                lost = 0
                yield part


def lost_message(error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return (
        f"processes that answer are lost again and again: {reason}; where memory is short, fewer --workers or a "
        f"smaller --batch-size help; what is answered is kept, and the same command goes on"
    )
