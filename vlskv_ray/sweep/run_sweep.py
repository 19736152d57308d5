"""A whole sweep: the teacher caches filled, the trials that are missing made, the frontier drawn.

While trials run in Ray Tune's thread, the main thread draws their table, takes signals and notices where none can run.
"""

import argparse
import math
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from vlskv_ray.cluster.placement import Wait, room_for
from vlskv_ray.cluster.shares import Cluster
from vlskv_ray.cluster.start import has_unmet_requests, ray_cluster, release_dead_placement_groups
from vlskv_ray.command import DONE, FAILED, print_info
from vlskv_ray.config import Config, changed
from vlskv_ray.launch.cache_room import check_cache, teacher_cache_of
from vlskv_ray.launch.fill_cache import SeveralCaches, fill_ahead, samples_seen
from vlskv_ray.launch.prepare import prepare
from vlskv_ray.launch.watch import run_in_thread, signals_to
from vlskv_ray.report.run_files import at, read_run
from vlskv_ray.sweep.frontier_page import write_frontier
from vlskv_ray.sweep.on_tune import QUIET, run_trials
from vlskv_ray.sweep.space import num_key_value_layers_of
from vlskv_ray.sweep.sweep import Sweep, known_trials, missing_trials, refuse_other_options
from vlskv_ray.sweep.table import SweepTable
from vlskv_ray.sweep.trial_resources import concurrent_trials, trial_takes
from vlskv_ray.sweep.trials import TRIAL_DONE, Trial, outcome_of
from vlskv_ray.training.objective import objective_of
from vlskv_ray.words import plural, short_path

ANY_STUDENT = {"model.num_key_value_layers": None, "model.key_value_group_size": None}
"""Left open: the teacher is the same, whatever its students are."""


def run_sweep(config: Config, sweep: Sweep, trials: list[Trial], command: Callable[[Trial], str]) -> int:
    """Makes the trials that are missing, and shows what came of all; returns the exit status.

    Args:
        config: of the sweep.
        sweep: its folder, and what its trials share.
        trials: of the space; none where they are drawn one by one.
        command: which trains a trial's setting once more.
    """
    shown = config.output.level in ("debug", "info")
    table = SweepTable(known_trials(config, sweep, trials), sweep.trials, config.epochs, shown)
    missing = missing_trials(sweep, trials)
    asked_by = None
    if missing or config.tune.search == "optuna":
        asked_by = make_trials(config, sweep, missing, table)
    table.update()
    trials = known_trials(config, sweep, trials)  # those that were drawn are known only now
    done = sum((outcome_of(sweep.trials / trial.name) or {}).get("status") == TRIAL_DONE for trial in trials)
    if asked_by:
        print(f"stopped, {done} of {plural(len(trials), 'trial')} are done; the same command goes on with the others")
        return 128 + asked_by
    if objective_of(config).has_student:
        lines = write_frontier(sweep.folder, trials, config.tune.max_accuracy_drop, command)
        print_info(config, "\n".join(["", *lines, "", f"frontier: {short_path(sweep.folder / 'frontier.html')}"]))
    elif done:
        best = max(trials, key=lambda trial: accuracy_of(sweep, trial))
        print_info(config, f"highest accuracy: {best.name}, in {short_path(sweep.trials / best.name)}")
    else:
        print_info(config, "no trial came to its end")
    return DONE if done else FAILED


def accuracy_of(sweep: Sweep, trial: Trial) -> float:
    """What a plain model answers rightly; the least there is where that was not measured."""
    accuracy = at(read_run(sweep.trials / trial.name).evaluation, "sft_model", "accuracy")
    return -math.inf if accuracy is None else float(accuracy)


def train_command(options: argparse.Namespace, overrides: list[str], config: Config, trial: Trial) -> str:
    """The command that trains a trial's setting as a run of its own, named after sweep and trial."""
    kept = [override for override in overrides if not override.removeprefix("--").startswith(("tune.", "output.name"))]
    if options.num_samples is not None:
        kept.append(f"--num-samples={options.num_samples}")
    words = ["python", "-m", "vlskv_ray.train", "--config", options.config, *kept, *trial.overrides]
    return shlex.join([*words, f"output.name={config.output.name}-{trial.name}"])


# ---------------------------------------------------------------------------------------------------------- the trials
def make_trials(config: Config, sweep: Sweep, missing: list[Trial], table: SweepTable) -> int | None:
    """Makes trials on the cluster there is, or on this machine; returns the signal that asked for a stop, if one did.

    ValueError where one of them was begun with other options; NoRoom where others hold the cluster for too long.
    """
    asked_by = None
    os.environ.update(QUIET)
    quiet = config.output.level != "debug"
    with stopped_early() as early, ray_cluster(config.cluster.address, quiet) as cluster, ExitStack() as held:
        at_once = concurrent_trials(config, cluster, len(missing) or config.tune.draws)
        share = cluster.cpus / at_once
        if not config.cluster.most_workers:
            share = min(share, cluster.largest_node)  # such a trial is one process, which is on one node
        sweep = replace(sweep, cpus_per_trial=share, largest_node=cluster.largest_node, joined=cluster.joined)
        where = "joined a cluster of" if cluster.joined else "started Ray on this machine,"
        print_info(config, f"cluster       {where} {cluster.cpus:g} CPUs: {plural(at_once, 'trial')} at a time")
        for trial in missing:
            refuse_other_options(sweep, trial)  # all of them before the first: none is made in vain
        fill_caches(config, sweep, missing, cluster, held, quiet=not table.shown)
        bundles = trial_takes(config, sweep)
        wait = Wait(config.cluster.wait_seconds, lambda text: print_info(config, text))
        with room_for(bundles, "a trial", wait):  # given back at once: later ones have their own waits
            pass
        try:
            asked_by = run_with_table(
                sweep, table, lambda: run_trials(config, sweep, missing, table, at_once), Shortage(bundles, wait)
            )
        finally:
            shutil.rmtree(sweep.folder / "ray", ignore_errors=True)  # trials' folders are all that is resumed from
    return asked_by or early.signal


def fill_caches(
    config: Config, sweep: Sweep, trials: Sequence[Trial], cluster: Cluster, held: ExitStack, quiet: bool
) -> None:
    """Fills the teacher caches of all trials ahead, those of one teacher by one pass over the samples.

    Args:
        config: of the sweep.
        sweep: whose trials these are.
        trials: which are about to be made.
        cluster: that does it.
        held: keeps the caches until the sweep is over.
        quiet: nothing is told of it.
    """
    together: dict[str, list[Config]] = {}  # trials that ask one teacher about the same samples
    for trial in trials:
        of_trial = sweep.config_of(trial)
        if of_trial.model.teacher_cache != "off":
            model = changed(of_trial, ANY_STUDENT).model
            of_plan = (of_trial.seed, of_trial.epochs, of_trial.max_steps, of_trial.micro_batch_size)
            together.setdefault(str((model, of_trial.data, of_plan)), []).append(of_trial)
    for configs in together.values():
        run, loader = prepare(configs[0], num_samples=sweep.num_samples)
        caches = {n: teacher_cache_of(run, n) for n in sorted(set(map(num_key_value_layers_of, configs)))}
        for cache in caches.values():
            held.enter_context(cache.in_use())  # one in memory would go with the first trial that ends
            check_cache(replace(run, cache=cache), loader)
        seen = len(samples_seen(run, loader))
        if all(cache.count() >= seen for cache in caches.values()):
            print_info(config, f"teacher cache {plural(seen, 'sample')} are there")
        else:
            fill_ahead(run, replace(loader, cache=None), SeveralCaches(caches), cluster, quiet=quiet)


@dataclass
class Shortage:
    """Notices that no trial runs since others hold what one takes, for which Tune would wait for ever."""

    bundles: list[dict[str, float]]
    wait: Wait

    def look(self, table: SweepTable) -> None:
        """NoRoom where that lasts for too long."""
        if any(row.is_running for row in table.rows.values()) or not has_unmet_requests():
            self.wait.ends()
            return
        tell_at = self.wait.tell_at
        self.wait.goes_on(self.bundles, "a trial")
        if self.wait.tell_at != tell_at:  # it has printed
            table.draw_below()


def run_with_table(sweep: Sweep, table: SweepTable, work: Callable[[], None], shortage: Shortage) -> int | None:
    """Runs `work` in a thread while this one shows the table and takes signals; the signal that asked for a stop.

    Raises what `work` raised, unless a stop was asked for; NoRoom where no trial can run for too long.
    """
    asked: list[int] = []

    def stop(number: int) -> None:
        asked.append(number)
        sweep.stop_file.touch()
        if len(asked) == 1:
            print("\nstopping, trials that run are saved (once more to end at once)", flush=True)
            table.draw_below()

    def look() -> bool:
        table.update()
        if not asked:
            shortage.look(table)
        release_dead_placement_groups()  # trials that were stopped early, or died, and had workers
        for row in table.rows.values() if asked else ():  # each time: a trial removes what lies there when it begins
            if row.is_running and row.folder.exists():
                (row.folder / "STOP").touch()
        return len(asked) > 1

    with signals_to(stop):
        ended = run_in_thread(work, look, every=0.5)
    if ended is not None and not asked:
        ended.result()
    return asked[0] if asked else None


@dataclass
class Early:
    """The signal that ended something before its time, if one did."""

    signal: int | None = None


@contextmanager
def stopped_early() -> Iterator[Early]:
    """Takes a stop that comes while trials are prepared: there is nothing to save then."""
    early = Early()
    try:
        yield early
    except KeyboardInterrupt:
        early.signal = signal.SIGINT
    except SystemExit as error:  # SIGTERM, see `exit_status`
        early.signal = signal.SIGTERM if error.code == 128 + signal.SIGTERM else None
        if early.signal is None:
            raise
