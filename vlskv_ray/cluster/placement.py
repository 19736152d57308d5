"""What a run asks its cluster for at once, all of it or nothing, and what is told while others hold it.

Workers and a first data task are bundles of one placement group. Were they asked for one after the other, two runs that
each have a part of what they need would wait for each other for ever.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlskv_ray.errors import NoRoom

Resources = dict[str, float]

A_MOMENT, A_MINUTE = 5.0, 60.0
"""Seconds after which a wait is told of first, as what has just ended takes some to give back what it held, and then
again and again."""
SLICE = 0.5
"""Seconds between two looks."""


class Wait:
    """Tells of what is waited for, and ends it where it takes too long."""

    def __init__(self, seconds: float, tell: Callable[[str], None]) -> None:
        """
        Args:
            seconds: to wait at most, `cluster.wait_seconds`.
            tell: gets a line after a moment and then every minute.
        """
        self.seconds, self.tell = seconds, tell
        self.began: float | None = None
        self.tell_at = A_MOMENT

    def goes_on(self, bundles: list[Resources], what: str) -> None:
        """To be called again and again while these are waited for.

        Args:
            bundles: that are wanted, each on one node.
            what: they are.

        Raises:
            NoRoom: they have been waited for for so long.
        """
        import ray

        now = time.monotonic()
        self.began = now if self.began is None else self.began
        waited = now - self.began
        if waited < min(self.seconds, self.tell_at):
            return
        text = shortage(bundles, what, ray.available_resources(), ray.cluster_resources())
        if waited >= self.seconds:
            raise NoRoom(
                f"cluster.wait_seconds: {text} after {self.seconds:g} s; wait for what else runs on the cluster, let "
                f"this take less with cluster.num_workers, cluster.cpus_per_worker or data.cpus_per_task, or raise "
                f"cluster.wait_seconds; the same command tries again"
            )
        self.tell(f"waiting       {text}; for {waited:.0f} s by now, {self.seconds:g} s at most")
        self.tell_at = waited + A_MINUTE

    def ends(self) -> None:
        """There is room: what is waited for next is told of anew."""
        self.began, self.tell_at = None, A_MOMENT


def shortage(bundles: list[Resources], what: str, free: Resources, total: Resources) -> str:
    """How much is wanted at once, and how much of it is free."""
    wanted = {kind: sum(bundle.get(kind, 0) for bundle in bundles) for kind in ("CPU", "GPU")}
    wanted = {kind: count for kind, count in wanted.items() if count}
    needs = " and ".join(f"{count:g} {kind}s" for kind, count in wanted.items())
    there = " and ".join(f"{free.get(kind, 0):g} of the cluster's {total.get(kind, 0):g} {kind}s" for kind in wanted)
    enough = all(free.get(kind, 0) >= count - 1e-6 for kind, count in wanted.items())
    where = ", though not on nodes where each has room" if enough else ""
    return f"{what} must have {needs} at once, and {there} are free{where}"


@contextmanager
def room_for(bundles: list[Resources], what: str, wait: Wait) -> Iterator[Any]:
    """A placement group of these bundles, of the Ray that this process is connected to; NoRoom as `Wait` says."""
    from ray.util import placement_group, remove_placement_group

    group = placement_group(bundles, strategy="SPREAD")
    try:
        while not group.wait(SLICE):
            wait.goes_on(bundles, what)
        wait.ends()
        yield group
    finally:
        remove_placement_group(group)


def told_in(file: Path) -> Callable[[str], None]:
    """Tells by adding lines to a file, for a process that nobody listens to."""

    def tell(text: str) -> None:
        with suppress(OSError):  # a full disk ends no run
            file.parent.mkdir(exist_ok=True)
            with open(file, "a") as lines:
                lines.write(f"{text}\n")

    return tell


def have_asked(asking: Any) -> None:
    """Has the controller of this process, which has one, make the placement group of its workers by what `together`
    returned."""
    from ray.train.v2._internal.execution.controller.controller import TrainController
    from ray.train.v2._internal.execution.worker_group import WorkerGroup
    from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle

    class Asked(DefaultPlacementGroupHandle):
        def wait(self, timeout_seconds: float = 30) -> bool:
            there: bool = asking.waits_for(self, timeout_seconds)
            return there

    class WorkersAndData(WorkerGroup):
        def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Any:
            return Asked(asking.asks_for(worker_group_context.num_workers, worker_group_context.placement_strategy))

    TrainController.worker_group_cls = WorkersAndData


def stay_in_step(data_task: Resources, worker: Resources, fewest: int, wait: Wait) -> Any:
    """Has Ray Train ask for a data task along with the workers, whenever it starts or restarts them.

    Ray Train alone asks for its workers only, and tries again for ever in silence. All of this happens in the process
    of its controller, whenever that is about to start workers.

    Args:
        data_task: what a data task takes.
        worker: what a worker takes.
        fewest: workers that are enough, where their number follows the cluster.
        wait: for them.

    Returns:
        what goes into the `callbacks` of Ray's RunConfig; its `first_data_task()` is where the dataset's first process
        is to be scheduled, to be asked for while workers are being started.
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class Together(ControllerCallback):
        def __init__(self) -> None:
            self.group: Any = None
            self.num_workers = 0

        def after_controller_start(self, train_run_context: Any) -> None:
            have_asked(self)

        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            from ray.train.v2._internal.execution.controller.state import RunningState, SchedulingState

            if isinstance(current_state, RunningState):
                wait.ends()
            elif current_state is previous_state and not isinstance(current_state, SchedulingState):
                # Ray has found that not even the fewest fit beside what other runs have asked it for
                wait.goes_on(self.bundles(fewest), self.what(fewest))
                time.sleep(SLICE)

        def asks_for(self, num_workers: int, strategy: str) -> Any:
            from ray.util import placement_group

            self.num_workers = num_workers
            self.group = placement_group(self.bundles(num_workers), strategy=strategy)
            return self.group

        def bundles(self, num_workers: int) -> list[Resources]:
            return [*[worker] * num_workers, data_task]

        def what(self, num_workers: int) -> str:
            return f"{num_workers} worker{'s' * (num_workers > 1)} and a data task"

        def waits_for(self, asked: Any, seconds: float) -> bool:
            """Whether there is room; only where fewer workers might do, not for longer than these seconds."""
            until = time.monotonic() + seconds
            try:
                while not asked.placement_group.wait(SLICE):
                    wait.goes_on(self.bundles(self.num_workers), self.what(self.num_workers))
                    if self.num_workers > fewest and time.monotonic() > until:
                        return False  # the group is removed by who asks
            except NoRoom:
                asked.shutdown()
                raise
            return True

        def first_data_task(self) -> Any:
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.num_workers)

    return Together()
