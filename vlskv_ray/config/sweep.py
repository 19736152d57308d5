"""What the config of a sweep must say, beside what that of a run must."""

import importlib.util

from vlskv_ray.config.options import Config
from vlskv_ray.config.problems import no_option


def check_sweep(config: Config) -> None:
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
    if options.metric == "kl" and config.objective == "sft":
        raise ValueError(f"tune.metric: kl, but objective={config.objective} has no teacher; use accuracy")
    if options.search == "optuna" and options.draws == 1:
        raise ValueError(
            "tune.draws: 1 trial; wanted as many as tune.search=optuna shall make, lists are drawn from too"
        )
    if options.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise ValueError("tune.search: optuna is not installed; `pip install optuna`, or use search=random")
