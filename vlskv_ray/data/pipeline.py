"""The data graph: rows of the plan in, micro-batches out. The one module of the data that knows Ray."""

import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from vlskv_ray.data.chat import Limits, encode
from vlskv_ray.data.collate import Batch, Encoded, collate, from_row
from vlskv_ray.data.plan import Plan
from vlskv_ray.data.sample import Rejected, Sample, left_out
from vlskv_ray.data.sources import Source
from vlskv_ray.data.teacher_cache import content_key
from vlskv_ray.model.build import find_model, load_config
from vlskv_ray.model.processor import load_processor


class Cache(Protocol):
    """Where a loader looks for samples that need no work: a `TeacherCache`, or several together."""

    def get(self, key: str, uid: str) -> Encoded | None: ...


ROWS_PER_TASK = 8
"""Plan rows of one data task: enough to hide what a task costs, few enough that the first rows come soon."""
ROWS_PER_EXECUTION = 2**15
"""Plan rows that Ray is told of at a time: it keeps a note of each block of them, and takes seconds to begin."""


@functools.lru_cache(maxsize=2)
def _model_side(name_or_path: str, revision: str | None) -> tuple[Any, Any]:
    """Processor and config of a model, loaded once a process: data tasks come again and again to the same ones."""
    files = find_model(name_or_path, revision)
    return load_processor(files, tried=True), load_config(files)


@dataclass(frozen=True)
class Loader:
    """Turns a row of the plan into a micro-batch; runs on the data workers, so it travels to them."""

    sources: tuple[Source, ...]
    plan: Plan
    name_or_path: str
    revision: str | None
    """Of the model, whose processor prepares the samples."""
    limits: Limits
    cache: Cache | None = None

    def __call__(self, row: dict[str, Any]) -> Batch:
        """Loads, decodes, tokenises and collates the samples of a row; those that cannot be used are listed.

        Where the teacher cache has all of them, their states come from there and no image is decoded.
        """
        processor, _ = _model_side(self.name_or_path, self.revision)
        samples, rejected, notices = self.samples(row["samples"])
        return collate(
            samples,
            processor.tokenizer.pad_token_id or 0,
            step=int(row["step"]),
            micro_batch=int(row["micro_batch"]),
            rejected=rejected,
            notices=notices,
        )

    def batch_of(self, numbers: Sequence[int]) -> Batch:
        """A micro-batch of any samples, by their numbers in the plan, whatever the teacher cache has of them."""
        return replace(self, cache=None)({"step": 0, "micro_batch": 0, "samples": list(numbers)})

    def samples(self, numbers: Sequence[int]) -> tuple[list[Encoded], list[dict[str, Any]], list[dict[str, str]]]:
        """The samples of these numbers in the plan that can be used, all or none with states; why others cannot; and
        what was changed in those that can."""
        read: list[tuple[Sample, str]] = []
        rejected: list[dict[str, Any]] = []
        for number in numbers:
            k, at = self.plan.locate(int(number))
            try:
                sample = self.sources[k].read(at)
                read.append((sample, content_key(sample) if self.cache is not None else ""))
            except Rejected as reason:
                rejected.append(left_out(self.sources[k].uid(at), reason))
        encoded: dict[int, Encoded] = {}
        if self.cache is not None:
            for i, (sample, key) in enumerate(read):
                if (cached := self.cache.get(key, sample.uid)) is not None:
                    encoded[i] = cached
        lacking = [i for i in range(len(read)) if i not in encoded]
        made = self._encode_all(read, lacking, rejected)
        if made:  # all of a micro-batch come from the cache, or none
            made |= self._encode_all(read, list(encoded), rejected)
            encoded = made
        used = sorted(encoded)
        notices = [notice.to_json(sample.uid) for sample, _ in map(read.__getitem__, used) for notice in sample.notices]
        return [encoded[i] for i in used], rejected, notices

    def _encode_all(
        self, read: Sequence[tuple[Sample, str]], which: Sequence[int], rejected: list[dict[str, Any]]
    ) -> dict[int, Encoded]:
        """Those of `read` that can be used, by their place; the others are added to `rejected`."""
        processor, config = _model_side(self.name_or_path, self.revision)
        encoded: dict[int, Encoded] = {}
        for i in which:
            sample, key = read[i]
            try:
                encoded[i] = replace(encode(sample, processor, config, self.limits), key=key)
            except Rejected as reason:
                rejected.append(left_out(sample.uid, reason))
        return encoded


def local_batches(loader: Loader, start: int, stop: int) -> Iterator[Batch]:
    """The micro-batches of steps [start, stop), made in this process."""
    return map(loader, loader.plan.rows(start, stop))


def data_worker() -> type:
    """A class whose processes make micro-batches for as long as a run lasts, so that each imports and reads model files
    once: Ray ends processes of plain tasks whenever the training does not keep up with them, and starts new ones.

    It is made here, and opens its loader itself, so that Ray's own processes, which pass it on, need not import all
    that it needs: seconds of each of them, at every start of the workers.
    """

    class DataWorker:
        def __init__(self, loader: bytes, first_step: str) -> None:
            import os
            import pickle
            from pathlib import Path

            os.nice(10)  # it works ahead: where CPUs are shared, the step that is being made comes first
            self.loader, self.first_step = pickle.loads(loader), int(Path(first_step).read_text())

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            from vlskv_ray.data.collate import to_row

            plan = self.loader.plan
            step, micro_batch = divmod(int(row["item"]), plan.micro_batches_per_step)
            return to_row(self.loader(plan.row(self.first_step + step, micro_batch)))

    return DataWorker


def executions(start: int, stop: int, micro_batches_per_step: int) -> range:
    """The first steps of the parts in which Ray is told of steps [start, stop), as few and as equal as can be."""
    at_most = max(1, ROWS_PER_EXECUTION // micro_batches_per_step)
    parts = max(1, -(-(stop - start) // at_most))
    return range(start, stop, max(1, -(-(stop - start) // parts)))


def begin_at(first_step: Path, step: int) -> None:
    """Says in that file where the next execution begins. It stays as long as it is, so a full disk takes it too."""
    with open(first_step, "r+" if first_step.exists() else "w") as file:
        file.write(f"{step:20}")


def ray_dataset(
    loader: Loader, steps: int, first_step: Path, *, cpus_per_task: float, num_tasks: int, first_task: Any = "SPREAD"
) -> Any:
    """The micro-batches of so many steps as a Ray dataset, one row and one block each.

    One-row blocks and `preserve_order` make `streaming_split` deal them to the workers exactly in turn. What Ray is
    given are numbers, of which its data workers make rows of the plan; so a dataset of some steps serves a run of any
    length, being executed again and again (`executions`).

    Args:
        loader: makes the micro-batches.
        steps: of one execution.
        first_step: see `begin_at`; on storage that all nodes share.
        cpus_per_task, num_tasks: of the data workers.
        first_task: Ray's scheduling strategy for the one that must be there; others run where CPUs are free.
    """
    import ray.cloudpickle
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    def where() -> dict[str, Any]:  # asked for each data worker as it is started
        import threading

        from ray.data._internal.execution.streaming_executor import StreamingExecutor

        # an execution starts its first one before the thread that starts others as they are of use
        is_first = not isinstance(threading.current_thread(), StreamingExecutor)
        return {"scheduling_strategy": first_task} if is_first else {}

    rows = steps * loader.plan.micro_batches_per_step
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # byte: every row ends a block. repartition() would want a CPU of its own
    items = ray.data.from_items(list(range(rows)), override_num_blocks=max(1, -(-rows // ROWS_PER_TASK)))
    processes = ray.data.ActorPoolStrategy(min_size=1, max_size=num_tasks)
    arguments = (ray.cloudpickle.dumps(loader), str(first_step))  # takes along a layout that the user's script defines
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # gone in 2.64, and this package goes with 2.60
        return items.map(
            data_worker(),
            fn_constructor_args=arguments,
            num_cpus=cpus_per_task,
            compute=processes,
            ray_remote_args_fn=where,
        )


def ray_batches(shard: Any) -> Iterator[Batch]:
    """This worker's micro-batches of one execution, in the order of the plan."""
    for table in shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2):
        yield from map(from_row, table.to_pylist())
