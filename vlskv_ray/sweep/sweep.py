"""A sweep: its folder, and which of its trials are still to be made.

The folders of trials, named by their values, are all that a sweep is resumed from. So a trial that is there counts only
where it was made with the options that it would have now.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlskv_ray.config import Config, changed, changed_keys, load_config
from vlskv_ray.launch import prepare
from vlskv_ray.report.finished import is_finished
from vlskv_ray.sweep.trials import OUTCOME_FILE, TRIAL_DONE, TRIAL_FAILED, Trial, outcome_of

LOG = "log.txt"
"""In a trial's folder: what its command would have printed."""
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
        if config.model.teacher_cache == "disk" and config.model.teacher_cache_dir is None:
            config = changed(config, {"model.teacher_cache_dir": str(self.folder.parent / ".teacher-cache")})
        return config


def settle_dtype(config: Config, stored: Path) -> Config:
    """The config of a sweep with model.dtype=auto settled for all of its trials, which may be on machines of several
    kinds and are compared: as it is stored, where the sweep goes on, else by this machine."""
    if config.model.dtype != "auto" or {"model.dtype", "model.name_or_path"} & config.tune.space.keys():
        return config
    before = load_config(stored).model.dtype if stored.exists() else "auto"
    return prepare.settle_dtype(config) if before == "auto" else changed(config, {"model.dtype": before})


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


def missing_trials(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """The trials that are still to be made; what says that one of them has ended is removed.

    One that failed is made again. ValueError where one that is over was begun with other options.
    """
    missing = []
    for trial in trials:
        folder = sweep.trials / trial.name
        status = (outcome_of(folder) or {}).get("status")
        if status == TRIAL_FAILED or (status == TRIAL_DONE and not is_finished(folder)):
            (folder / OUTCOME_FILE).unlink()
            status = None
        if status is None:
            missing.append(trial)
        else:
            refuse_other_options(sweep, trial)
    return missing


def refuse_other_options(sweep: Sweep, trial: Trial) -> None:
    """ValueError where a trial was begun with other options than it would have now."""
    file = sweep.trials / trial.name / "config.yaml"
    outcome = outcome_of(file.parent)
    if not file.exists():
        return
    before, now = load_config(file), sweep.config_of(trial)
    if before.model.num_key_value_layers is not None:  # a run writes down what was left open
        same = {
            f"model.{name}": getattr(before.model, name)
            for name in ("num_key_value_layers", "key_value_group_size", "start", "revision", "dtype")
            if getattr(now.model, name) in (None, "auto")
        }
        now = changed(now, same)
    if now.data.max_length is None:
        now = changed(now, {"data.max_length": before.data.max_length})
    differences = changed_keys(before, now)
    for name in ("sources", "num_samples", "max_new_tokens"):  # else figures of other questions would be compared
        was, wanted = getattr(before.evaluation, name), getattr(now.evaluation, name)
        if was != wanted:
            differences[f"evaluation.{name}"] = (was, wanted)
    if outcome is not None and outcome.get("num_samples") != sweep.num_samples:
        differences["--num-samples"] = (outcome.get("num_samples"), sweep.num_samples)
    if differences:
        told = ", ".join(f"{key} was {was} and is {now}" for key, (was, now) in differences.items())
        raise ValueError(
            f"{file.parent}: this trial was begun with other options: {told}; use --resume never to start the sweep "
            f"anew, or another output.name"
        )
