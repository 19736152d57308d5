"""A whole sweep: caches filled, trials run, the frontier drawn."""

import argparse
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from vlskv_ray.cluster.placement import Wait, room_for
from vlskv_ray.cluster.shares import Cluster
from vlskv_ray.cluster.start import has_unmet_requests, ray_cluster, release_dead_placement_groups
from vlskv_ray.command import DONE, FAILED, print_info
from vlskv_ray.config import Config
from vlskv_ray.launch.caches import check_cache, teacher_cache_of
from vlskv_ray.launch.fill_cache import SeveralCaches, fill_ahead, samples_seen
from vlskv_ray.launch.prepare import prepare
from vlskv_ray.sweep.frontier import train_command, write_frontier
from vlskv_ray.sweep.on_tune import QUIET, concurrent_trials, run_trials, trial_takes
from vlskv_ray.sweep.sweep import Sweep, accuracy_of, check_model, is_over, known_trials, refuse_other_options
from vlskv_ray.sweep.trials import DONE as TRIAL_DONE
from vlskv_ray.sweep.trials import SweepTable, Trial, outcome_of
from vlskv_ray.words import plural, short_path


def command_of(options: argparse.Namespace, overrides: list[str], config: Config, trial: Trial) -> str:
    kept = [override for override in overrides if not override.removeprefix("--").startswith(("tune.", "output.name"))]
    if options.num_samples is not None:
        kept.append(f"--num-samples={options.num_samples}")
    return train_command(options.config, kept, trial, str(config.output.name))


def run_sweep(config: Config, sweep: Sweep, trials: list[Trial], command: Callable[[Trial], str]) -> int:
    """Runs what is to be run, and draws the frontier; the exit status."""
    known = known_trials(config, sweep, trials)
    to_do = [trial for trial in trials if not is_over(sweep, trial)]
    told = config.output.level in ("debug", "info")
    table = SweepTable(known, sweep.trials, config.epochs, shown=told)
    asked = None
    if to_do or config.tune.search == "optuna":
        os.environ.update(QUIET)
        quiet = config.output.level != "debug"
        with stopped_early() as early, ray_cluster(config.cluster.address, quiet) as cluster, ExitStack() as held:
            at_once = concurrent_trials(config, cluster, len(to_do) or config.tune.draws)
            share = min(cluster.cpus / at_once, cluster.largest_node)  # a trial's process is on one node
            share = cluster.cpus / at_once if config.cluster.most_workers else share
            sweep = replace(sweep, cpus_per_trial=share, largest_node=cluster.largest_node, joined=cluster.joined)
            where = "joined a cluster of" if cluster.joined else "started Ray on this machine,"
            print_info(config, f"cluster       {where} {cluster.cpus:g} CPUs: {plural(at_once, 'trial')} at a time")
            for trial in to_do:
                refuse_other_options(sweep, trial)
            fill_caches(config, sweep, to_do, cluster, held, told)
            bundles = trial_takes(config, sweep)
            wait = Wait(config.cluster.wait_seconds, lambda text: print_info(config, text))
            with room_for(bundles, "a trial", wait):  # given back at once: later ones have their own waits
                pass
            try:
                asked = run_with_table(
                    sweep, table, lambda: run_trials(config, sweep, to_do, table, at_once), Starved(bundles, wait)
                )
            finally:
                shutil.rmtree(sweep.folder / "ray", ignore_errors=True)  # trials' folders are all that is resumed from
        asked = asked or early.signal
    table.update()
    trials = known_trials(config, sweep, trials)
    done = sum((outcome_of(sweep.trials / trial.name) or {}).get("status") == TRIAL_DONE for trial in trials)
    if asked:
        print(f"stopped, {done} of {plural(len(trials), 'trial')} are done; the same command goes on with the others")
        return 128 + asked
    if config.objective == "distill":
        lines = write_frontier(sweep.folder, trials, config.tune.max_accuracy_drop, command)
        print_info(config, "\n".join(["", *lines, "", f"frontier: {short_path(sweep.folder / 'frontier.html')}"]))
    elif done:
        best = max(trials, key=lambda trial: accuracy_of(sweep, trial))
        print_info(config, f"highest accuracy: {best.name}, in {short_path(sweep.trials / best.name)}")
    else:
        print_info(config, "no trial came to its end")
    return DONE if done else FAILED


def fill_caches(
    config: Config, sweep: Sweep, trials: Sequence[Trial], cluster: Cluster, held: ExitStack, told: bool
) -> None:
    """Fills the teacher caches of all trials ahead, those of one teacher by one pass over the samples."""
    together: dict[str, list[Config]] = {}
    for trial in trials:
        of_trial = sweep.config_of(trial)
        if of_trial.model.teacher_cache != "off":
            model = of_trial.model.model_copy(update={"num_key_value_layers": None, "key_value_group_size": None})
            of_plan = (of_trial.seed, of_trial.epochs, of_trial.max_steps, of_trial.micro_batch_size)
            together.setdefault(str((model, of_trial.data, of_plan)), []).append(of_trial)
    for configs in together.values():
        run, loader = prepare(configs[0], num_samples=sweep.num_samples)
        caches = {layer: teacher_cache_of(run, layer) for layer in sorted(set(map(check_model, configs)))}
        for cache in caches.values():
            held.enter_context(cache.in_use())  # one in memory would go with the first trial that ends
            check_cache(replace(run, cache=cache), loader)
        seen = len(samples_seen(run, loader))
        if all(cache.count() >= seen for cache in caches.values()):
            print_info(config, f"teacher cache {plural(seen, 'sample')} are there")
        else:
            fill_ahead(run, replace(loader, cache=None), SeveralCaches(caches), cluster, quiet=not told)


@dataclass
class Starved:
    """Notices that no trial runs since others hold what one takes, for which Tune would wait for ever."""

    bundles: list[dict[str, float]]
    wait: Wait

    def look(self, table: SweepTable) -> None:
        runs = any(row.began is not None and row.outcome is None for row in table.rows.values())
        if runs or not has_unmet_requests():
            self.wait.ends()
            return
        tell_at = self.wait.tell_at
        self.wait.goes_on(self.bundles, "a trial")
        if self.wait.tell_at != tell_at:
            table.drawn = 0  # what was told stays above the table


def run_with_table(sweep: Sweep, table: SweepTable, work: Callable[[], None], starved: Starved) -> int | None:
    """Runs `work` in a thread while this one shows the table and takes signals; the signal that asked for a stop.

    NoRoom where no trial can run for too long.
    """
    failure: list[BaseException] = []
    asked: list[int] = []

    def target() -> None:
        try:
            work()
        except BaseException as error:  # raised again below, in the thread that can report it
            failure.append(error)

    def stop(signum: int, frame: Any) -> None:
        asked.append(signum)
        sweep.stop_file.touch()
        if len(asked) == 1:
            print("\nstopping, trials that run are saved (once more to end at once)", flush=True)
            table.drawn = 0

    with on_signals(stop):
        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        while thread.is_alive() and len(asked) < 2:
            thread.join(0.5)
            table.update()
            if not asked:
                starved.look(table)
            release_dead_placement_groups()  # trials that were stopped early, or died, and had workers
            for row in table.rows.values() if asked else ():
                if row.began is not None and row.outcome is None and row.folder.exists():
                    (row.folder / "STOP").touch()
    if failure and not asked:
        raise failure[0]
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


@contextmanager
def on_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
