"""Samples that are ready for the model, the micro-batch made of them, and its one format on the way to a worker.

Shapes: B samples, T tokens of the longest, I images of all samples together, D hidden, n supervised positions.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

from vlskv_ray.model.wrappers import ImageInputs, wrapper_of

IGNORE_INDEX = -100
"""The label of a token that no loss counts, as in transformers."""


@dataclass(frozen=True)
class FrozenStates:
    """What the frozen part of a model makes of a sample of n supervised positions: all that its distillation needs."""

    trunk: Tensor  # float[T, D], as it enters layer N
    teacher: Tensor  # float[n, D], after the final norm
    teacher_input: Tensor  # float[n, D], as it enters the last layer


@dataclass(frozen=True)
class Encoded:
    """One sample after chat template, tokenizer and image processor."""

    uid: str
    input_ids: NDArray[np.int64]  # [T]
    labels: NDArray[np.int64]  # [T], aligned with input_ids
    images: list[ImageInputs] = field(default_factory=list)
    """In their order; without pixels where states are known."""
    key: str = ""
    """What it says and shows, for the teacher cache; empty where there is none."""
    states: FrozenStates | None = None


@dataclass(frozen=True)
class Batch:
    """One micro-batch, padded on the right to its longest sample; its images to the largest of them."""

    step: int
    micro_batch: int
    """Place within the global step, counted over all workers."""
    sample_ids: list[str]
    rejected: list[dict[str, Any]]
    """Rows of this micro-batch that were left out: `id`, `reason`, `detail`, and `refused` where they are."""
    input_ids: Tensor  # int64[B, T]
    attention_mask: Tensor  # int64[B, T]
    labels: Tensor  # int64[B, T]
    num_images: Tensor  # int64[B]
    sizes: dict[str, Tensor] = field(default_factory=dict)  # int64[I, ...] each, by names of the model's family
    pixels: dict[str, Tensor] = field(default_factory=dict)  # [I, ...] each; see `ImageInputs`
    keys: list[str] = field(default_factory=list)
    """Of the samples in the teacher cache, where there is one."""
    notices: list[dict[str, str]] = field(default_factory=list)
    """What was changed in the samples: `id`, `reason`, `detail`."""
    # of samples whose states are all known, without padding, one sample after another
    trunk: Tensor | None = field(default=None)  # float[all tokens, D]
    teacher: Tensor | None = field(default=None)  # float[n, D]
    teacher_input: Tensor | None = field(default=None)  # float[n, D]

    @property
    def has_image(self) -> Tensor:
        """bool[B]"""
        return self.num_images > 0

    def to(self, device: torch.device | str) -> "Batch":
        """The same with its tensors there."""
        return replace(self, **fields_of({name: tensor.to(device) for name, tensor in tensors_of(self).items()}))

    def model_inputs(self, config: Any) -> dict[str, Tensor]:
        """The arguments of the forward of a model with this config, but for labels; those of images are made each
        time."""
        tokens = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return tokens | wrapper_of(config.model_type).model_inputs(config, self)


def supervised_positions(labels: Tensor) -> Tensor:
    """bool[B, T]: where the logits predict a label that counts, one position before it. `labels` int64[B, T]."""
    return F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))


def collate(
    samples: Sequence[Encoded],
    pad_token_id: int,
    *,
    step: int = 0,
    micro_batch: int = 0,
    rejected: Sequence[dict[str, Any]] = (),
    notices: Sequence[dict[str, str]] = (),
) -> Batch:
    """Pads samples to one micro-batch; also of no samples at all, where every row was left out."""
    shape = (len(samples), max((len(s.input_ids) for s in samples), default=0))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        input_ids[row, :length] = torch.from_numpy(sample.input_ids)
        attention_mask[row, :length] = 1
        labels[row, :length] = torch.from_numpy(sample.labels)
    images = [image for sample in samples for image in sample.images]
    states = [sample.states for sample in samples if sample.states]
    frozen = {}
    if states and len(states) == len(samples):
        frozen = {f.name: torch.cat([getattr(x, f.name) for x in states]) for f in fields(FrozenStates)}
    return Batch(
        step=step,
        micro_batch=micro_batch,
        sample_ids=[sample.uid for sample in samples],
        rejected=list(rejected),
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        num_images=torch.tensor([len(sample.images) for sample in samples], dtype=torch.int64),
        sizes=_stacked([image.sizes for image in images]),
        pixels=_stacked([image.pixels for image in images]),
        keys=[sample.key for sample in samples],
        notices=list(notices),
        **frozen,
    )


def _stacked(of_images: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, Tensor]:
    """[I, ...] of each name, smaller ones padded with zeros at the end of each dimension; nothing of no images."""
    stacked = {}
    for name in of_images[0] if of_images else ():
        arrays = [torch.from_numpy(arrays[name]) for arrays in of_images]
        largest = [max(lengths) for lengths in zip(*(array.shape for array in arrays), strict=True)]
        stacked[name] = arrays[0].new_zeros(len(arrays), *largest)
        for whole, array in zip(stacked[name], arrays, strict=True):
            whole[tuple(slice(length) for length in array.shape)] = array
    return stacked


def parts(batch: Batch, max_tokens: int | None) -> Iterator[Batch]:
    """Consecutive samples of a batch, as many at a time as have no more than `max_tokens` tokens together, at least
    one; sums over the parts are those of the batch."""
    lengths = batch.attention_mask.sum(1).tolist()
    if max_tokens is None or sum(lengths) <= max_tokens or len(lengths) < 2:
        yield batch
        return
    start, held = 0, 0
    for end, length in enumerate(lengths):
        if end > start and held + length > max_tokens:
            yield _cut(batch, start, end)
            start, held = end, 0
        held += length
    yield _cut(batch, start, len(lengths))


def _cut(batch: Batch, start: int, end: int) -> Batch:
    """The samples [start, end) of a batch; rows left out and notices go with the first."""
    samples = slice(start, end)
    longest = int(batch.attention_mask[samples].sum(1).max())
    images = _slice(batch.num_images, samples)
    tokens = _slice(batch.attention_mask.sum(1), samples)
    supervised = _slice(supervised_positions(batch.labels).sum(1), samples)
    has_images = images.stop > images.start
    return replace(
        batch,
        sample_ids=batch.sample_ids[samples],
        rejected=batch.rejected if start == 0 else [],
        notices=batch.notices if start == 0 else [],
        input_ids=batch.input_ids[samples, :longest],
        attention_mask=batch.attention_mask[samples, :longest],
        labels=batch.labels[samples, :longest],
        num_images=batch.num_images[samples],
        sizes={name: tensor[images] for name, tensor in batch.sizes.items() if has_images},
        pixels={name: tensor[images] for name, tensor in batch.pixels.items() if has_images},
        keys=batch.keys[samples],
        trunk=None if batch.trunk is None else batch.trunk[tokens],
        teacher=None if batch.teacher is None else batch.teacher[supervised],
        teacher_input=None if batch.teacher_input is None else batch.teacher_input[supervised],
    )


def _slice(counts: Tensor, samples: slice) -> slice:
    """Where the entries of some samples lie, of which each has so many."""
    first = int(counts[: samples.start].sum())
    return slice(first, first + int(counts[samples].sum()))


TENSORS = ("input_ids", "attention_mask", "labels", "num_images", "trunk", "teacher", "teacher_input")
OF_IMAGES = ("sizes", "pixels")


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """Those that it has, by name; `pixels.NAME` and `sizes.NAME` those of images."""
    tensors = {name: getattr(batch, name) for name in TENSORS if getattr(batch, name) is not None}
    for group in OF_IMAGES:
        tensors |= {f"{group}.{name}": tensor for name, tensor in getattr(batch, group).items()}
    return tensors


def fields_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a batch that these are, by the names that `tensors_of` gives."""
    found: dict[str, Any] = {group: {} for group in OF_IMAGES}
    for name, tensor in tensors.items():
        group, of_group, inner = name.partition(".")
        if of_group:
            found[group][inner] = tensor
        else:
            found[name] = tensor
    return found


def to_row(batch: Batch) -> dict[str, Any]:
    """A batch as one row of a Ray dataset: its tensors as safetensors bytes, the rest as JSON."""
    about = {name: getattr(batch, name) for name in ("sample_ids", "rejected", "keys", "notices")}
    return {
        "step": batch.step,
        "micro_batch": batch.micro_batch,
        "about": json.dumps(about),
        "tensors": save(tensors_of(batch)),
    }


def from_row(row: dict[str, Any]) -> Batch:
    """The inverse of `to_row`."""
    return Batch(
        step=int(row["step"]),
        micro_batch=int(row["micro_batch"]),
        **json.loads(row["about"]),
        **fields_of(load(bytes(row["tensors"]))),
    )
