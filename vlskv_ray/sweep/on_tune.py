"""Trials on Ray Tune, each a run like any other in a process of its own."""

import os
import time
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from vlskv_ray.cluster.shares import Cluster, check_gpus, reserve
from vlskv_ray.command import DONE, FAILED
from vlskv_ray.config import Config
from vlskv_ray.launch.driver import train
from vlskv_ray.report.figures import at, read_run
from vlskv_ray.storage.checkpoint import newest_step
from vlskv_ray.sweep.sweep import LOG, METRICS, Sweep, known_trials
from vlskv_ray.sweep.trials import DONE as TRIAL_DONE
from vlskv_ray.sweep.trials import FAILED as TRIAL_FAILED
from vlskv_ray.sweep.trials import STOPPED, SweepTable, Trial, end, outcome_of, trial_of
from vlskv_ray.words import printable_lines

QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # of files that nobody reads
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails has none
    "RAY_AIR_NEW_OUTPUT": "0",  # whose tables would come between the lines of ours
}


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


def tune_callback(sweep: Sweep, table: SweepTable) -> Any:
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
