"""The space of a sweep: what the config must say of it, the trials that it gives, and which of these a model can have.

All of it is settled before Ray is started: what is wrong with a space is told in a second, not after some trials.
"""

import functools
import itertools
import math
from typing import Any

import numpy as np

from vlskv_ray.config import Config, ConfigError, load_config
from vlskv_ray.model.build import find_model, swiftkv_config
from vlskv_ray.model.build import load_config as load_model_config
from vlskv_ray.sweep.trials import Trial, trial_of
from vlskv_ray.training.objective import objective_of


def possible_trials(config: Config, file: str, overrides: list[str]) -> tuple[list[Trial], dict[str, str]]:
    """The trials that this model can have, and why it cannot have others.

    ValueError where it can have none; ConfigError for values that no model could have.
    """
    if config.tune.search == "optuna":
        return [], {}
    possible, impossible = [], {}
    for trial in trials_of(config):
        try:
            num_key_value_layers_of(load_config(file, [*overrides, *trial.overrides]))
            possible.append(trial)
        except ConfigError as error:
            raise ValueError(f"tune.space: {str(error).replace('command line: ', '')}") from error
        except ValueError as error:
            impossible[trial.name] = str(error)
    if not possible:
        raise ValueError(f"tune.space: none of its {len(impossible)} trials can be: {next(iter(impossible.values()))}")
    return possible, impossible


def num_key_value_layers_of(config: Config) -> int:
    """The N of a run, 0 where it trains all of a model. ValueError where the model cannot have it."""
    if not objective_of(config).has_student:
        return 0
    model = config.model
    wanted = model_config_of(model.name_or_path, model.revision)
    layers: int = swiftkv_config(
        wanted, model.num_key_value_layers, model.key_value_group_size
    ).text_config.num_key_value_layers
    return layers


@functools.lru_cache(maxsize=16)  # every trial of a space asks, most of them for the same model
def model_config_of(name_or_path: str, revision: str | None) -> Any:
    """The config of a model that is not loaded."""
    return load_model_config(find_model(name_or_path, revision))


def trials_of(config: Config) -> list[Trial]:
    """The trials of a space: every combination of its grids, `tune.draws` times with new draws of all else."""
    grids = {key: drawn["grid"] for key, drawn in config.tune.space.items() if "grid" in drawn}
    rng = np.random.default_rng([config.seed, 2])  # other numbers than what a run draws by its seed
    found: dict[str, Trial] = {}
    for _ in range(config.tune.draws):
        for combination in itertools.product(*grids.values()):
            chosen = dict(zip(grids, combination, strict=True))
            values = {
                key: chosen[key] if key in chosen else draw(drawn, rng) for key, drawn in config.tune.space.items()
            }
            trial = trial_of(values)
            found.setdefault(trial.name, trial)  # the same values again are no other trial
    return list(found.values())


def draw(distribution: dict[str, list[Any]], rng: np.random.Generator) -> Any:
    """A value; numbers are rounded to four digits, so that they can be read and typed."""
    [(how, values)] = distribution.items()
    if how == "choice":
        return values[int(rng.integers(len(values)))]
    least, most = values
    value = math.exp(rng.uniform(math.log(least), math.log(most))) if how == "loguniform" else rng.uniform(least, most)
    return float(f"{value:.4g}")
