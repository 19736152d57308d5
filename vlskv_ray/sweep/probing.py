"""How far the untrained student is from its teacher, for every N and group
size, by one pass over a few hundred samples: where to look, before anything is spent on training.

The teacher runs once over each batch; what enters each of its layers is the trunk of a student that begins there, and
such a student runs at supervised positions only. Its weights are copies of the teacher's, as when training starts.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlskv_ray.config import Config, changed
from vlskv_ray.data.collate import Batch, FrozenStates, supervised_positions
from vlskv_ray.data.pipeline import Loader, local_batches
from vlskv_ray.model.build import build_student
from vlskv_ray.model.swiftkv import SwiftKVPass, check_layers, swiftkv_backbone
from vlskv_ray.report.figures import decimal, percent
from vlskv_ray.training.distill import distances_at_head, frozen_states, rows_per_chunk
from vlskv_ray.training.run import Run
from vlskv_ray.training.step import autocast
from vlskv_ray.words import terminal_table


@dataclass
class Distance:
    """Of one untrained student from its teacher, as sums over supervised tokens."""

    kl: float = 0.0
    agrees: float = 0.0
    tokens: int = 0

    @property
    def kl_mean(self) -> float:
        """In nats per token, at temperature 1."""
        return self.kl / self.tokens

    @property
    def top1_agreement(self) -> float:
        return self.agrees / self.tokens


Setting = tuple[int, int]
"""N and group size."""


def probe_config(config: Config) -> Config:
    """The same samples and model without what only training needs: held-out samples where there are some."""
    # N and group size are set for each setting anew, see `as_setting`; a cache has no states for other N than its own
    model = {"num_key_value_layers": 1, "key_value_group_size": 1, "teacher_cache": "off"}
    values = {f"model.{name}": value for name, value in model.items()}
    values |= {"data.sources": config.evaluation.sources or config.data.sources, "evaluation.sources": ()}
    return changed(config, values | {"output.level": "warning", "epochs": 1})


def settings_of(last: int, layers: Sequence[int], groups: Sequence[int]) -> list[Setting]:
    """The pairs of N and group size that a model of so many layers can have. ValueError where there is none, or where
    an N is wanted that it cannot have."""
    if beyond := [n for n in layers if n >= last]:
        raise ValueError(f"--layers: {beyond[0]}, but the model has {last} text layers; wanted 1 to {last - 1}")
    found = []
    for n in sorted(set(layers)):
        for g in sorted(set(groups)):
            try:
                check_layers(last, n, g)
            except ValueError:
                continue
            found.append((n, g))
    if not found:
        raise ValueError(f"--layers, --groups: none of these pairs can be, in a model of {last} text layers")
    return found


def measure_distances(run: Run, loader: Loader, settings: Sequence[Setting]) -> dict[Setting, Distance]:
    """The distance of each setting's untrained student, over the samples of an epoch of the run."""
    config, steps = run.config, run.steps_per_epoch
    torch.set_num_threads(config.cluster.threads_per_worker or torch.get_num_threads())
    model = build_student(
        run.model_files,
        1,
        1,  # so that every layer has all weights that any setting needs
        attn_implementation=config.model.attn_implementation,
        dtype=getattr(torch, config.model.dtype),
    )
    distances = {setting: Distance() for setting in settings}
    for batch in show_progress(local_batches(loader, 0, steps), steps * loader.plan.micro_batches_per_step):
        if batch.sample_ids and supervised_positions(batch.labels).any():
            for setting, kl, agrees in measure_batch(model, batch, settings, config.model.logits_memory_mib):
                sums = distances[setting]
                sums.kl += kl.double().sum().item()  # in float32 a long sum loses what small terms add
                sums.agrees += float(agrees.sum())
                sums.tokens += len(kl)
    if not any(sums.tokens for sums in distances.values()):
        raise ValueError("data.sources: none of the samples tried can be used; see `--dry-run` of the train command")
    return distances


@torch.no_grad()
def measure_batch(
    model: Any, batch: Batch, settings: Sequence[Setting], logits_memory_mib: int
) -> Iterator[tuple[Setting, Tensor, Tensor]]:
    """For each setting KL(teacher || student) and whether the likeliest token is the same, [n] each.

    Args:
        model: a student with N = 1 and groups of 1; left with the weights of the last setting.
        batch: with something supervised.
        settings: what is measured.
        logits_memory_mib: as in the config; hidden states of settings measured together take as much at most.
    """
    backbone, head = swiftkv_backbone(model), model.get_output_embeddings()
    rows = rows_per_chunk(head.weight.shape[0], logits_memory_mib)
    with autocast(model):
        known = frozen_states(model, batch, sorted({n for n, _ in settings}))
        keep = supervised_positions(batch.labels)
        teacher = known[settings[0][0]].teacher  # the same for all
        at_once = max(1, logits_memory_mib * 2**20 // (teacher.numel() * teacher.element_size()))
        for start in range(0, len(settings), at_once):
            some, students = settings[start : start + at_once], []
            for n, g in some:
                with as_setting(backbone, n, g):
                    students.append(student_states(backbone, batch, known[n], keep))
            for setting, (kl, agrees) in zip(some, distances_at_head(students, teacher, head, rows), strict=True):
                yield setting, kl, agrees


@contextmanager
def as_setting(backbone: Any, num_key_value_layers: int, key_value_group_size: int) -> Iterator[None]:
    """A backbone as the untrained student with that N and group size; with those it was built with, afterwards."""
    config = backbone.config
    before = (config.num_key_value_layers, config.key_value_group_size)
    config.num_key_value_layers, config.key_value_group_size = num_key_value_layers, key_value_group_size
    try:
        backbone.start_from_teacher()
        yield
    finally:
        config.num_key_value_layers, config.key_value_group_size = before


def student_states(backbone: Any, batch: Batch, known: FrozenStates, keep: Tensor) -> Tensor:
    """float[n, D]: the student's final hidden states at kept positions, from the trunk that is known."""
    states: Tensor = backbone.from_trunk(known.trunk[None], batch.attention_mask.bool(), SwiftKVPass(keep=keep))[0]
    return states


def show_progress(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    """The batches, with a line now and then on a long wait."""
    began = told = time.monotonic()
    for done, batch in enumerate(batches, 1):
        yield batch
        now = time.monotonic()
        if now - told >= 10:
            print(f"{done} of {count} micro-batches, {(now - began) * (count - done) / done:.0f} s left", flush=True)
            told = now


def distance_table(distances: dict[Setting, Distance], last: int) -> str:
    """A line for each N: layers that a prompt token skips, and KL and agreement for each group size; nothing where
    groups of that size do not fit the layers above N."""
    groups = sorted({g for _, g in distances})
    head = ["N", "skipped"]
    head += [f"KL, group {g}" for g in groups] + [f"top-1, group {g}" for g in groups]
    rows = [head]
    for n in sorted({n for n, _ in distances}):
        of_n = [distances.get((n, g)) for g in groups]
        cells = [decimal(d.kl_mean) if d else "" for d in of_n] + [percent(d.top1_agreement) if d else "" for d in of_n]
        rows.append([str(n), f"{last - n} of {last}", *cells])
    return "\n".join(terminal_table(rows))


def read_trained(sweep: Path, settings: Sequence[Setting]) -> list[tuple[Setting, float, float]]:
    """Setting, KL and accuracy of a sweep's trained students. ValueError where too few of them are to be probed."""
    try:
        points = json.loads((sweep / "frontier.json").read_text())["points"]
        of_points = [
            ((point["num_key_value_layers"], point["key_value_group_size"]), point["kl"], point["accuracy"])
            for point in points
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--against: {sweep} holds no finished sweep (frontier.json): {error!r}") from error
    found = [point for point in of_points if point[0] in settings]
    if len(found) < 3:
        raise ValueError(f"--against: {sweep} has {len(found)} trials with a setting that is probed; wanted 3 or more")
    return found


def agreement_with(
    name: str, trained: Sequence[tuple[Setting, float, float]], distances: dict[Setting, Distance]
) -> str:
    """How well the order of a sweep's trained students was foreseen."""
    settings, kl, accuracy = zip(*trained, strict=True)
    probed = [distances[setting].kl_mean for setting in settings]
    return (
        f"Spearman's rank correlation of the probe's KL with {len(trained)} trained students of {name}: "
        f"{spearman(probed, kl):.2f} with their KL, {spearman(probed, accuracy):.2f} with their accuracy"
    )


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks."""

    def ranks(values: Sequence[float]) -> Any:
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts + 1) / 2)[which]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])
