"""What the command does while its run goes on: progress is shown and signals are taken."""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vlskv_ray.config import changed, dump_config
from vlskv_ray.errors import RunFailed
from vlskv_ray.files import write_text
from vlskv_ray.launch.progress import ProgressLine
from vlskv_ray.training.outcome import Outcome
from vlskv_ray.training.run import Run

OnMetrics = Callable[[dict[str, Any]], None] | None
"""What is told every line of metrics.jsonl."""


def watch(
    run: Run, work: Callable[[], Outcome], apart: bool, on_metrics: OnMetrics = None
) -> tuple[Outcome, int | None]:
    """Runs `work` in a thread while this one shows progress and takes signals.

    Args:
        run: whose folder to watch.
        work: returns the outcome.
        apart: the work itself is done by other processes, so that it can be left before it has ended.
        on_metrics: told every line of metrics.jsonl.

    Returns:
        what `work` returned, and the signal that asked it to stop, if one did.

    Raises:
        RunFailed: `work` raised; the error is its cause.
    """
    outcome: list[Outcome] = []
    failure: list[BaseException] = []
    asked: list[int] = []

    def target() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # whatever it is, it is raised again below, in the thread that can report it
            failure.append(error)

    def stop(signum: int, frame: Any) -> None:
        asked.append(signum)
        if len(asked) > 1 + apart:
            run.attempt_file.unlink(missing_ok=True)
            os._exit(128 + signum)
        run.stop_file.touch()
        if is_underway():
            print("\nstopping, with all that is done saved (once more to end at once)", flush=True)

    def is_underway() -> bool:
        return not apart or (bool(progress.latest) and not progress.waits)

    run.checkpoints.mkdir(exist_ok=True)
    run.stop_file.unlink(missing_ok=True)
    write_text(run.folder / "config.yaml", dump_config(run.config))
    shown_at = run.config.output.level in ("debug", "info")
    progress = ProgressLine(
        run.folder / "metrics.jsonl",
        run.total_steps,
        shown_at,
        afterwards=measuring(run),
        on_metrics=on_metrics,
        notes=run.waiting_file,
    )
    before = {}
    if threading.current_thread() is threading.main_thread():  # others, as in a sweep, take no signals
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
            progress.update()
            if asked and apart and (len(asked) > 1 or not is_underway()):  # asked twice, or there is nothing to save
                run.attempt_file.unlink(missing_ok=True)  # it was not the step that ended it
                return Outcome("interrupted"), asked[0]
    finally:
        progress.close()
        run.stop_file.unlink(missing_ok=True)
        for number, handler in before.items():
            signal.signal(number, handler)
    if failure:
        raise RunFailed("the run failed") from failure[0]
    return outcome[0], asked[0] if asked else None


def measuring(run: Run) -> str:
    """What happens after the last step."""
    samples = len(run.held_out.rows()) if run.held_out else 0
    answers = [f"answers to {samples} held-out samples"] if samples else []
    savings = ["what the student saves"] if run.config.objective == "distill" else []
    return f"measuring     {' and '.join(answers + savings)}" if answers or savings else ""


def with_threads(run: Run, threads: int) -> Run:
    """The run with its thread count spelled out: it decides the last bits of every number."""
    return replace(run, config=changed(run.config, {"cluster.threads_per_worker": threads}))
