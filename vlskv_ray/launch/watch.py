"""What a command does while its work goes on in a thread: progress is shown and signals are taken."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from vlskv_ray.config import changed, dump_config
from vlskv_ray.errors import RunFailed
from vlskv_ray.files import write_text
from vlskv_ray.launch.progress import ProgressLine
from vlskv_ray.training.objective import objective_of
from vlskv_ray.training.outcome import Outcome
from vlskv_ray.training.run import Run

T = TypeVar("T")
OnMetrics = Callable[[dict[str, Any]], None] | None
"""What is told every line of metrics.jsonl."""


def run_in_thread(
    work: Callable[[], T], look: Callable[[], bool], every: float, leave: Callable[[Future[T]], None] | None = None
) -> Future[T] | None:
    """Runs `work` in a thread while this one looks after it.

    Args:
        work: what is to be done.
        look: called now and then, and once more when the work has ended; returns whether the work is to be left.
        every: seconds between two looks.
        leave: told of work that is left, by `look` or by what it raised, to end what that work waits for.

    Returns:
        the work that has ended, with what it returned or raised; None where it was left.
    """
    ended: Future[T] = Future()

    def target() -> None:
        try:
            ended.set_result(work())
        except BaseException as error:  # whatever it is, it belongs to the thread that can report it
            ended.set_exception(error)

    threading.Thread(target=target, daemon=True).start()  # a daemon: work that is left does not keep the process alive
    left = True
    try:
        while not ended.done():
            wait([ended], every)
            if look():
                return None
        left = False
        return ended
    finally:
        if left and leave is not None:
            leave(ended)


@contextmanager
def signals_to(handler: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler`, and afterwards where they went before."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python lets no other take signals, as a trial's
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, frame: handler(number))
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def watch(
    run: Run,
    work: Callable[[], Outcome],
    leave: Callable[[Future[Outcome]], None] | None = None,
    on_metrics: OnMetrics = None,
) -> tuple[Outcome, int | None]:
    """Runs `work` in a thread while this one shows progress and takes signals.

    Args:
        run: whose folder to watch.
        work: returns the outcome.
        leave: where the work itself is done by other processes, so that it can be left before it has ended: ends them.
        on_metrics: told every line of metrics.jsonl.

    Returns:
        what `work` returned, and the signal that asked it to stop, if one did.

    Raises:
        RunFailed: `work` raised; the error is its cause.
    """
    asked: list[int] = []
    apart = leave is not None
    run.checkpoints.mkdir(exist_ok=True)
    run.stop_file.unlink(missing_ok=True)
    write_text(run.folder / "config.yaml", dump_config(run.config))
    progress = progress_of(run, on_metrics)

    def is_underway() -> bool:
        return not apart or (bool(progress.latest) and not progress.waits)

    def stop(number: int) -> None:
        asked.append(number)
        if len(asked) > 1 + apart:  # apart, the second one leaves the work, and only a third does not wait for that
            run.attempt_file.unlink(missing_ok=True)  # else the step would seem to have ended its workers
            os._exit(128 + number)
        run.stop_file.touch()
        if is_underway():
            print("\nstopping, with all that is done saved (once more to end at once)", flush=True)

    def look() -> bool:
        progress.update()
        return apart and bool(asked) and (len(asked) > 1 or not is_underway())  # asked twice, or nothing to save

    with signals_to(stop):
        try:
            ended = run_in_thread(work, look, 0.2, leave)
        finally:
            progress.close()
            run.stop_file.unlink(missing_ok=True)
    if ended is None:
        run.attempt_file.unlink(missing_ok=True)  # it was not the step that ended it
        return Outcome("interrupted"), asked[0]
    if error := ended.exception():
        raise RunFailed("the run failed") from error
    return ended.result(), asked[0] if asked else None


def progress_of(run: Run, on_metrics: OnMetrics) -> ProgressLine:
    """The line that shows how far a run is."""
    return ProgressLine(
        run.folder / "metrics.jsonl",
        run.total_steps,
        shown=run.config.output.level in ("debug", "info"),
        afterwards=measuring(run),
        on_metrics=on_metrics,
        notes=run.waiting_file,
    )


def measuring(run: Run) -> str:
    """What happens after the last step."""
    samples = len(run.held_out.rows()) if run.held_out else 0
    answers = [f"answers to {samples} held-out samples"] if samples else []
    savings = ["what the student saves"] if objective_of(run.config).has_student else []
    return f"measuring     {' and '.join(answers + savings)}" if answers or savings else ""


def with_threads(run: Run, threads: int) -> Run:
    """The run with its thread count spelled out: it decides the last bits of every number."""
    return replace(run, config=changed(run.config, {"cluster.threads_per_worker": threads}))
