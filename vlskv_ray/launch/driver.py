"""A whole run, from its config to `final/` and summary.json, and what is said of how it ended."""

import os
import shutil
import signal
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from vlskv_ray.command import DONE, FAILED, print_error, print_info
from vlskv_ray.config import Config, changed_keys, dump_config, load_config
from vlskv_ray.data.pipeline import Loader, local_batches
from vlskv_ray.data.plan import ROWS_IN_MEMORY
from vlskv_ray.errors import RunFailed
from vlskv_ray.files import write_text
from vlskv_ray.launch.cache_room import check_cache
from vlskv_ray.launch.on_ray import run_on_ray
from vlskv_ray.launch.prepare import prepare
from vlskv_ray.launch.resume import REMEDY, find_start
from vlskv_ray.launch.watch import OnMetrics, watch, with_threads
from vlskv_ray.report.finished import is_untouched, seals, unfinished, unmade, write_pages
from vlskv_ray.report.summary import closing, write_summary
from vlskv_ray.storage.checkpoint import remove_unfinished
from vlskv_ray.storage.run_folder import move_aside, run_folder, unused_name
from vlskv_ray.storage.run_lock import own_run_folder
from vlskv_ray.storage.run_log import truncate_logs
from vlskv_ray.train_loop import train_worker
from vlskv_ray.training.faults import fault_point
from vlskv_ray.training.outcome import Outcome
from vlskv_ray.training.run import Run, Worker
from vlskv_ray.training.watchdog import DEATHS
from vlskv_ray.words import printable, printable_lines, short_path


def train(
    config: Config,
    *,
    num_samples: int | None = None,
    resume: str = "auto",
    on_metrics: OnMetrics = None,
) -> int:
    """A whole run, as `vlskv_ray.train.train` has it."""
    began = time.monotonic()
    folder = run_folder(config)
    if resume == "never" and folder.exists():
        print_info(config, f"moved the older run to {short_path(move_aside(folder))}")
    with own_run_folder(folder) as owner:  # first of all: what is looked at from here on is this command's alone
        saved = find_start(folder, resume, has_steps=config.max_steps != 0)
        run, loader = prepare(config, saved, num_samples, owner)
        if len(loader.plan.lengths) > ROWS_IN_MEMORY:
            loader = replace(loader, plan=loader.plan.with_lengths_in(folder / "lengths.npy"))
        if (saved.step if saved else 0) >= run.total_steps and is_completed(run):
            return DONE
        if run.cache is not None:
            check_cache(run, loader)
        # only now, when nothing can be refused any more: a command that ends in an error leaves all as it was
        remove_unfinished(run.checkpoints, saved.step if saved else 0)
        truncate_logs(run.folder, saved.step if saved else 0)
        if saved:
            print_info(config, f"resume        from step {saved.step}")
        start = run_here if config.cluster.most_workers == 0 else run_on_ray
        try:
            outcome, asked_by = start(run, loader, on_metrics)
        except RunFailed as error:
            assert error.__cause__ is not None
            return report_failure(folder, error.__cause__)
        if outcome.status != "done":
            return report_end(run, loader, outcome, asked_by)
        finish(run, outcome, time.monotonic() - began)
        return DONE


def finish(run: Run, outcome: Outcome, seconds: float) -> None:
    """Writes down what a run came to, and says it; model and evaluation are there already."""
    write_summary(run, outcome, seconds, seals(run.folder))
    fault_point("summary", run.total_steps)
    write_pages(run.folder)
    print_info(run.config, closing(run.folder))


def is_completed(run: Run) -> bool:
    """Whether a run whose steps are all made has what a finished one has; pages that it lacks are made from the rest.

    Where more is missing, what somebody may have changed of the model is kept: it is about to be exported once more.
    """
    folder, config_text = run.folder, dump_config(run.config)
    written = folder / "config.yaml"
    if not run.total_steps and (folder / "summary.json").exists() and written.is_file():  # no checkpoint tells
        changed = changed_keys(load_config(written), run.config)
        if texts := [f"{key} was {was} and is {now}" for key, (was, now) in changed.items()]:
            raise ValueError(f"{folder}: holds a run of another config: {', '.join(texts)}; {REMEDY}")
    if not written.is_file() or config_text.startswith(written.read_text(errors="replace")):
        write_text(written, config_text)
    why = unfinished(folder, run.total_steps)
    if why is None:
        lacked = unmade(folder)
        write_pages(folder, lacked)
        print(f"this run is already finished; `--resume never` starts it anew\n{printable_lines(closing(folder))}")
        if lacked:
            print_info(run.config, f"made again    {', '.join(lacked)}")
        return True
    if (folder / "summary.json").exists():  # it came to its end before, and all had time to look at it
        print_info(run.config, f"made again    what the end of this run leaves: {why}")
        if (folder / "final").exists() and not is_untouched(folder):
            older = unused_name(folder / "final")
            (folder / "final").rename(older)
            print_info(run.config, f"moved the model that was there to {short_path(older)}")
    return False


def report_failure(folder: Path, cause: BaseException) -> int:
    """Says what ended a run and keeps all of it in error.log; returns the exit status."""
    with suppress(OSError):  # a full disk may be what it is about
        write_text(folder / "error.log", "".join(traceback.format_exception(cause)))
    reason = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[-1]}"
    if "OutOfMemory" in reason and "CUDA" not in reason:  # of a GPU, torch says itself what was full
        reason = "the memory of a machine was full, whoever filled it, and Ray ended processes of this run"
    print_error(f"error: {reason}; all of it is in {short_path(folder / 'error.log')}{memory_advice(cause)}")
    return FAILED


def report_end(run: Run, loader: Loader, outcome: Outcome, asked_by: int | None) -> int:
    """Says why a run ended before it was done; returns the exit status. ValueError where its model was refused."""
    match outcome.status:
        case "refused":
            raise ValueError(outcome.message)
        case "poisoned":
            ids = printable(", ".join(ids_of_step(loader, outcome.step)))
            print_error(
                f"error: step {outcome.step + 1} was begun {DEATHS} times and its workers ended in it each time: by "
                f"one of its samples, or from outside, as by a machine that has no memory left or by a person. Its "
                f"samples are {ids}. The same command tries it again"
            )
            return FAILED
        case "failed":
            print_error(f"error: {outcome.message}")
            return FAILED
        case "interrupted":
            print("ended at once; the same command goes on from the newest checkpoint, if there is one yet")
        case _:
            print(f"saved at step {outcome.step} of {run.total_steps}; the same command goes on from there")
    return 128 + (asked_by or signal.SIGINT)


def ids_of_step(loader: Loader, step: int) -> list[str]:
    """The ids of a step's samples."""
    places = [loader.plan.locate(number) for row in loader.plan.rows(step, step + 1) for number in row["samples"]]
    return [loader.sources[table].uid(row) for table, row in places]


def memory_advice(error: BaseException) -> str:
    """What to change where the memory was not enough, as far as an error tells."""
    text = str(error)
    if "OutOfMemory" in text or "low on memory" in text:
        sure = "if it was this run's"
    elif "SIGKILL" in text or "unexpectedly" in text:
        sure = "a process was ended from outside, as a machine does that has no memory left"
    else:
        return ""
    return (
        f"\n{sure}: --dry-run tells what a worker takes; lower micro_batch_tokens, micro_batch_size, "
        f"model.logits_memory_mib or cluster.num_workers; the same command goes on from the newest checkpoint there is"
    )


def run_here(run: Run, loader: Loader, on_metrics: OnMetrics = None) -> tuple[Outcome, int | None]:
    """Everything in this process, without Ray: `cluster.num_workers: 0`."""
    run = with_threads(run, run.config.cluster.threads_per_worker or os.cpu_count() or 1)

    def work() -> Outcome:
        return train_worker(run, Worker(), lambda step: local_batches(loader, step, run.total_steps), loader.batch_of)

    try:
        return watch(run, work, on_metrics=on_metrics)
    finally:
        shutil.rmtree(run.waiting_file.parent, ignore_errors=True)  # what was told on the way
