"""What a run asks its cluster for at once, all of it or nothing, and what is told while others hold it.

Workers and a first data task are bundles of one placement group. Were they asked for one after the other, two runs that
each have a part of what they need would wait for each other for ever.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlskv_ray.errors import NoRoom
from vlskv_ray.files import add_line
from vlskv_ray.words import plural

Resources = dict[str, float]

A_MOMENT, A_MINUTE = 5.0, 60.0
"""Seconds after which a wait is told of first, as what has just ended takes some to give back what it held, and then
again and again."""
SLICE = 0.5
"""Seconds between two looks."""
REMEDY = (
    "let this take less with cluster.num_workers, cluster.cpus_per_worker or data.cpus_per_task, or raise "
    "cluster.wait_seconds"
)


class Wait:
    """Tells of what is waited for, and ends it where it takes too long."""

    def __init__(
        self, seconds: float, tell: Callable[[str], None], option: str = "cluster.wait_seconds", remedy: str = REMEDY
    ) -> None:
        """
        Args:
            seconds: to wait at most, `cluster.wait_seconds`.
            tell: gets a line after a moment and then every minute.
            option: that a reader can change.
            remedy: what else can be done than to wait.
        """
        self.seconds, self.tell, self.option, self.remedy = seconds, tell, option, remedy
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
                f"{self.option}: {text} after {self.seconds:g} s; wait for what else runs on the cluster, "
                f"{self.remedy}; the same command tries again"
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

    group = placement_group(bundles, strategy="SPREAD")  # over the nodes, as far as they have room
    try:
        while not group.wait(SLICE):
            wait.goes_on(bundles, what)
        wait.ends()
        yield group
    finally:
        remove_placement_group(group)


def write_waits_to(file: Path) -> Callable[[str], None]:
    """Tells by adding lines to a file, for a process that nobody listens to."""
    return functools.partial(add_line, file)


class Bundles:
    """The placement group that this process's workers and a first data task are put into, and the wait for it."""

    def __init__(self, data_task: Resources, worker: Resources, fewest: int, wait: Wait) -> None:
        self.data_task, self.worker, self.fewest, self.wait = data_task, worker, fewest, wait
        self.group: Any = None
        self.num_workers = 0

    def ask_for(self, num_workers: int, strategy: str) -> Any:
        """The placement group of so many workers and a data task, which may not be there yet."""
        from ray.util import placement_group

        self.num_workers = num_workers
        # the data task's bundle comes last: Ray Train puts worker i into bundle i
        self.group = placement_group(self.of(num_workers), strategy=strategy)
        return self.group

    def of(self, num_workers: int) -> list[Resources]:
        return [*[self.worker] * num_workers, self.data_task]

    def wait_for(self, handle: Any, seconds: float) -> bool:
        """Whether there is room; only where fewer workers might do, not for longer than these seconds."""
        until = time.monotonic() + seconds
        try:
            while not handle.placement_group.wait(SLICE):
                self.tell_of_wait(self.num_workers)
                if self.num_workers > self.fewest and time.monotonic() > until:
                    return False  # the group is removed by who asks
        except NoRoom:
            handle.shutdown()
            raise
        return True

    def tell_of_wait(self, num_workers: int) -> None:
        self.wait.goes_on(self.of(num_workers), f"{plural(num_workers, 'worker')} and a data task")

    def first_data_task(self) -> Any:
        """Ray's scheduling strategy for it."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.num_workers)


def place_workers_by(bundles: Bundles) -> None:
    """Has Ray Train's controller, which this process has, put its workers into these bundles."""
    from ray.train.v2._internal.execution.controller.controller import TrainController
    from ray.train.v2._internal.execution.worker_group import WorkerGroup
    from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle

    class Handle(DefaultPlacementGroupHandle):
        def wait(self, timeout_seconds: float = 30) -> bool:
            return bundles.wait_for(self, timeout_seconds)

    class WorkersAndData(WorkerGroup):
        def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Any:
            return Handle(bundles.ask_for(worker_group_context.num_workers, worker_group_context.placement_strategy))

    TrainController.worker_group_cls = WorkersAndData


def ask_together(bundles: Bundles) -> Any:
    """Has Ray Train ask for a data task along with the workers, whenever it starts or restarts them.

    Ray Train alone asks for its workers only, and tries again for ever in silence. All of this happens in the process
    of its controller, whenever that is about to start workers.

    Returns:
        what goes into the `callbacks` of Ray's RunConfig.
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class AskTogether(ControllerCallback):
        def __init__(self) -> None:
            self.bundles = bundles  # it travels to the controller with this, where the dataset finds it

        def after_controller_start(self, train_run_context: Any) -> None:
            place_workers_by(self.bundles)

        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            from ray.train.v2._internal.execution.controller.state import RunningState, SchedulingState

            if isinstance(current_state, RunningState):
                self.bundles.wait.ends()
            elif current_state is previous_state and not isinstance(current_state, SchedulingState):
                # Ray has found that not even the fewest fit beside what other runs have asked it for
                self.bundles.tell_of_wait(self.bundles.fewest)
                time.sleep(SLICE)

    return AskTogether()
