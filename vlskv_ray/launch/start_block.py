"""What is about to happen, for the reader of a log."""

import platform
from importlib.metadata import version
from typing import Any

import vlskv_ray
from vlskv_ray.data.plan import Plan
from vlskv_ray.training.objective import objective_of
from vlskv_ray.training.run import FitPlan, Run
from vlskv_ray.words import plural, short_path


def start_block(run: Run, plan: Plan, text: Any) -> str:
    """What is about to happen, for the reader of a log."""
    config, workers = run.config, max(run.config.cluster.most_workers, 1)
    versions = "  ".join(f"{name} {version(name)}" for name in ("ray", "torch", "transformers"))
    accumulation = run.micro_batches_per_step // workers
    model = config.model
    revision = f" at {model.revision}" if model.revision else ""
    rows = " + ".join(str(table.rows) for table in plan.tables)
    held_out = f", {len(run.held_out.rows())} held out to measure on" if run.held_out else ""
    what = f"{' and '.join(config.trained_parts) if run.frozen_parameters else 'all weights'} train on the answers"
    if objective_of(config).has_student:
        what = f"SwiftKV from layer {text.num_key_value_layers} in groups of {text.key_value_group_size}"
    start = f"start         {describe_start(run.fit)}\n" if run.fit else ""
    steps = plural(run.total_steps, "step")
    return (
        f"vlskv_ray {vlskv_ray.__version__}  {versions}  python {platform.python_version()}\n"
        f"model         {model.name_or_path}{revision}: {text.num_hidden_layers} text layers, {what}, "
        f"weights {model.dtype}\n"
        f"parameters    {describe_parameters(run)}\n"
        f"{start}"
        f"data          {plan.samples_per_epoch} samples an epoch, of {rows} rows{held_out}\n"
        f"global batch  {config.micro_batch_size * run.micro_batches_per_step} = {config.micro_batch_size} samples x "
        f"{accumulation} accumulation x {plural(workers, 'worker')}\n"
        f"run           {steps}, {run.steps_per_epoch} an epoch, into {short_path(run.folder)}"
    )


def describe_start(fit: FitPlan) -> str:
    """To what a student is fitted."""
    return f"keys and values fitted to the teacher's, on about {fit.tokens:,} tokens, before the first step"


def describe_parameters(run: Run) -> str:
    """How many weights of which parts train, and how many are frozen."""
    trained, frozen = run.trained_parameters, run.frozen_parameters
    texts = [f"{sum(run.parameters.values()):,}: {of_parts(trained)} trained"]
    return "; ".join([*texts, f"{of_parts(frozen)} frozen"] if frozen else texts)


def of_parts(sizes: dict[str, int]) -> str:
    """A number of weights for each part: 10 vision_tower, 20 text."""
    return ", ".join(f"{size:,} {part}" for part, size in sizes.items())
