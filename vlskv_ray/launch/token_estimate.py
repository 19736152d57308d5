"""About how long the samples of a run are in tokens, by some of them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vlskv_ray.data.collate import Encoded
from vlskv_ray.data.pipeline import Loader
from vlskv_ray.data.plan import Table, Tokens
from vlskv_ray.data.sources import Source

SAMPLES_TRIED = 32
"""From which the length of samples and the size of a teacher cache are estimated."""


def tokens_of(loader: Loader) -> Tokens:
    """How many tokens the images and the text of a run's samples come to, by some of them."""
    samples = some_samples(loader)
    if not samples:
        return Tokens()
    estimates = [(source.num_images, source.text_bytes) for source in loader.sources]
    about = [(*(of[row] for of in estimates[table]), len(sample.input_ids)) for sample, (table, row) in samples]
    return Tokens.fitted(*zip(*about, strict=True))


def lengths_of(sources: Sequence[Source], tables: Sequence[Table], tokens: Tokens) -> NDArray[np.uint16]:
    """About how many tokens each sample of a plan has."""
    parts = [
        tokens.of(source.num_images[: table.rows], source.text_bytes[: table.rows])
        for source, table in zip(sources, tables, strict=True)
    ]
    return np.concatenate(parts)


def some_samples(loader: Loader) -> list[tuple[Encoded, tuple[int, int]]]:
    """Samples from all over the data that can be used, and the table and row of each."""
    rows = len(loader.plan.lengths)
    # from all over: files are often sorted, by length too
    numbers = np.linspace(0, rows - 1, min(rows, SAMPLES_TRIED), dtype=np.int64).tolist()
    loader = replace(loader, cache=None)
    return [(sample, loader.plan.locate(number)) for number in numbers for sample in loader.samples([number])[0]]
