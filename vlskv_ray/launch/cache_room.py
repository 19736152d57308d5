"""Where a run keeps its teacher cache, and whether there is room for it."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlskv_ray.command import print_info
from vlskv_ray.data.collate import IGNORE_INDEX
from vlskv_ray.data.pipeline import Loader
from vlskv_ray.data.teacher_cache import IN_MEMORY, TeacherCache
from vlskv_ray.launch.token_estimate import some_samples
from vlskv_ray.model.build import load_config
from vlskv_ray.model.fingerprint import teacher_fingerprint
from vlskv_ray.training.run import Run
from vlskv_ray.words import format_bytes, short_path

FIT_FORMAT = 3
"""Of what is fitted and how; one of another is not used."""


def teacher_cache_of(run: Run, num_key_value_layers: int) -> TeacherCache:
    """The teacher cache of a run with that N, named by all that the states of a sample depend on."""
    depends_on = teacher_of(run) | {"num_key_value_layers": num_key_value_layers}
    if run.config.model.teacher_cache == "memory":
        return TeacherCache(IN_MEMORY, depends_on, temporary=True)
    return TeacherCache(cache_folder(run), depends_on)


def cache_folder(run: Run) -> Path:
    """Where a run keeps on disk what other runs of its teacher can use."""
    return Path(run.config.model.teacher_cache_dir or f"{run.config.output.dir}/.teacher-cache")


def teacher_of(run: Run) -> dict[str, Any]:
    """All that what a teacher makes of a sample depends on."""
    options, data = run.config.model, run.config.data
    return {
        "teacher": teacher_fingerprint(run.model_files, getattr(torch, options.dtype)),
        "dtype": options.dtype,
        "limits": [data.max_length, data.max_images_per_sample],
        "transformers": version("transformers"),
    }


def kept_fit(run: Run, loader: Loader, text_config: Any, samples: Sequence[Sequence[int]]) -> Path:
    """The file of a fit for any run, named by all that it depends on."""
    depends_on = teacher_of(run) | {
        "format": FIT_FORMAT,
        "num_key_value_layers": text_config.num_key_value_layers,
        "key_value_group_size": text_config.key_value_group_size,
        "data": [source.fingerprint for source in loader.sources],
        "samples": samples,
        "weights": [run.config.vision_loss_weight, run.config.text_loss_weight],
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return cache_folder(run) / f"fit-{digest[:16]}.safetensors"


def check_cache(run: Run, loader: Loader) -> None:
    """Says what a run's teacher cache will take. ValueError where it does not fit.

    The size is estimated from a few samples; as many as are there already count as this run's.
    """
    assert run.cache is not None
    text = load_config(run.model_files).text_config
    rows = len(loader.plan.lengths)
    tried = some_samples(loader)
    # the trunk of every token, and of supervised ones what enters and leaves the teacher's last layer
    lengths = [len(sample.input_ids) + 2 * int((sample.labels != IGNORE_INDEX).sum()) for sample, _ in tried] or [0]
    states = float(np.mean(lengths)) * text.hidden_size * (2 if run.config.model.dtype == "bfloat16" else 4)
    there, seen = run.cache.count(), run.total_steps * run.micro_batches_per_step * run.config.micro_batch_size
    wanted = max(0, min(rows, seen) - there) * states
    print_info(
        run.config,
        f"teacher cache {there} samples are in {short_path(run.cache.folder)}; up to {format_bytes(wanted)} more "
        f"will be written",
    )
    run.cache.check_room(wanted)
