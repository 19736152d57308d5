"""How far untrained students are from their teacher, copied and fitted, for every N and group size, by one pass over a
few hundred samples: where to look, before anything is spent on training.

The teacher runs once over each batch; what enters each of its layers is the trunk of a student that begins there, and
such a student runs at supervised positions only.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlskv_ray.command import print_info
from vlskv_ray.config import Config, changed
from vlskv_ray.data.collate import Batch, FrozenStates, supervised_positions
from vlskv_ray.data.pipeline import Loader
from vlskv_ray.launch.prepare import dealt_one_by_one, prepare
from vlskv_ray.model.build import build_student
from vlskv_ray.model.swiftkv import SwiftKVPass, check_layers, swiftkv_backbone
from vlskv_ray.report.figures import decimal, percent
from vlskv_ray.sweep.fits import copied_as, fit_settings, passes_of, show_progress
from vlskv_ray.training.distill import distances_at_head, frozen_states, rows_per_chunk
from vlskv_ray.training.fit import Setting, set_weights
from vlskv_ray.training.run import Run
from vlskv_ray.training.step import autocast
from vlskv_ray.words import plural, terminal_table


@dataclass
class Distance:
    """Of one untrained student from its teacher, as sums over supervised tokens."""

    kl: float = 0.0
    agrees: float = 0.0
    tokens: int = 0
    parts: str = "neither"
    """What of it is fitted: "keys and values", "values alone" or "neither"."""

    @property
    def kl_mean(self) -> float:
        """In nats per token, at temperature 1; that of equals is not below 0 for what is rounded off."""
        return max(0.0, self.kl / self.tokens)

    @property
    def top1_agreement(self) -> float:
        return self.agrees / self.tokens

    def to_json(self) -> dict[str, Any]:
        return {"kl_mean": self.kl_mean, "top1_agreement": self.top1_agreement, "parts": self.parts}


Distances = dict[Setting, dict[str, Distance]]
"""By setting, of the students "copied" and, where they are measured, "fitted"."""


# ------------------------------------------------------------------------------------------------- what is measured
def probe_config(config: Config, values: dict[str, Any]) -> Config:
    """The same model without what only training needs, and with other values."""
    # N and group size are set for each setting anew, see `as_setting`; a cache has no states for other N than its own
    model = {"num_key_value_layers": 1, "key_value_group_size": 1, "teacher_cache": "off"}
    common = {f"model.{name}": value for name, value in model.items()}
    common |= {"evaluation.sources": (), "output.level": "warning", "epochs": 1, "max_steps": None}
    return changed(config, common | values)


def measuring_config(config: Config) -> Config:
    """Of what is measured: held-out samples where there are some."""
    sources = config.evaluation.sources or config.data.sources
    return probe_config(config, {"data.sources": sources, "model.start": "copy", "model.fit_tokens": None})


def fitting_config(config: Config, run: Run) -> Config:
    """Of what is fitted to, which is what a run of the config would begin with; precision as measured in `run`."""
    return probe_config(config, {"model.start": "fit", "model.dtype": run.config.model.dtype})


def all_samples(loader: Loader) -> list[list[int]]:
    """The numbers of the samples of an epoch, by micro-batch."""
    return [row["samples"] for row in loader.plan.rows(0, loader.plan.steps_per_epoch)]


def unseen_samples(run: Run, loader: Loader, num_samples: int) -> list[list[int]]:
    """Samples that are not fitted to, by micro-batch. ValueError where there are none."""
    assert run.fit is not None
    seen = {number for samples in run.fit.samples for number in samples}
    found: list[list[int]] = []
    for samples in dealt_one_by_one(run.config, loader.plan):
        left = num_samples - sum(map(len, found))
        if not left:
            break
        if new := [number for number in dict.fromkeys(samples) if number not in seen][:left]:
            found.append(new)
            seen.update(new)
    if not found:
        raise ValueError(
            f"evaluation.sources: none are given, and students would be fitted to all {plural(len(seen), 'sample')} of "
            f"data.sources, so that none is left to measure; give some, lower model.fit_tokens, or use --start copy"
        )
    return found


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


def measure(config: Config, settings: Sequence[Setting], num_samples: int, start: str | None) -> tuple[Distances, int]:
    """The distances of all settings' students, and on how many samples they are measured.

    Args:
        config: of a run.
        settings: of which students are measured.
        num_samples: at most so many samples are measured.
        start: "fit"; "copy" for copied students only; None: model.start, else fit.

    Raises:
        ValueError: for what the user can mend.
    """
    run, loader = prepare(measuring_config(config), num_samples=num_samples)
    samples, fitted_by = all_samples(loader), None
    if (start or config.model.start) != "copy":
        fitted_by = prepare(fitting_config(config, run))
        fitted_to = {(source.name, source.fingerprint) for source in fitted_by[1].sources}
        if not config.evaluation.sources:
            loader = fitted_by[1]
            samples = unseen_samples(*fitted_by, num_samples)
        elif shared := [source.name for source in loader.sources if (source.name, source.fingerprint) in fitted_to]:
            print_info(config, f"warning: {shared[0]} of evaluation.sources is fitted to, so it is not held out")
    return measure_distances(run, loader, samples, settings, fitted_by), sum(map(len, samples))


def measure_distances(
    run: Run,
    loader: Loader,
    samples: Sequence[Sequence[int]],
    settings: Sequence[Setting],
    fitted_by: tuple[Run, Loader] | None = None,
    memory: float | None = None,
) -> Distances:
    """The distance of each setting's untrained students.

    Args:
        run: with the model.
        loader: of the samples that are measured.
        samples: their numbers, by micro-batch.
        settings: of which students are measured.
        fitted_by: run and loader of what students are fitted to; None: they are copied only.
        memory: bytes that fits may take at a time, see `passes_of`.

    Raises:
        ValueError: no sample can be used.
    """
    config = run.config
    torch.set_num_threads(config.cluster.threads_per_worker or torch.get_num_threads())
    model = build_student(
        run.model_files,
        1,
        1,  # so that every layer has all weights that any setting needs
        attn_implementation=config.model.attn_implementation,
        dtype=getattr(torch, config.model.dtype),
    )
    distances: Distances = {}
    for some in passes_of(model, settings, memory) if fitted_by else [settings]:
        fitted = fit_settings(*fitted_by, model, some) if fitted_by else {}
        distances |= {setting: {"copied": Distance()} for setting in some}
        for setting, student in fitted.items():
            distances[setting]["fitted"] = Distance(parts=student.parts)
        students = [
            (setting, fitted[setting].weights if how == "fitted" else {})
            for setting in some
            for how in distances[setting]
        ]
        sums = [of for setting in some for of in distances[setting].values()]
        for batch in show_progress("measure", map(loader.batch_of, samples), len(samples)):
            if supervised_positions(batch.labels).any():
                found = measure_batch(model, batch, students, config.model.logits_memory_mib)
                for of, (kl, agrees) in zip(sums, found, strict=True):
                    of.kl += kl.double().sum().item()  # in float32 a long sum loses what small terms add
                    of.agrees += float(agrees.sum())
                    of.tokens += len(kl)
        if not any(of.tokens for of in sums):
            raise ValueError(
                "data.sources: none of the samples tried can be used; see `--dry-run` of the train command"
            )
    return distances


@torch.no_grad()
def measure_batch(
    model: Any, batch: Batch, students: Sequence[tuple[Setting, Mapping[str, Tensor]]], logits_memory_mib: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each student KL(teacher || student) and whether the likeliest token is the same, [n] each.

    Args:
        model: a student with N = 1 and groups of 1; left with the weights of the last student.
        batch: with something supervised.
        students: what is measured: setting, and the weights in place of the copied ones.
        logits_memory_mib: as in the config; hidden states of students measured together take as much at most.
    """
    backbone, head = swiftkv_backbone(model), model.get_output_embeddings()
    rows = rows_per_chunk(head.weight.shape[0], logits_memory_mib)
    with autocast(model):
        known = frozen_states(model, batch, sorted({n for (n, _), _ in students}))
        keep = supervised_positions(batch.labels)
        teacher = next(iter(known.values())).teacher  # the same for all
        at_once = max(1, logits_memory_mib * 2**20 // (teacher.numel() * teacher.element_size()))
        for start in range(0, len(students), at_once):
            states = []
            for setting, weights in students[start : start + at_once]:
                with copied_as(model, setting):
                    set_weights(model, weights)
                    states.append(student_states(backbone, batch, known[setting[0]], keep))
            yield from distances_at_head(states, teacher, head, rows)


def student_states(backbone: Any, batch: Batch, known: FrozenStates, keep: Tensor) -> Tensor:
    """float[n, D]: the student's final hidden states at kept positions, from the trunk that is known."""
    states: Tensor = backbone.from_trunk(known.trunk[None], batch.attention_mask.bool(), SwiftKVPass(keep=keep))[0]
    return states


# ------------------------------------------------------------------------------------------------------- what is shown
def distance_table(distances: Distances, last: int) -> str:
    """A line for each setting: layers that a prompt token skips, and KL and agreement of its students."""
    starts = list(next(iter(distances.values())))
    rows = [["N", "skipped", "group", *(f"KL {how}" for how in starts), *(f"top-1 {how}" for how in starts)]]
    for (n, g), of in distances.items():
        figures = [decimal(of[how].kl_mean) for how in starts] + [percent(of[how].top1_agreement) for how in starts]
        rows.append([str(n), f"{last - n} of {last}", str(g), *figures])
    return "\n".join(terminal_table(rows))


def rows_of(distances: Distances) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {"num_key_value_layers": n, "key_value_group_size": g} | {how: one.to_json() for how, one in of.items()}
        for (n, g), of in distances.items()
    ]


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


def agreement_with(name: str, trained: Sequence[tuple[Setting, float, float]], distances: Distances) -> str:
    """How well the order of a sweep's trained students was foreseen by their KL copied, and by that fitted."""
    settings, kl, accuracy = zip(*trained, strict=True)
    lines = [f"Spearman's rank correlation of the probe's KL with {len(trained)} trained students of {name}:"]
    for how in distances[settings[0]]:
        probed = [distances[setting][how].kl_mean for setting in settings]
        with_kl, with_accuracy = spearman(probed, kl), spearman(probed, accuracy)
        lines.append(f"KL {how}: {with_kl:.2f} with their KL, {with_accuracy:.2f} with their accuracy")
    return "\n".join(lines)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks."""

    def ranks(values: Sequence[float]) -> Any:
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts + 1) / 2)[which]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])
