"""A sweep: its folder, its trials, and which of them are still to be made."""

import functools
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlskv_ray.config import Config, ConfigError, changed_keys, load_config
from vlskv_ray.config.problems import no_option
from vlskv_ray.model.build import find_model, swiftkv_config
from vlskv_ray.model.build import load_config as load_model_config
from vlskv_ray.report.figures import at, read_run
from vlskv_ray.report.finished import is_finished
from vlskv_ray.sweep.trials import DONE as TRIAL_DONE
from vlskv_ray.sweep.trials import FAILED as TRIAL_FAILED
from vlskv_ray.sweep.trials import Trial, outcome_of, trials_of

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
        model = config.model
        if model.teacher_cache == "disk" and model.teacher_cache_dir is None:
            shared = self.folder.parent / ".teacher-cache"
            config = config.model_copy(update={"model": model.model_copy(update={"teacher_cache_dir": str(shared)})})
        return config


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
