"""What a run must have in common with the checkpoint that it goes on from."""

import math
from pathlib import Path

from pydantic import ValidationError

from vlskv_ray.command import print_error
from vlskv_ray.config import Config, changed_keys
from vlskv_ray.storage.checkpoint import SavedState, has_checkpoints, newest_checkpoint
from vlskv_ray.training.run import Run

OF_MODEL = ("num_key_value_layers", "key_value_group_size", "num_hidden_layers", "trainable", "start", "fit_tokens")
FIXED = {"objective", "micro_batch_size", "gradient_accumulation_steps"} | {f"model.{name}" for name in OF_MODEL}
"""What a checkpoint cannot go on with another value of: it decides which weights train, how they began, and what a step
is."""


REMEDY = "use --resume never to start anew, or another output.name"


def find_start(folder: Path, resume: str, *, has_steps: bool = True) -> SavedState | None:
    """The checkpoint that a run goes on from, None for a new run. Damaged ones are passed over, and told.

    Args:
        folder: of the run.
        resume: "auto" or "must", as on the command line; "never" has moved an older run aside before.
        has_steps: whether the run has any, and with them checkpoints.

    Raises:
        ValueError: there is none and there must be, or a run would be written over that has none that is whole.
    """
    if not has_steps:
        if has_checkpoints(folder / "checkpoints"):
            raise ValueError(f"{folder}: holds a run that has steps, and this one has none (max_steps=0); {REMEDY}")
        return None
    saved = newest_checkpoint(folder / "checkpoints", warn=lambda text: print_error(f"warning: {text}"))
    if saved is None and resume == "must":
        raise ValueError(f"{folder}: --resume must was given, but there is no checkpoint to go on from")
    if saved is None and ((folder / "summary.json").exists() or has_checkpoints(folder / "checkpoints")):
        raise ValueError(f"{folder}: holds a run, but no checkpoint of it that is whole; {REMEDY}")
    return saved


def check_resumable(config: Config, saved: SavedState | None) -> int:
    """Micro-batches of a step, all workers together: fixed when a run starts, however many workers it goes on with.

    Raises:
        ValueError: it would not be the same run, or the workers cannot share its micro-batches.
    """
    fewest, most = max(config.cluster.fewest_workers, 1), max(config.cluster.most_workers, 1)
    count: int = config.gradient_accumulation_steps * most
    if saved:
        try:
            before = Config.model_validate(saved.state["config"])
        except (ValidationError, RecursionError):
            raise ValueError(f"{saved.path}: cannot go on from here: written by another version; {REMEDY}") from None
        changed = changed_keys(before, config)
        if before.model.start is None and config.model.start == "copy":  # written when there was nothing else
            del changed["model.start"]
        parts = [" and ".join(one.trained_parts) for one in (before, config)]
        changed = {key: values for key, values in changed.items() if not key.startswith("model.trainable")}
        if parts[0] != parts[1]:  # the same ones may be written in several ways
            changed["model.trainable"] = (parts[0], parts[1])
        if before.cluster.num_workers != config.cluster.num_workers:  # then another accumulation makes up for it
            changed.pop("gradient_accumulation_steps", None)
        refuse_changes(config, saved, {key: f"{key} was {was} and is {now}" for key, (was, now) in changed.items()})
        count = saved.state["micro_batches_per_step"]
    # every worker takes equally many micro-batches, so that all take part in each reduction equally often
    uneven = next((workers for workers in range(fewest, most + 1) if count % workers), None)
    if uneven:
        of_a_step = f"{uneven} workers cannot share the {count} micro-batches of a step equally"
        if saved:
            fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            remedy = f"which were fixed when this run started; wanted one of {fitting}"
        else:
            all_of_them = math.lcm(*range(fewest, min(most, 64) + 1))
            remedy = f"gradient_accumulation_steps={all_of_them // math.gcd(all_of_them, most)} would let all of them"
        raise ValueError(f"cluster.num_workers: {of_a_step}, {remedy}")
    return count


def refuse_changes(config: Config, saved: SavedState, changed: dict[str, str]) -> None:
    """ValueError for what is not as it was at this checkpoint and not in `checkpoint.allow_changed`, by its name."""
    allowed = set(config.checkpoint.allow_changed) - FIXED
    refused = {name: text for name, text in changed.items() if name not in allowed}
    if refused:
        possible = [] if refused.keys() & FIXED else list(refused)
        raise ValueError(
            f"{saved.path}: cannot go on from here: {', '.join(refused.values())}; {REMEDY}"
            + (f", or allow it with checkpoint.allow_changed=[{','.join(possible)}]" if possible else "")
        )


def check_unchanged(run: Run, saved: SavedState) -> None:
    """ValueError where what decides the bits of a result beside the config is not as it was at this checkpoint."""
    config, before = run.config, saved.state["fingerprints"]
    changed = {
        what: f"the {what} changed since" + (f", {before.get(what)} to {now}" if what == "versions" else "")
        for what, now in run.fingerprints.items()
        if before.get(what) != now
    }
    threads = (saved.state["threads"], config.cluster.threads_per_worker)
    if threads[0] != threads[1]:
        changed["threads"] = f"cluster.threads_per_worker was {threads[0]} and is {threads[1]}"
    if saved.state.get("use_gpu", False) != config.cluster.use_gpu:  # not there: of an earlier version, on CPUs
        was, now = ("CPUs", "GPUs") if config.cluster.use_gpu else ("GPUs", "CPUs")
        changed["device"] = f"the run was on {was} and is on {now} (cluster.use_gpu)"
    refuse_changes(config, saved, changed)
    if saved.step > run.total_steps:
        raise ValueError(f"{saved.path}: is beyond the {run.total_steps} steps that the run would have; {REMEDY}")
