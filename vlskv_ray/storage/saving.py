"""The state of a run on storage: what a worker counts, writing it beside the training, and going on from it."""

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from vlskv_ray.data.collate import Batch
from vlskv_ray.data.sample import refused_message
from vlskv_ray.errors import StoppedRun, TakenOver
from vlskv_ray.files import make_readable
from vlskv_ray.model.parts import SWIFTKV
from vlskv_ray.model.processor import load_processor
from vlskv_ray.model.wrappers import TEXT
from vlskv_ray.storage.checkpoint import SavedState, newest_checkpoint, save_checkpoint
from vlskv_ray.storage.run_lock import is_owner
from vlskv_ray.storage.run_log import RunLog
from vlskv_ray.training.distill import LossSums
from vlskv_ray.training.faults import fault_point
from vlskv_ray.training.objective import objective_of
from vlskv_ray.training.run import Run, gather_objects
from vlskv_ray.words import format_bytes, printable

TRIES, SECONDS_BETWEEN_TRIES = 3, 5.0
"""Of writing the last checkpoint, where the disk does not take it."""

MAKE_ROOM = "make room, and the same command goes on"


class Counts:
    """What was seen since the run began: samples, rows left out and notices by reason, and those of the latest step;
    supervised tokens of samples with and without images, and steps that had none; how long samples were in tokens, and
    how many images they had; and the seconds all steps took."""

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        saved = saved or {"seen": 0, "rejected": {}, "seconds": 0.0, "lengths": {}, "images": {}}
        used = saved["seen"] - sum(saved["rejected"].values())  # all that checkpoints of an earlier version tell
        self.supervised: Counter[str] = Counter(saved.get("supervised", {"vision": used, "text": used}))
        self.empty_steps, self.example = saved.get("empty_steps", 0), saved.get("example", {})
        self.seen, self.reasons, self.seconds = saved["seen"], Counter(saved["rejected"]), saved["seconds"]
        self.notices = Counter(saved.get("notices", {}))  # not there: of an earlier version
        self.lengths, self.images = Counter(saved["lengths"]), Counter(saved["images"])
        self.mine: list[tuple[int, int]] = []  # length and images of this worker's samples since the last gathering
        self.latest_rejected: list[dict[str, Any]] = []
        self.latest_notices: list[dict[str, str]] = []
        self.latest_ids: list[list[str]] = []

    def to_json(self) -> dict[str, Any]:
        return {
            "seen": self.seen,
            "rejected": dict(self.reasons),
            "notices": dict(self.notices),
            "seconds": self.seconds,
            "lengths": dict(self.lengths),
            "images": dict(self.images),
            "supervised": dict(self.supervised),
            "empty_steps": self.empty_steps,
            "example": self.example,
        }

    def gather(self) -> None:
        """Adds up what the workers counted each for itself: all of them call this at the same steps."""
        for lengths_and_images in gather_objects(self.mine):
            self.lengths.update(str(length) for length, _ in lengths_and_images)
            self.images.update(str(images) for _, images in lengths_and_images)
        self.mine = []

    def add(
        self,
        micro_batches: Sequence[Batch],
        sums: LossSums,
        gathered: Sequence[tuple[int, list[str], list[Any], list[Any]]],
    ) -> None:
        for batch in micro_batches:
            self.mine += zip(batch.attention_mask.sum(1).tolist(), batch.num_images.tolist(), strict=True)
        self.add_left_out(
            int(sums.samples + sums.rejected), [row for _, _, rejected, _ in gathered for row in rejected]
        )
        self.latest_ids = [ids for _, ids, _, _ in gathered]
        self.latest_notices = [row for _, _, _, notices in gathered for row in notices]
        self.notices.update(row["reason"] for row in self.latest_notices)
        self.supervised.update(vision=int(sums.tokens_vision), text=int(sums.tokens_text))
        self.empty_steps += not sums.supervised_tokens

    def add_left_out(self, seen: int, rows: list[dict[str, Any]]) -> None:
        """So many samples were seen, of which these were left out."""
        self.seen += seen
        self.latest_rejected = rows
        self.reasons.update(row["reason"] for row in rows)
        if rows:
            self.example = {name: rows[0][name] for name in ("id", "detail")}

    def check(self, max_fraction: float, on_refused: str, whole_epoch: bool) -> None:
        """StoppedRun where a row of the step was refused, or once more rows are left out than allowed; within an epoch,
        of the first hundred as many as of a hundred."""
        if message := refused_message(self.latest_rejected, on_refused):
            raise StoppedRun(message)
        rejected = sum(self.reasons.values())
        if rejected > max_fraction * (self.seen if whole_epoch else max(self.seen, 100)):
            raise StoppedRun(
                f"{rejected} of the {self.seen} samples so far had to be left out ({self._reasons()}), more than "
                f"data.max_rejected_fraction={max_fraction}. {self._for_one()}; mend the data, or raise "
                f"data.max_rejected_fraction"
            )

    def nothing_learnt(
        self, vision_loss_weight: float, text_loss_weight: float, trained_parts: Sequence[str] = (TEXT,)
    ) -> str | None:
        """Why there was nothing to learn from: no sample could be used, or none that has a weight, or that an image
        gives to the parts that train. None: there was."""
        vision, text = self.supervised["vision"], self.supervised["text"]
        of_images = not {TEXT, SWIFTKV} & {*trained_parts}
        if (vision and vision_loss_weight) or (text and text_loss_weight and not of_images):
            return None
        why = f"all {self.seen} samples had to be left out ({self._reasons()}). {self._for_one()}; mend the data"
        if vision:
            why = "all its samples have images, and vision_loss_weight is 0; raise it"
        elif text and of_images:
            why = (
                f"none of its samples has an image, which {' and '.join(trained_parts)} would learn from; give data "
                f"with images, or train other parts (model.trainable)"
            )
        elif text:
            why = "none of its samples has an image, and text_loss_weight is 0; raise it"
        return f"the run has come to its end and learnt nothing: {why}, and start anew with --resume never"

    def _reasons(self) -> str:
        return ", ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common(5))

    def _for_one(self) -> str:
        uid, detail = (printable(str(self.example.get(name, "?"))) for name in ("id", "detail"))
        return f"For one, {uid}: {detail} - all are listed in rejected.jsonl of the run folder"


def resume(run: Run, trained: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> tuple[int, Counts]:
    """Takes weights, moments and counts from the newest checkpoint, if there is one; returns the step to go on with.

    Raises:
        ValueError: its tensors are not those of this run.
    """
    saved = newest_checkpoint(run.checkpoints, warn=lambda _: None)  # the driver has told
    steps = gather_objects(saved.step if saved else 0)
    if len(set(steps)) > 1:  # then it is tried once more
        raise RuntimeError(f"{run.checkpoints}: workers see checkpoints of different steps: {steps}")
    if saved is None:
        return 0, Counts()
    counts = Counts(saved.state)
    weights, moments = saved.tensors("trainable"), saved.tensors("optimizer")
    check_tensors(saved, "trainable", weights, trained)
    if moments or counts.supervised.total():  # else no step had anything to learn from
        like = {f"{name}.step": torch.tensor(0.0) for name in trained}
        like |= {f"{name}.{kind}": weight for name, weight in trained.items() for kind in ("exp_avg", "exp_avg_sq")}
        check_tensors(saved, "optimizer", moments, like)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    for key, moment in moments.items():
        name, _, kind = key.rpartition(".")
        optimizer.state[trained[name]][kind] = moment.to(trained[name].device)
    return saved.step, counts


def check_tensors(
    saved: SavedState, stem: str, found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> None:
    """ValueError where a checkpoint's tensors have other names, shapes or types than wanted, or values no run has."""

    def problem() -> str | None:
        if others := sorted(found.keys() ^ wanted.keys()):
            return f"{others[0]!r} and {len(others) - 1} more are not both in it and in the model"
        for name, tensor in found.items():
            shape, dtype = tuple(wanted[name].shape), wanted[name].dtype
            if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
                return f"{name} is {tensor.dtype} of {tuple(tensor.shape)}, wanted {dtype} of {shape}"
            if not tensor.isfinite().all():
                return f"{name} is not finite"
            if name.endswith(".exp_avg_sq") and tensor.lt(0).any():
                return f"{name} is negative"
            if stem == "optimizer" and name.endswith(".step") and not 1 <= tensor.item() <= saved.step:
                return f"{name} is {tensor.item():g}, wanted 1 to {saved.step}"
        return None

    if wrong := problem():
        raise ValueError(
            f"{saved.path / stem}.safetensors: is not what this run wrote: {printable(wrong)}; move {saved.path.name} "
            f"away and the same command goes on from the one before, or use --resume never to start anew"
        )


class Saver:
    """Writes checkpoints beside the training, which waits for a copy of what is saved and no longer."""

    def __init__(self, run: Run, log: RunLog) -> None:
        self.run, self.log = run, log
        self.writing: threading.Thread | None = None
        self.error: Exception | None = None
        self.latest: Callable[[], None] | None = None

    def save(
        self,
        step: int,
        trained: dict[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        counts: Counts,
        measured: dict[str, float],
    ) -> None:
        """Begins to write; tells first what became of the one before."""
        self.wait()  # one at a time: two copies of weights and moments would be held otherwise
        moments = {
            f"{name}.{key}": value.to("cpu", copy=True)
            for name, parameter in trained.items()
            for key, value in optimizer.state[parameter].items()
        }
        weights = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}
        options = self.run.config.checkpoint
        state = state_of(self.run, counts, measured)

        def write() -> None:
            try:
                stop_if_taken_over(self.run)
                tensors = {"trainable": weights, "optimizer": moments}
                save_checkpoint(self.run.checkpoints, step, tensors, state, options.keep_last, options.keep_best)
            except Exception as error:  # raised again, or told, in the thread that trains
                self.error = error

        self.latest = write
        self._start()

    def wait(self) -> Exception | None:
        """Until nothing is being written. A disk that did not take it costs a warning and a checkpoint, not the run."""
        if self.writing:
            self.writing.join()
        error, self.error, self.writing = self.error, None, None
        if error and not isinstance(error, OSError):
            raise error
        if error:
            self.log.warn(f"a checkpoint could not be written: {error}; the next one is tried when it is due")
        return error

    def finish(self) -> str:
        """Until the last one is written, tried a few times; what is wrong if it cannot be."""
        for attempt in range(TRIES):
            error = self.wait()
            if error is None:
                return ""
            if attempt + 1 < TRIES:
                time.sleep(SECONDS_BETWEEN_TRIES)
                self._start()
        return f"the last checkpoint could not be written ({error}); {MAKE_ROOM}"

    def _start(self) -> None:
        assert self.latest is not None
        self.writing = threading.Thread(target=self.latest)
        self.writing.start()


def finish_saving(saver: Saver | None) -> None:
    """Waits until the last checkpoint is there; StoppedRun on all workers if it cannot be."""
    wrong = gather_objects(saver.finish() if saver else "")[0]
    if wrong:
        raise StoppedRun(wrong)


def save_is_due(run: Run, step: int, measured: dict[str, float]) -> bool:
    options = run.config.checkpoint
    every = options.every_steps or run.total_steps
    return step % every == 0 or step == run.total_steps or bool(measured and options.keep_best)


def state_of(run: Run, counts: Counts, measured: dict[str, float]) -> dict[str, Any]:
    """What a checkpoint says beside weights and moments."""
    score = objective_of(run.config).score(measured)
    return {
        "micro_batches_per_step": run.micro_batches_per_step,
        "shares_per_step": run.shares_per_step,
        "tokens": asdict(run.tokens),
        "threads": run.config.cluster.threads_per_worker,
        "use_gpu": run.config.cluster.use_gpu,
        "fingerprints": run.fingerprints,
        **({} if score is None else {"score": score}),
        **counts.to_json(),
        "config": run.config.model_dump(mode="json"),
    }


def stop_if_taken_over(run: Run) -> None:
    """Workers outlive a driver that is killed by a moment: what they still do must not get into the next one's run."""
    if run.owner and not is_owner(run.folder, run.owner):
        raise TakenOver(f"{run.folder}: another process runs this run now")


def export(run: Run, model: Any) -> None:
    """Writes `final/`: the model as a Hugging Face folder with its processor.

    Raises:
        OSError: the storage did not take it; nothing of it is left, and what was there before is.
    """
    final, aside = run.folder / "final", run.folder / ".writing-final"
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed while it wrote
    transformers_logging.disable_progress_bar()
    processor = load_processor(run.model_files, tried=True)
    try:
        model.save_pretrained(aside)
        fault_point("export_weights", run.total_steps)
        processor.save_pretrained(aside)
        make_readable(*aside.iterdir())
    except Exception as error:  # each library has its own kind for a full disk, and tokenizers has none
        shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError) and "(os error " not in str(error):
            raise
        takes = format_bytes(sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()))
        free = format_bytes(shutil.disk_usage(run.folder).free)
        reason = printable(str(error))
        raise OSError(f"{final} cannot be written ({reason}); its weights take {takes}, and {free} is free") from error
    if final.exists():  # written by this very run before it was killed at its last step
        shutil.rmtree(final)
    aside.rename(final)
