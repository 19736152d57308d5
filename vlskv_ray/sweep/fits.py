"""Students of many settings fitted to their teacher by one pass of it, each as a run fits its own; see docs/fit.md."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlskv_ray.data.collate import Batch, supervised_positions
from vlskv_ray.data.pipeline import Loader
from vlskv_ray.model.swiftkv import swiftkv_backbone
from vlskv_ray.training.distill import frozen_states
from vlskv_ray.training.fit import (
    FitSums,
    Setting,
    add_to_all,
    as_setting,
    fit,
    fit_bytes,
    projections_of,
)
from vlskv_ray.training.run import Run
from vlskv_ray.training.start import candidates_of, distances, is_held_out, measured_of, nearest
from vlskv_ray.training.step import autocast
from vlskv_ray.words import format_bytes, plural

Item = TypeVar("Item")
TELL_SECONDS = 10
SHARE_OF_MEMORY = 0.25
"""Of the machine's, that the sums of settings which are fitted together may take."""


@dataclass(frozen=True)
class Fitted:
    """A student as the fit leaves it."""

    weights: dict[str, Tensor]
    """By the names of its parameters, those in place of the copied ones."""
    parts: str
    """What is fitted: "keys and values", "values alone" or "neither"."""


def passes_of(model: Any, settings: Sequence[Setting], memory: float | None = None) -> list[list[Setting]]:
    """The settings whose sums fit into memory together, one pass of the teacher for each; says what they take.

    Args:
        model: a student with N = 1 and groups of 1.
        settings: in the order in which they are fitted.
        memory: bytes that may be taken; None: a share of the machine's. A setting that takes more has its own pass.
    """
    allowed = SHARE_OF_MEMORY * total_memory() if memory is None else memory
    sizes = {setting: bytes_of(model, setting) for setting in settings}
    passes: list[list[Setting]] = []
    left = 0.0
    for setting in settings:
        if not passes or sizes[setting] > left:
            passes.append([])
            left = allowed
        passes[-1].append(setting)
        left -= sizes[setting]
    most = max(sum(sizes[setting] for setting in some) for some in passes)
    text = f"fit: {plural(len(settings), 'setting')} in {plural(len(passes), 'pass')} of the teacher, "
    print(f"{text}for which sums take {format_bytes(most)} of memory", flush=True)
    return passes


def total_memory() -> int:
    """Bytes that this machine has, or the container that this process is in."""
    from ray._private.utils import get_system_memory

    return int(get_system_memory())


def bytes_of(model: Any, setting: Setting) -> int:
    """What is held for a setting while it is fitted: its sums, and the weights of the students that may be chosen."""
    n, _ = setting
    with as_setting(model, setting):
        layers = swiftkv_backbone(model).layers[n:]
        projections = [layer.self_attn.get_submodule(f"{name}_proj_swiftkv") for layer in layers for name in "qkv"]
        weights = sum(p.numel() * p.element_size() for linear in projections for p in linear.parameters())
        return fit_bytes(model, workers=1) + 2 * weights


@torch.no_grad()
def fit_settings(run: Run, loader: Loader, model: Any, settings: Sequence[Setting]) -> dict[Setting, Fitted]:
    """The fitted students of several settings, each as a run with the plan of this one has its own.

    Args:
        run: with a plan of what is fitted to.
        loader: of its samples.
        model: a student with N = 1 and groups of 1.
        settings: what is fitted.

    Raises:
        ValueError: none of the samples can be used.
    """
    assert run.fit is not None
    samples, config = run.fit.samples, run.config
    with autocast(model):
        sums, held_out = ({setting: zeros(model, setting) for setting in settings} for _ in range(2))
        weights = (config.text_loss_weight, config.vision_loss_weight)
        for number, batch in enumerate(show_progress("fit", map(loader.batch_of, samples), len(samples))):
            add_to_all(held_out if is_held_out(number, len(samples)) else sums, model, batch, weights)
        if not sums[settings[0]].gram.any():
            raise ValueError("data.sources: none of the samples that students would be fitted to can be used")
        ridges, students = {}, {}
        for setting in show_progress("solve", settings, len(settings)):
            with as_setting(model, setting):
                ridges[setting] = candidates_of(model, sums[setting], held_out[setting])
                students[setting] = {name: fit(model, sums[setting], of) for name, of in ridges[setting].items()}
        measured = map(loader.batch_of, (samples[number] for number in measured_of(len(samples))))
        best = choose_students(model, measured, students, config.model.logits_memory_mib)
        students.clear()
        fitted = {}
        for setting, name in best.items():
            with as_setting(model, setting):
                weights_of = fit(model, sums.pop(setting) + held_out.pop(setting), ridges[setting][name])
            fitted[setting] = Fitted(weights_of, name)
    return fitted


def zeros(model: Any, setting: Setting) -> FitSums:
    """No sums yet, for a setting."""
    with as_setting(model, setting):
        return FitSums.zeros(model)


def choose_students(
    model: Any,
    batches: Iterator[Batch],
    students: Mapping[Setting, Mapping[str, Mapping[str, Tensor]]],
    logits_memory_mib: int,
) -> dict[Setting, str]:
    """For each setting the name of the student that is nearest to the teacher on batches that none is fitted to.

    Args:
        model: a student with N = 1 and groups of 1.
        batches: to choose by; each costs one forward of the teacher.
        students: by setting and name, the weights in place of the copied ones.
        logits_memory_mib: as in the config.
    """
    found: dict[Setting, list[list[float]]] = {setting: [] for setting in students}
    for batch in batches:
        if not supervised_positions(batch.labels).any():
            continue
        known = frozen_states(model, batch, sorted({n for n, _ in students}))
        for setting, by_name in students.items():
            with copied_as(model, setting):
                copied = {name: weight.detach().clone() for name, weight in projections_of(model).items()}
                some = [{**copied, **weights} for weights in by_name.values()]
                found[setting].append(distances(model, some, batch, known[setting[0]], logits_memory_mib))
    return {setting: nearest(list(by_name), found[setting]) for setting, by_name in students.items()}


@contextmanager
def copied_as(model: Any, setting: Setting) -> Iterator[None]:
    """A student with N = 1 and groups of 1 as the copied one of a setting; of its own again, but for the weights,
    afterwards."""
    with as_setting(model, setting):
        swiftkv_backbone(model).start_from_teacher()
        yield


def show_progress(what: str, items: Iterable[Item], count: int) -> Iterator[Item]:
    """The items, with a line now and then on a long wait."""
    began = told = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - told >= TELL_SECONDS and done < count:
            print(f"{what}: {done} of {count}, {(now - began) * (count - done) / done:.0f} s left", flush=True)
            told = now
