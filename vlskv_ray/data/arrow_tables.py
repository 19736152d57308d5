"""Parquet files and hub data sets as tables of rows, memory-mapped by the `datasets` library."""

import base64
import glob
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlskv_ray.data.json_files import folder_of
from vlskv_ray.data.rows import IMAGE_COLUMNS, LAYOUTS, check_columns, sample_of
from vlskv_ray.data.sample import Sample, SourceError


@dataclass(frozen=True, eq=False)
class ArrowSource:
    """A memory-mapped `datasets.Dataset`, which pickles as file names. `features` decode JSON columns but no image."""

    name: str
    weight: float
    dataset: Any
    features: Any
    root: Path | None
    num_images: npt.NDArray[np.int32]
    text_bytes: npt.NDArray[np.int64]
    fingerprint: str

    @property
    def num_rows(self) -> int:
        return len(self.dataset)

    @property
    def files(self) -> tuple[Path, ...]:
        """The memory-mapped tables: what is left to be read once it is opened."""
        return tuple(Path(file["filename"]) for file in self.dataset.cache_files)

    def __getstate__(self) -> dict[str, Any]:
        nothing = {"num_images": np.empty(0, np.int32), "text_bytes": np.empty(0, np.int64)}  # workers only read rows
        return self.__dict__ | nothing

    def uid(self, row: int) -> str:
        return f"{self.name}:{row + 1}"

    def read(self, row: int) -> Sample:
        columns = self.features.decode_example(self.dataset[row].to_pylist()[0])
        return sample_of(self.uid(row), columns, self.root)


def open_parquet(
    name: str, weight: float, files: Sequence[Path], root: Path | None, num_samples: int | None, cache_dir: str | None
) -> ArrowSource:
    """Parquet files of the same columns as one table; image paths in them lead from `root` or the files' folder.

    Raises:
        SourceError: a file is damaged, or has no columns that are known.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(_checked_footer(file))
    dataset = _load(
        name,
        "is one of the files damaged, or do their columns differ?",
        "parquet",
        data_files=[glob.escape(str(file)) for file in files],
        split="train",
        cache_dir=cache_dir,
    )
    return _arrow_source(name, weight, dataset, root or Path(folder_of(files)), num_samples, digest.hexdigest())


def open_hub(
    name: str,
    weight: float,
    dataset_id: str,
    split: str,
    revision: str | None,
    root: Path | None,
    num_samples: int | None,
    cache_dir: str | None,
) -> ArrowSource:
    """A split of a data set on the Hugging Face hub.

    Raises:
        SourceError: it is not to be had, or has no columns that are known.
    """
    remedy = (
        "wanted a data set on the Hugging Face hub and one of its splits; without a network, copy its Parquet files "
        "here and set path to them"
    )
    place = f"{dataset_id}, split {split!r}"
    dataset = _load(place, remedy, dataset_id, split=split, revision=revision, cache_dir=cache_dir)
    return _arrow_source(name, weight, dataset, root, num_samples, f"{dataset_id}@{dataset.info.version}")


def _checked_footer(file: Path) -> bytes:
    """The footer of a Parquet file: its schema, and place, size and extremes of every column."""
    import pyarrow.parquet

    if file.stat().st_size == 0:
        raise SourceError(f"{file}: the file is empty (0 bytes); wanted Parquet")
    footer = _footer(file)
    # Ray's extension types were a way to run code from a file (CVE-2026-41486): refused before Arrow builds any type,
    # as it does on opening a file once the process has imported ray.data.
    if any(b"ARROW:extension:name" in schema and b"ray.data.arrow" in schema for schema in _base64_runs(footer)):
        raise SourceError(f"{file}: holds Ray tensor columns, which are not opened; wanted images as encoded bytes")
    try:
        metadata = pyarrow.parquet.read_metadata(file)
    except (OSError, ValueError) as error:
        raise SourceError(f"{file}: cannot be read as Parquet: {error}; is the file complete?") from error
    check_columns(metadata.schema.to_arrow_schema().names, str(file))
    if not metadata.num_rows:
        raise SourceError(f"{file}: no rows; wanted at least one")
    return footer


def _footer(file: Path) -> bytes:
    """The end of a file, as long as it says itself; nothing where that cannot be."""
    content_length = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(max(0, content_length - 8))  # the footer's length, and the closing mark
        length, mark = int.from_bytes(stream.read(4), "little"), stream.read(4)
        if mark != b"PAR1" or length > content_length - 12:
            return b""
        stream.seek(content_length - 8 - length)
        return stream.read()


def _base64_runs(content: bytes) -> Iterator[bytes]:
    """All that may be base64 in `content`, decoded: so Arrow's schema stands in a Parquet footer. A character before it
    may belong to the length that Parquet puts there, so each run is read from all four places it may start at."""
    for run in re.findall(rb"[A-Za-z0-9+/]{16,}", content):
        for start in range(4):
            yield base64.b64decode(run[start : start + (len(run) - start) // 4 * 4])


def _load(place: str, remedy: str, *args: Any, **kwargs: Any) -> Any:
    """`datasets.load_dataset` without progress bars, its errors as SourceError."""
    import datasets  # a second of imports, which a run on JSON files does not need
    import huggingface_hub.utils

    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    try:
        return datasets.load_dataset(*args, **kwargs)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise SourceError(f"{place}: {reason}; {remedy}") from error


def _arrow_source(
    name: str, weight: float, dataset: Any, root: Path | None, num_samples: int | None, fingerprint: str
) -> ArrowSource:
    import datasets

    check_columns(dataset.column_names, name)
    used = [column for column in (*LAYOUTS, *IMAGE_COLUMNS) if column in dataset.column_names]
    dataset = dataset.select_columns(used).with_format("arrow")
    if num_samples is not None:
        dataset = dataset.select(range(min(num_samples, len(dataset))))
    if not len(dataset):
        raise SourceError(f"{name}: no rows; wanted at least one")
    features = datasets.Features({column: _undecoded(dataset.features[column]) for column in used})
    estimates = [_estimates(table) for table in dataset.iter(10_000)]
    num_images, text_bytes = (np.concatenate(column) for column in zip(*estimates, strict=True))
    return ArrowSource(name, weight, dataset, features, root, num_images.astype(np.int32), text_bytes, fingerprint)


def _undecoded(feature: Any) -> Any:
    """The feature without decoding of images: by itself `datasets` opens any path or URL it finds in a row."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_undecoded(feature.feature))
    return feature


def _estimates(table: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """int64[num_rows] each: images and bytes of text per row, from Arrow's offsets alone; the values stay on disk."""
    num_images = text_bytes = np.zeros(len(table), np.int64)
    for column in table.column_names:
        chunks = table.column(column).chunks
        if column in IMAGE_COLUMNS:
            counts = np.concatenate([_per_row(chunk, np.sign, np.maximum) for chunk in chunks])
            num_images = np.where(num_images > 0, num_images, counts)
        else:
            text_bytes = text_bytes + np.concatenate([_per_row(chunk, np.positive, np.add) for chunk in chunks])
    return num_images, text_bytes


def _per_row(array: Any, leaf: np.ufunc, join: np.ufunc) -> npt.NDArray[np.int64]:
    """int64[len(array)]: `leaf` of the byte lengths of strings, joined over a struct's fields, summed over lists."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _per_row(array.storage, leaf, join)
    if pa.types.is_fixed_size_list(kind):
        return _per_row(array.cast(pa.list_(kind.value_type)), leaf, join)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        sums = np.concatenate([[0], np.cumsum(_per_row(array.values, leaf, join))])
        return np.diff(sums[array.offsets.to_numpy()])
    if pa.types.is_struct(kind):
        fields = [_per_row(array.field(index), leaf, join) for index in range(kind.num_fields)]
        return join.reduce(fields) if fields else np.zeros(len(array), np.int64)
    if kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        return leaf(pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64))
    return np.zeros(len(array), np.int64)
