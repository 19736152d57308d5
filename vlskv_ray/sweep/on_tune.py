"""Trials on Ray Tune, each a run like any other in a process of its own.

Tune decides which trial runs when, and which is stopped early. It is told figures for that alone: what a trial has come
to stands in its folder, by which a later sweep goes on, and Ray's own records are thrown away.
"""

import os
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from vlskv_ray.command import DONE, FAILED
from vlskv_ray.config import Config
from vlskv_ray.launch.driver import train
from vlskv_ray.report.run_files import at, read_run
from vlskv_ray.storage.checkpoint import newest_step
from vlskv_ray.sweep.sweep import LOG, METRICS, Sweep, known_trials
from vlskv_ray.sweep.table import SweepTable
from vlskv_ray.sweep.trial_resources import trial_takes, with_share
from vlskv_ray.sweep.trials import TRIAL_DONE, TRIAL_FAILED, TRIAL_STOPPED, Trial, outcome_of, trial_of, write_outcome
from vlskv_ray.words import printable_lines

QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # of files that nobody reads
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails has none
    "RAY_AIR_NEW_OUTPUT": "0",  # whose tables would come between the lines of ours
}
FINAL_FIGURES = {"eval_kl_mean": "kl_mean", "eval_accuracy": "accuracy"}
"""What metrics.jsonl and evaluation.json call the same figures."""
NO_RESULT = {"step": 0}
"""Reported where there is nothing to report: without any result Tune says so in the middle of the table."""


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
        # trials end by themselves, so `max_t` is out of reach; none is stopped before it was measured once
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
            name=f"attempt-{time.time_ns()}",  # a new one each time, so that Tune finds nothing to resume
            storage_path=str(sweep.folder / "ray"),
            failure_config=ray_tune.FailureConfig(max_failures=config.cluster.max_failures),
            verbose=0,
            callbacks=[tune_callback(sweep, table)],
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
        ray_tune.report(NO_RESULT)
        return
    folder.mkdir(parents=True, exist_ok=True)
    # before `run_on_ray` would: it finds Ray running, and takes that for a cluster that was joined
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", str(int(sweep.joined)))

    def tell(metrics: dict[str, Any]) -> None:
        if METRICS[sweep.metric] in metrics:
            ray_tune.report({name: metrics[name] for name in ("step", *METRICS.values()) if name in metrics})

    with open(folder / LOG, "a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        try:
            is_new = not newest_step(folder / "checkpoints")
            if os.path.isdir(sweep.working_dir):  # another machine may lack it
                os.chdir(sweep.working_dir)
            config = with_share(sweep.config_of(trial), sweep, is_new)
            status = train(config, num_samples=sweep.num_samples, on_metrics=tell)
        except ValueError as error:
            print(printable_lines(str(error)))
            status = FAILED
    if status > 128:  # ended by a signal: asked to stop, it is saved and has not come to its end
        ray_tune.report(NO_RESULT)
    elif status == DONE:
        run = read_run(folder)
        answers = at(run.evaluation, "student") or at(run.evaluation, "sft_model") or {}
        write_outcome(folder, trial, TRIAL_DONE, num_samples=sweep.num_samples)
        figures = {name: answers.get(key) for name, key in FINAL_FIGURES.items()}
        ray_tune.report({"step": at(run.summary, "steps")} | {k: v for k, v in figures.items() if v is not None})
    else:
        write_outcome(folder, trial, TRIAL_FAILED, reason_in(folder / LOG))
        ray_tune.report(NO_RESULT)


def reason_in(log: Path) -> str:
    """Why a trial failed: the last error that its command printed, or the last line where it printed none."""
    lines = log.read_text().strip().splitlines()
    reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    return reason.removeprefix("error: ")


def tune_callback(sweep: Sweep, table: SweepTable) -> Any:
    """What Tune tells of trials as they begin and end, in this process."""
    from ray import tune as ray_tune

    class Watcher(ray_tune.Callback):
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            table.begin(trial_of(values_of(trial.config)))

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            ours = trial_of(values_of(trial.config))  # without an outcome, it is the scheduler that has ended it
            if outcome_of(sweep.trials / ours.name) is None and not sweep.stop_file.exists():
                write_outcome(sweep.trials / ours.name, ours, TRIAL_STOPPED, num_samples=sweep.num_samples)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            ours = trial_of(values_of(trial.config))
            lines = [line for line in str(trial.get_error() or "").splitlines() if line.strip()]
            if not sweep.stop_file.exists():
                reason = f"its process ended ({lines[-1].strip()})" if lines else "its process ended"
                write_outcome(sweep.trials / ours.name, ours, TRIAL_FAILED, reason)

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
        if answers.get(FINAL_FIGURES[metric]) is not None:
            points.append(trial.values)
            rewards.append(answers[FINAL_FIGURES[metric]])
    known = {"points_to_evaluate": points, "evaluated_rewards": rewards} if points else {}
    seed = config.seed + len(points)  # the same seed would draw once more what was drawn first
    return OptunaSearch(space, metric=metric, mode=mode, seed=seed, **known)
