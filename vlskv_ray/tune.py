"""The command `python -m vlskv_ray.tune`: trials over a space of options on Ray Tune, and the frontier they draw.

Each trial is a run like any other, by the driver function of `vlskv_ray.train`, in a folder named by its values. That
is all that a sweep is resumed from: trials that have come to their end are not made again, others go on from their
checkpoints; Ray's own records are thrown away.
"""

import argparse
import functools
import importlib.util
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlskv_ray.cache import SeveralCaches, fill_ahead, samples_of
from vlskv_ray.cluster.placement import Wait, room_for
from vlskv_ray.cluster.start import Cluster, asks_in_vain, check_gpus, free_what_the_dead_reserved, ray_cluster, reserve
from vlskv_ray.command import DONE, FAILED, exit_status, plural, run_parser, shown
from vlskv_ray.config import Config, ConfigError, changed_keys, dump_config, load_config, load_config_and_notices
from vlskv_ray.config.problems import no_option
from vlskv_ray.launch.prepare import check_cache, prepare, run_folder, say, teacher_cache_of
from vlskv_ray.model.build import find_model, swiftkv_config
from vlskv_ray.model.build import load_config as load_model_config
from vlskv_ray.report.figures import at, read_run
from vlskv_ray.report.finished import is_finished
from vlskv_ray.storage.checkpoint import newest_step, write_text
from vlskv_ray.storage.lease import owned
from vlskv_ray.sweep.frontier import train_command, write_frontier
from vlskv_ray.sweep.trials import DONE as TRIAL_DONE
from vlskv_ray.sweep.trials import FAILED as TRIAL_FAILED
from vlskv_ray.sweep.trials import STOPPED, SweepTable, Trial, end, outcome_of, trial_of, trials_of
from vlskv_ray.train import moved_aside, train
from vlskv_ray.words import printable_lines

LOG = "log.txt"
"""In a trial's folder: what its command would have printed."""
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # of files that nobody reads
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails has none
    "RAY_AIR_NEW_OUTPUT": "0",  # whose tables would come between the lines of ours
}
METRICS = {"kl": "eval_kl_mean", "accuracy": "eval_accuracy"}
"""What `tune.metric` is called in metrics.jsonl."""


@dataclass(frozen=True)
class Sweep:
    """What every trial is told, the same for all of them; it travels to their processes."""

    folder: Path
    """On storage that all machines share; holds the config."""
    metric: str
    num_samples: int | None = None
    cpus_per_trial: float = 1.0
    largest_node: float = 0.0
    joined: bool = False
    working_dir: str = ""
    """Where the command was started: what relative paths in the space are relative to."""

    @property
    def trials(self) -> Path:
        return self.folder / "trials"

    @property
    def stop_file(self) -> Path:
        """Asks for a stop: trials that run save and leave, others do not begin."""
        return self.folder / "STOP"

    def config_of(self, trial: Trial) -> Config:
        """What a trial runs, but for its share of the cluster."""
        ours = [f"output.dir={self.trials}", f"output.name={trial.name}", "output.level=warning"]
        config = load_config(self.folder / "config.yaml", [*trial.overrides, *ours])
        model = config.model
        if model.teacher_cache == "disk" and model.teacher_cache_dir is None:
            shared = self.folder.parent / ".teacher-cache"
            config = config.model_copy(update={"model": model.model_copy(update={"teacher_cache_dir": str(shared)})})
        return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = run_parser("tune", "Tries settings (tune.space of the config), and says which to take.")
    parser.add_argument("--dry-run", action="store_true", help="list the trials and end")
    parser.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="auto: go on with an interrupted sweep of this name if there is one; never: start anew, an older one is "
        "moved aside; must: fail where there is nothing to go on with",
    )
    options, overrides = parser.parse_known_args(arguments)
    return exit_status(lambda: tune(options, overrides))


def tune(options: argparse.Namespace, overrides: list[str]) -> int:
    """Does what the options say. ValueError for what the user can mend."""
    config, notices = load_config_and_notices(options.config, overrides)
    if notices:
        say(config, "\n".join(notices))
    check(config)
    trials, impossible = possible_trials(config, options.config, overrides)
    folder = run_folder(config)
    is_drawn = config.tune.search == "optuna"
    count = f"up to {plural(config.tune.draws, 'trial')}" if is_drawn else plural(len(trials), "trial")
    say(config, f"sweep         {count} over {', '.join(config.tune.space)}, into {shown(folder)}")
    for name, reason in impossible.items():
        say(config, f"left out      {name}: {reason}")
    if options.dry_run:
        print("\n".join(trial.name for trial in trials) or "optuna draws them as trials end")
        return DONE
    if options.resume == "never" and folder.exists():
        say(config, f"moved the older sweep to {shown(moved_aside(folder))}")
    if options.resume == "must" and not (folder / "trials").exists():
        raise ValueError(f"{folder}: --resume must was given, but there is no sweep to go on with")
    with owned(folder):
        if (folder / "metrics.jsonl").exists():
            raise ValueError(f"{folder}: holds a run, which a sweep does not touch; use another output.name")
        write_text(folder / "config.yaml", dump_config(config))
        sweep = Sweep(folder, config.tune.metric, options.num_samples, working_dir=os.getcwd())
        sweep.trials.mkdir(exist_ok=True)
        sweep.stop_file.unlink(missing_ok=True)
        return run_sweep(config, sweep, trials, lambda trial: command_of(options, overrides, config, trial))


def check(config: Config) -> None:
    """ValueError where a sweep would end with nothing to choose by."""
    options = config.tune
    if not options.space:
        raise ValueError(
            "tune.space: nothing to try; wanted options and their values, such as "
            "{model.num_key_value_layers: [2, 4], optimizer.lr: {loguniform: [1e-4, 1e-2]}}"
        )
    for key in options.space:
        if problem := no_option(key):
            raise ValueError(f"tune.space: {key}: {problem}")
    if not config.evaluation.sources:
        raise ValueError("evaluation.sources: missing; trials are compared by what they answer to held-out samples")
    if options.scheduler == "asha" and config.evaluation.every_steps is None:
        raise ValueError("evaluation.every_steps: missing; tune.scheduler=asha stops trials by what is measured so")
    if config.objective == "sft" and options.metric == "kl":
        raise ValueError("tune.metric: kl, but objective=sft has no teacher; use accuracy")
    if options.search == "optuna" and options.draws == 1:
        raise ValueError(
            "tune.draws: 1 trial; wanted as many as tune.search=optuna shall make, lists are drawn from too"
        )
    if options.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise ValueError("tune.search: optuna is not installed; `pip install optuna`, or use search=random")


def possible_trials(config: Config, file: str, overrides: list[str]) -> tuple[list[Trial], dict[str, str]]:
    """The trials that this model can have, and why it cannot have others.

    ValueError where it can have none; ConfigError for values that no model could have.
    """
    if config.tune.search == "optuna":
        return [], {}
    possible, impossible = [], {}
    for trial in trials_of(config):
        try:
            check_model(load_config(file, [*overrides, *trial.overrides]))
            possible.append(trial)
        except ConfigError as error:
            raise ValueError(f"tune.space: {str(error).replace('command line: ', '')}") from error
        except ValueError as error:
            impossible[trial.name] = str(error)
    if not possible:
        raise ValueError(f"tune.space: none of its {len(impossible)} trials can be: {next(iter(impossible.values()))}")
    return possible, impossible


def check_model(config: Config) -> int:
    """The N of a run, 0 where it trains all of a model. ValueError where the model cannot have it."""
    if config.objective == "sft":
        return 0
    model = config.model
    wanted = model_config_of(model.name_or_path, model.revision)
    layers: int = swiftkv_config(
        wanted, model.num_key_value_layers, model.key_value_group_size
    ).text_config.num_key_value_layers
    return layers


@functools.lru_cache(maxsize=16)
def model_config_of(name_or_path: str, revision: str | None) -> Any:
    return load_model_config(find_model(name_or_path, revision))


def command_of(options: argparse.Namespace, overrides: list[str], config: Config, trial: Trial) -> str:
    kept = [override for override in overrides if not override.removeprefix("--").startswith(("tune.", "output.name"))]
    if options.num_samples is not None:
        kept.append(f"--num-samples={options.num_samples}")
    return train_command(options.config, kept, trial, str(config.output.name))


# ----------------------------------------------------------------------------------------------------------- the sweep
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
            say(config, f"cluster       {where} {cluster.cpus:g} CPUs: {plural(at_once, 'trial')} at a time")
            for trial in to_do:
                refuse_other_options(sweep, trial)
            fill_caches(config, sweep, to_do, cluster, held, told)
            bundles = trial_takes(config, sweep)
            wait = Wait(config.cluster.wait_seconds, lambda text: say(config, text))
            with room_for(bundles, "a trial", wait):  # given back at once: later ones have their own waits
                pass
            try:
                asked = attend(
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
        say(config, "\n".join(["", *lines, "", f"frontier: {shown(sweep.folder / 'frontier.html')}"]))
    elif done:
        best = max(trials, key=lambda trial: accuracy_of(sweep, trial))
        say(config, f"highest accuracy: {best.name}, in {shown(sweep.trials / best.name)}")
    else:
        say(config, "no trial came to its end")
    return DONE if done else FAILED


def accuracy_of(sweep: Sweep, trial: Trial) -> float:
    accuracy = at(read_run(sweep.trials / trial.name).evaluation, "sft_model", "accuracy")
    return -math.inf if accuracy is None else float(accuracy)


def known_trials(config: Config, sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """The trials of the space; where optuna draws them, those that are there. What an earlier space had is none of it.

    ValueError where one that is there was begun with other options.
    """
    if config.tune.search != "optuna":
        return list(trials)
    found = []
    for folder in sorted(sweep.trials.iterdir()):
        outcome = outcome_of(folder)
        if outcome and outcome["values"].keys() == config.tune.space.keys():
            found.append(Trial(folder.name, outcome["values"]))
            refuse_other_options(sweep, found[-1])
    return found


def is_over(sweep: Sweep, trial: Trial) -> bool:
    """Whether a trial has come to its end with the options that it would have now; one that failed is tried again."""
    folder = sweep.trials / trial.name
    status = (outcome_of(folder) or {}).get("status")
    if status == TRIAL_FAILED or (status == TRIAL_DONE and not is_finished(folder)):
        (folder / "trial.json").unlink()
        return False
    if status is not None:
        refuse_other_options(sweep, trial)
    return status is not None


def refuse_other_options(sweep: Sweep, trial: Trial) -> None:
    """ValueError where a trial was begun with other options than it would have now."""
    file = sweep.trials / trial.name / "config.yaml"
    outcome = outcome_of(file.parent)
    if not file.exists():
        return
    before, now = load_config(file), sweep.config_of(trial)
    if before.model.num_key_value_layers is not None:  # a run writes down what was left open
        same = {
            name: getattr(before.model, name)
            for name in ("num_key_value_layers", "key_value_group_size", "revision", "dtype")
            if getattr(now.model, name) in (None, "auto")
        }
        now = now.model_copy(update={"model": now.model.model_copy(update=same)})
    if now.data.max_length is None:
        now = now.model_copy(update={"data": now.data.model_copy(update={"max_length": before.data.max_length})})
    changed = changed_keys(before, now)
    for name in ("sources", "num_samples", "max_new_tokens"):  # else figures of other questions would be compared
        was, wanted = getattr(before.evaluation, name), getattr(now.evaluation, name)
        if was != wanted:
            changed[f"evaluation.{name}"] = (was, wanted)
    if outcome is not None and outcome.get("num_samples") != sweep.num_samples:
        changed["--num-samples"] = (outcome.get("num_samples"), sweep.num_samples)
    if changed:
        told = ", ".join(f"{key} was {was} and is {now}" for key, (was, now) in changed.items())
        raise ValueError(
            f"{file.parent}: this trial was begun with other options: {told}; use --resume never to start the sweep "
            f"anew, or another output.name"
        )


def concurrent_trials(config: Config, cluster: Cluster, trials: int) -> int:
    """How many trials run at once: each has a CPU for every worker and one for its data, as far as there are so many.

    ValueError where more were asked for than can all have a worker and a data task, or where a trial lacks GPUs.
    """
    workers = config.cluster.most_workers
    needs = workers + 1 if workers else config.cluster.threads_per_worker or 1
    room = max(1, int(cluster.cpus // needs))
    if config.cluster.use_gpu:
        check_gpus(config.cluster, cluster.gpus)
        room = min(room, int(cluster.gpus // max(workers, 1)))
    count = min(config.tune.max_concurrent_trials or room, max(1, trials))
    if workers:
        reserve(config.cluster, config.data, cluster.cpus / count, cluster.largest_node)
    return count


def trial_takes(config: Config, sweep: Sweep) -> list[dict[str, float]]:
    """What a trial must have of the cluster to begin."""
    gpu = {"GPU": 1.0} if config.cluster.use_gpu else {}
    if not config.cluster.most_workers:
        return [{"CPU": sweep.cpus_per_trial} | gpu]
    reserved = reserve(config.cluster, config.data, sweep.cpus_per_trial, sweep.largest_node)
    worker, data_task = {"CPU": reserved.cpus_per_worker} | gpu, {"CPU": reserved.cpus_per_task}
    return [*[worker] * config.cluster.fewest_workers, data_task]


def with_share(config: Config, sweep: Sweep, is_new: bool) -> Config:
    """The config of a trial with what of the cluster it may use. One that goes on keeps its threads: they decide the
    last bits."""
    cluster, data = config.cluster, config.data
    threads = cluster.threads_per_worker
    if cluster.most_workers:
        reserved = reserve(cluster, data, sweep.cpus_per_trial, sweep.largest_node)
        data = data.model_copy(update={"cpus_per_task": reserved.cpus_per_task, "num_proc": reserved.num_tasks})
        cluster = cluster.model_copy(update={"cpus_per_worker": reserved.cpus_per_worker})
        threads = reserved.threads_per_worker
    if is_new:
        cluster = cluster.model_copy(update={"threads_per_worker": threads or max(1, int(sweep.cpus_per_trial))})
    return config.model_copy(update={"cluster": cluster, "data": data})


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
        seen = len(samples_of(run, loader))
        if all(cache.count() >= seen for cache in caches.values()):
            say(config, f"teacher cache {plural(seen, 'sample')} are there")
        else:
            fill_ahead(run, replace(loader, cache=None), SeveralCaches(caches), cluster, quiet=not told)


@dataclass
class Starved:
    """Notices that no trial runs since others hold what one takes, for which Tune would wait for ever."""

    bundles: list[dict[str, float]]
    wait: Wait

    def look(self, table: SweepTable) -> None:
        runs = any(row.began is not None and row.outcome is None for row in table.rows.values())
        if runs or not asks_in_vain():
            self.wait.ends()
            return
        tell_at = self.wait.tell_at
        self.wait.goes_on(self.bundles, "a trial")
        if self.wait.tell_at != tell_at:
            table.drawn = 0  # what was told stays above the table


def attend(sweep: Sweep, table: SweepTable, work: Callable[[], None], starved: Starved) -> int | None:
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
            free_what_the_dead_reserved()  # trials that were stopped early, or died, and had workers
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


# ------------------------------------------------------------------------------------------------------------- on Ray
def run_trials(config: Config, sweep: Sweep, trials: list[Trial], table: SweepTable, at_once: int) -> None:
    """Has Ray Tune run trials, until none is left or a stop is asked for."""
    from ray import tune as ray_tune

    options = config.tune
    metric, mode = METRICS[options.metric], "min" if options.metric == "kl" else "max"
    # of a trial with workers Ray asks nothing for the process that watches them: they hold what there is
    resources: dict[str, float] = {"memory": 1}
    if not config.cluster.most_workers:
        (resources,) = trial_takes(config, sweep)
    algorithm, space = None, {"values": ray_tune.grid_search([trial.values for trial in trials])}
    if options.search == "optuna":
        algorithm, space = optuna_search(config, sweep, metric, mode), {}
    count = config.tune.draws - len(known_trials(config, sweep, [])) if algorithm else 1
    if count < 1:
        return
    scheduler = None
    if options.scheduler == "asha":
        scheduler = ray_tune.schedulers.ASHAScheduler(
            time_attr="step", max_t=10**9, grace_period=config.evaluation.every_steps, reduction_factor=3
        )
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(ray_tune.with_parameters(run_trial, sweep=sweep), resources),
        param_space=space,
        tune_config=ray_tune.TuneConfig(
            metric=metric,
            mode=mode,
            search_alg=algorithm,
            scheduler=scheduler,
            num_samples=count,
            max_concurrent_trials=at_once,
        ),
        run_config=ray_tune.RunConfig(
            name=f"attempt-{time.time_ns()}",
            storage_path=str(sweep.folder / "ray"),
            failure_config=ray_tune.FailureConfig(max_failures=config.cluster.max_failures),
            verbose=0,
            callbacks=[watcher(sweep, table)],
        ),
    )
    tuner.fit()


def values_of(parameters: dict[str, Any]) -> dict[str, Any]:
    """A trial's values in what Tune calls its config."""
    values: dict[str, Any] = parameters.get("values", parameters)
    return values


def run_trial(parameters: dict[str, Any], *, sweep: Sweep) -> None:
    """One trial, in a process of its own; writes down how it ended, unless it was asked to stop."""
    from ray import tune as ray_tune

    trial = trial_of(values_of(parameters))
    folder = sweep.trials / trial.name
    if sweep.stop_file.exists():
        ray_tune.report(NOTHING)
        return
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", str(int(sweep.joined)))

    def tell(metrics: dict[str, Any]) -> None:
        if METRICS[sweep.metric] in metrics:
            ray_tune.report({name: metrics[name] for name in ("step", *METRICS.values()) if name in metrics})

    with open(folder / LOG, "a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        try:
            is_new = not newest_step(folder / "checkpoints")
            if os.path.isdir(sweep.working_dir):
                os.chdir(sweep.working_dir)
            config = with_share(sweep.config_of(trial), sweep, is_new)
            status = train(config, num_samples=sweep.num_samples, on_metrics=tell)
        except ValueError as error:
            print(printable_lines(str(error)))
            status = FAILED
    if status > 128:
        ray_tune.report(NOTHING)
    elif status == DONE:
        run = read_run(folder)
        answers = at(run.evaluation, "student") or at(run.evaluation, "sft_model") or {}
        end(folder, trial, TRIAL_DONE, num_samples=sweep.num_samples)
        figures = {name: answers.get(key) for name, key in FINAL.items()}
        ray_tune.report({"step": at(run.summary, "steps")} | {k: v for k, v in figures.items() if v is not None})
    else:
        lines = (folder / LOG).read_text().strip().splitlines()
        reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
        end(folder, trial, TRIAL_FAILED, reason.removeprefix("error: "))
        ray_tune.report(NOTHING)


NOTHING = {"step": 0}
"""Reported where there is nothing to report: without any result Tune says so in the middle of the table."""
FINAL = {"eval_kl_mean": "kl_mean", "eval_accuracy": "accuracy"}
"""What metrics.jsonl and evaluation.json call the same figures."""


def watcher(sweep: Sweep, table: SweepTable) -> Any:
    """What Tune tells of trials as they begin and end, in this process."""
    from ray import tune as ray_tune

    class Watcher(ray_tune.Callback):
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            table.begins(trial_of(values_of(trial.config)))

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            ours = trial_of(values_of(trial.config))
            if outcome_of(sweep.trials / ours.name) is None and not sweep.stop_file.exists():
                end(sweep.trials / ours.name, ours, STOPPED, num_samples=sweep.num_samples)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            ours = trial_of(values_of(trial.config))
            lines = [line for line in str(trial.get_error() or "").splitlines() if line.strip()]
            if not sweep.stop_file.exists():
                reason = f"its process ended ({lines[-1].strip()})" if lines else "its process ended"
                end(sweep.trials / ours.name, ours, TRIAL_FAILED, reason)

    return Watcher()


def optuna_search(config: Config, sweep: Sweep, metric: str, mode: str) -> Any:
    """Optuna, told of the trials that are there already."""
    from ray import tune as ray_tune
    from ray.tune.search.optuna import OptunaSearch

    space = {}
    for key, drawn in config.tune.space.items():
        [(how, values)] = drawn.items()
        space[key] = ray_tune.choice(values) if how in ("grid", "choice") else getattr(ray_tune, how)(*values)
    points, rewards = [], []
    for trial in known_trials(config, sweep, []):
        answers = at(read_run(sweep.trials / trial.name).evaluation, "student") or {}
        if answers.get(FINAL[metric]) is not None:
            points.append(trial.values)
            rewards.append(answers[FINAL[metric]])
    known = {"points_to_evaluate": points, "evaluated_rewards": rewards} if points else {}
    seed = config.seed + len(points)  # the same seed would draw once more what was drawn first
    return OptunaSearch(space, metric=metric, mode=mode, seed=seed, **known)


if __name__ == "__main__":
    sys.exit(main())
