"""How a student begins that is fitted to its teacher: by all workers before the first step, or as a run before did.

The sums of the fit are added in the order of its micro-batches, whoever makes them, so that any number of workers gives
the same student. Now and then they are kept, and a run that was killed goes on from there.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlskv_ray.data.collate import Batch, FrozenStates, supervised_positions
from vlskv_ray.errors import AskedToStop, StoppedRun
from vlskv_ray.files import add_line, flush, make_readable
from vlskv_ray.model.swiftkv import SwiftKVPass, swiftkv_backbone
from vlskv_ray.training.distill import distances_at_head, frozen_states, rows_per_chunk
from vlskv_ray.training.faults import fault_point
from vlskv_ray.training.fit import PARTS, FitSums, add_batch, choose, fit, projections_of, set_weights
from vlskv_ray.training.run import Run, gather_objects, this_rank
from vlskv_ray.training.step import autocast
from vlskv_ray.training.watchdog import Watchdog
from vlskv_ray.words import format_duration, short_path

HELD_OUT_EVERY = 8
"""One of so many micro-batches is not fitted to: by those is chosen."""
LEAST_HELD_OUT = 4
"""Of few micro-batches more are held out, for so many; by one alone chance would choose."""
MEASURED = 16
"""Of these, so many at most are measured with the students that may be chosen."""
KEEP_SECONDS = 30
"""Between two times that the sums are kept."""
TELL_SECONDS = 10
CANDIDATES = {"keys and values": PARTS, "values alone": ("v_proj",), "neither": ()}
"""What of a student may be fitted, queries of shared keys with these; the rest of it is copied."""

BatchOf = Callable[[Sequence[int]], Batch]
"""The micro-batch of some samples, by their numbers in the plan, without states of a teacher cache."""


def start_fitted(run: Run, model: Any, batch_of: BatchOf, watchdog: Watchdog) -> dict[str, Any]:
    """Fits a student, whose weights are copies of the teacher's, or gives it those of the same fit of another run.

    Returns:
        what is known of the fit: what was chosen, on how many samples and tokens, and the samples left out.

    Raises:
        AskedToStop: on every worker alike; what was done is kept.
        StoppedRun: no sample can be used, or the disk is full.
    """
    assert run.fit is not None
    name = run.fit.kept.name
    if this_rank() == 0 and not is_fit(run.start_file, name) and is_fit(run.fit.kept, name):
        shutil.copyfile(run.fit.kept, aside := run.start_file.with_name(".writing-start"))
        os.replace(aside, run.start_file)
        tell(run, f"{told_of(read_about(run.start_file))}, as {short_path(run.fit.kept)} has it")
    if not gather_objects(this_rank() == 0 and is_fit(run.start_file, name))[0]:
        Fitting(run, model, batch_of, watchdog).make()
    set_weights(model, read_weights(run.start_file))
    return read_about(run.start_file)


class Fitting:
    """The fit of a student, while it is made."""

    def __init__(self, run: Run, model: Any, batch_of: BatchOf, watchdog: Watchdog) -> None:
        assert run.fit is not None
        self.run, self.model, self.batch_of, self.watchdog = run, model, batch_of, watchdog
        self.samples, self.kept = run.fit.samples, run.fit.kept
        self.weights = (run.config.text_loss_weight, run.config.vision_loss_weight)
        self.left_out: list[dict[str, Any]] = []
        self.began = time.monotonic()

    def make(self) -> None:
        """Makes it and writes it down."""
        self.watchdog.begin()
        with autocast(self.model), torch.no_grad():
            sums, held_out = self.add_up()
            self.watchdog.begin()
            weights, about = self.solve(sums, held_out)
        problem = ""
        if this_rank() == 0:
            try:
                self.write(weights, about | {"seconds": round(time.monotonic() - self.began, 1)})
                tell(self.run, told_of(about))
            except OSError as error:
                problem = f"{error.filename} {error.strerror}; make room, and the same command goes on"
        if problem := gather_objects(problem)[0]:
            raise StoppedRun(problem)

    def solve(self, sums: FitSums, held_out: FitSums) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights that the student starts with, and what was chosen for them."""
        copied = {name: weight.detach().clone() for name, weight in projections_of(self.model).items()}
        candidates = candidates_of(self.model, sums, held_out)
        if not sums.gram.any() and not self.run.total_steps:  # what trains says at its end what was wrong with them
            raise StoppedRun("none of the samples that the student would be fitted to can be used; see --dry-run")
        found = self.measure([copied | fit(self.model, sums, ridges) for ridges in candidates.values()])
        best = nearest(list(candidates), found)
        set_weights(self.model, copied)
        names = ("samples", "tokens", "supervised_tokens")
        about: dict[str, Any] = {"fit": self.kept.name, "fitted": best, "kl": means(list(candidates), found)}
        about |= {"ridges": candidates[best], "left_out": self.left_out}
        about |= dict(zip(names, (sums + held_out).counts.tolist(), strict=True))
        return copied | fit(self.model, sums + held_out, candidates[best]), about

    def add_up(self) -> tuple[FitSums, FitSums]:
        """The sums over the samples that are fitted to, and over those that are held out."""
        (sums, held_out), first = self.resume()
        workers = len(gather_objects(None))
        mine = FitSums.zeros(self.model) if workers > 1 else None
        saved = told = time.monotonic()
        for at in range(first, len(self.samples), workers):
            fault_point("fit", at, this_rank())
            number, left_out = at + this_rank(), []
            if mine is None:
                left_out = self.add(held_out if is_held_out(number, len(self.samples)) else sums, number)
            else:
                if number < len(self.samples):
                    left_out = self.add(mine, number)
                for theirs, of_worker in zip(range(at, len(self.samples)), in_turn(mine), strict=False):
                    (held_out if is_held_out(theirs, len(self.samples)) else sums).add_(of_worker)
                mine.zero_()
            self.watchdog.done()
            done = min(at + workers, len(self.samples))
            everyone = gather_objects((this_rank() == 0 and self.run.stop_file.exists(), left_out))
            stop = any(is_asked for is_asked, _ in everyone)
            self.left_out += [row for _, rows in everyone for row in rows]
            now = time.monotonic()
            if this_rank() == 0 and done < len(self.samples) and (stop or now - saved > KEEP_SECONDS):
                self.keep(sums, held_out, done)
                saved = time.monotonic()
            if this_rank() == 0 and now - told > TELL_SECONDS:
                left = (now - self.began) * (len(self.samples) - done) / (done - first)
                tell(
                    self.run, f"fitting       {done} of {len(self.samples)} micro-batches, {format_duration(left)} left"
                )
                told = now
            if stop:
                raise AskedToStop
        return sums, held_out

    def add(self, sums: FitSums, number: int) -> list[dict[str, Any]]:
        """Adds the tokens of one micro-batch; its rows that are left out."""
        batch = self.batch(number)
        add_batch(sums, self.model, batch, self.weights)
        return batch.rejected

    def batch(self, number: int) -> Batch:
        return self.batch_of(self.samples[number]).to(next(self.model.parameters()).device)

    def measure(self, students: Sequence[dict[str, Tensor]]) -> list[list[float]]:
        """The `distances` of students on each micro-batch that is chosen by."""
        found = {}
        for number in measured_of(len(self.samples))[this_rank() :: len(gather_objects(None))]:
            batch = self.batch(number)
            if supervised_positions(batch.labels).any():
                layer = swiftkv_backbone(self.model).config.num_key_value_layers
                known = frozen_states(self.model, batch, [layer])[layer]
                memory = self.run.config.model.logits_memory_mib
                found[number] = distances(self.model, students, batch, known, memory)
            self.watchdog.alive()
        everyone = {number: values for of_worker in gather_objects(found) for number, values in of_worker.items()}
        return [everyone[number] for number in sorted(everyone)]

    # -------------------------------------------------------------------------------------------------- kept on storage
    @property
    def partial(self) -> Path:
        return self.run.folder / "start.partial.safetensors"

    def keep(self, sums: FitSums, held_out: FitSums, done: int) -> None:
        """Keeps what so many micro-batches come to. A full disk costs no more than that it is made again."""
        tensors = {
            f"{name}.{key}": x
            for name, of in (("sums", sums), ("held_out", held_out))
            for key, x in of.tensors().items()
        }
        with suppress(OSError):
            about = {"done": done, "fit": self.kept.name, "left_out": self.left_out}
            write_tensors(self.partial, tensors, about)

    def resume(self) -> tuple[tuple[FitSums, FitSums], int]:
        """The sums that were kept, and of how many micro-batches; the same on every worker."""
        both, done = (FitSums.zeros(self.model), FitSums.zeros(self.model)), 0
        if is_whole(self.partial):
            with safe_open(self.partial, "pt") as file:
                about = json.loads(file.metadata()["about"])
                if about["fit"] == self.kept.name:
                    done, self.left_out = about["done"], about["left_out"]
                    for name, of in zip(("sums", "held_out"), both, strict=True):
                        for key, tensor in of.tensors().items():
                            tensor.copy_(file.get_tensor(f"{name}.{key}"))
        if len(set(gather_objects(done))) > 1:
            raise RuntimeError(f"{self.partial}: workers see it differently")  # then it is tried once more
        return both, done

    def write(self, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Writes the weights for this run and for others of the same fit."""
        write_tensors(self.run.start_file, weights, about)
        with suppress(OSError):  # that is to save others the work
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(self.kept, weights, about)
        self.partial.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- what is chosen by
def is_held_out(number: int, count: int) -> bool:
    """Whether a micro-batch, of so many, is chosen by and not fitted to."""
    every = min(HELD_OUT_EVERY, max(2, count // LEAST_HELD_OUT))
    return number % every == every - 1


def measured_of(count: int) -> list[int]:
    """Those of so many micro-batches that students are measured on, to choose one."""
    return [number for number in range(count) if is_held_out(number, count)][:MEASURED]


def candidates_of(model: Any, sums: FitSums, held_out: FitSums) -> dict[str, dict[str, list[float | None]]]:
    """The students that may be chosen: by name, then by part, the ridges of their fit. Without any tokens, the copied
    one alone."""
    if not sums.gram.any():
        return {"neither": {part: [None] * len(sums.gram) for part in PARTS}}
    chosen = choose(model, sums, held_out if held_out.counts[2] else sums)
    return {
        name: {part: chosen[part] if part in parts else [None] * len(chosen[part]) for part in PARTS}
        for name, parts in CANDIDATES.items()
    }


def distances(
    model: Any, students: Sequence[Mapping[str, Tensor]], batch: Batch, known: FrozenStates, logits_memory_mib: int
) -> list[float]:
    """Sum of KL of each student over the supervised positions of a batch, and how many these are.

    Args:
        model: left with the weights of the last student.
        students: all of their weights.
        batch: with something supervised.
        known: of the batch, at the model's N.
        logits_memory_mib: as in the config.
    """
    backbone, head = swiftkv_backbone(model), model.get_output_embeddings()
    keep, states = supervised_positions(batch.labels), []
    for weights in students:
        set_weights(model, weights)
        states.append(backbone.from_trunk(known.trunk[None], batch.attention_mask.bool(), SwiftKVPass(keep=keep))[0])
    rows = rows_per_chunk(head.weight.shape[0], logits_memory_mib)
    of_students = distances_at_head(states, known.teacher, head, rows)
    return [kl.double().sum().item() for kl, _ in of_students] + [float(len(known.teacher))]


def means(names: Sequence[str], found: Sequence[list[float]]) -> dict[str, float]:
    """The mean KL of each student, by its name, from the `distances` of all batches; nothing if there are none."""
    sums = torch.tensor(found, dtype=torch.float64).sum(0)
    return dict(zip(names, (sums[:-1] / sums[-1]).tolist(), strict=True)) if found else {}


def nearest(names: Sequence[str], found: Sequence[list[float]]) -> str:
    """The student to take, from the `distances` of all batches: the copied one, unless another is nearer by more than
    chance, which is twice the standard error of their difference over batches.

    Where a few tokens make most of the KL, as where copies are near already, the smallest mean is often chance.
    """
    sums = torch.tensor(found, dtype=torch.float64).reshape(len(found), len(names) + 1)[:, :-1]
    copied = sums[:, names.index("neither")]
    for at in sums.sum(0).argsort().tolist():
        gain = copied - sums[:, at]
        chance = 2 * gain.std() * math.sqrt(len(gain)) if len(gain) > 1 else 0.0
        if gain.sum() > chance:
            return names[at]
    return "neither"


def tell(run: Run, text: str) -> None:
    """Shows a line to whoever watches the run."""
    add_line(run.waiting_file, text)


def told_of(about: dict[str, Any]) -> str:
    """One line on what was chosen."""
    kl, best, left_out = about["kl"], about["fitted"], len(about["left_out"])
    if not kl:
        return "fitted        nothing: of so few samples none is left to choose by; keys and values start as copies"
    return (
        f"fitted        {best}, on {about['tokens']:,.0f} tokens: KL {kl['neither']:.4g} -> {kl[best]:.4g} on samples "
        f"that are held out of the fit" + (f"; {left_out} samples left out" if left_out else "")
    )


def in_turn(mine: FitSums) -> Iterator[FitSums]:
    """What each of several workers has, by rank; each is to be used before the next."""
    for rank in range(dist.get_world_size()):
        shared = mine if rank == dist.get_rank() else mine.empty_like()
        for tensor in shared.tensors().values():
            dist.broadcast(tensor, rank)
        yield shared


# ------------------------------------------------------------------------------------------------------------ the file
def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Writes a file whole or not at all. OSError where the disk is full."""
    aside = path.with_name(f".writing-{path.name}-{os.getpid()}")
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(tensors, aside, metadata={"about": json.dumps(about)})
        except SafetensorError as error:  # of a disk too
            raise OSError(None, f"cannot be written: {error}", str(path)) from error
        make_readable(aside)
        flush(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    flush(path.parent)


def is_whole(path: Path) -> bool:
    """Whether a file is there that `write_tensors` wrote."""
    try:
        with safe_open(path, "pt") as file:
            return "about" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def is_fit(path: Path, name: str) -> bool:
    """Whether a file is there and whole that holds the fit of this name."""
    return is_whole(path) and read_about(path).get("fit") == name


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file that is whole."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict


def read_about(path: Path) -> dict[str, Any]:
    """What was chosen for them, and on how many samples, tokens and supervised tokens."""
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["about"]))
