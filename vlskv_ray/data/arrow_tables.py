"""Parquet files and hub data sets as tables of rows, memory-mapped by the `datasets` library."""

import base64
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlskv_ray.data.json_files import folder_of
from vlskv_ray.data.layouts import Layout, layout_of_file
from vlskv_ray.data.rows import sample_of, unread_message, unread_pictures
from vlskv_ray.data.sample import Rejected, Sample, SourceError

_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError)
"""What Arrow and `datasets` raise for values and metadata that make no sense to them, beside OSError."""
_LOOKED_AT = 8  # filled values of a column in each file, to tell whether it has pictures


@dataclass(frozen=True)
class Part:
    """The rows of a source that come from one file, or from a hub data set."""

    file: str
    """As a uid shows it; empty where the source has only one."""
    num_rows: int
    table: int
    """Which of the source's tables holds them."""
    first: int
    """The first one's row there."""


@dataclass(frozen=True, eq=False)
class ArrowSource:
    """Memory-mapped `datasets.Dataset`s, which pickle as file names: one for all files of the same columns.

    `tables` are pairs of a data set and its features, which decode JSON columns but no image. `ends` says where each
    part ends among the rows of the source, int64[parts].
    """

    name: str
    weight: float
    tables: tuple[tuple[Any, Any], ...]
    parts: tuple[Part, ...]
    ends: npt.NDArray[np.int64]
    root: Path | None
    num_images: npt.NDArray[np.int32]
    text_bytes: npt.NDArray[np.int64]
    fingerprint: str
    layout: Layout
    beside: tuple[Any, ...]
    """Of each table the columns of texts, numbers and truths that are not read."""
    ignored: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        return int(self.ends[-1])

    @property
    def roots(self) -> tuple[Path, ...]:
        return () if self.root is None else (self.root,)

    @property
    def files(self) -> tuple[Path, ...]:
        """The memory-mapped tables: what is left to be read once it is opened."""
        return tuple(Path(file["filename"]) for dataset, _ in self.tables for file in dataset.cache_files)

    def __getstate__(self) -> dict[str, Any]:
        nothing = {"num_images": np.empty(0, np.int32), "text_bytes": np.empty(0, np.int64)}  # workers only read rows
        return self.__dict__ | nothing

    def uid(self, row: int) -> str:
        part, at = self._locate(row)
        return f"{self.name}:{part.file}:{at + 1}" if part.file else f"{self.name}:{at + 1}"

    def read(self, row: int, *, prompt: bool = False) -> Sample:
        columns = self._read(row, *self.tables[self._locate(row)[0].table])
        return sample_of(self.uid(row), columns, self.root, self.ignored, self.layout, prompt=prompt)

    def columns(self, row: int) -> dict[str, Any]:
        table = self._locate(row)[0].table
        return self._read(row, self.beside[table], None) | self._read(row, *self.tables[table])

    def _read(self, row: int, dataset: Any, features: Any) -> dict[str, Any]:
        """A row of one of the tables. Rejected: row_unreadable, text_encoding."""
        part, at = self._locate(row)
        if not dataset.column_names:
            return {}
        try:
            columns = dict(dataset[part.first + at].to_pylist()[0])
            return columns if features is None else dict(features.decode_example(columns))
        except UnicodeDecodeError as error:
            reason = f"a text is not UTF-8: {error.reason} at its byte {error.start}; save it as UTF-8"
            raise Rejected("text_encoding", reason) from error
        except _UNREADABLE as error:
            raise Rejected("row_unreadable", f"{_one_line(error)}; write the row anew") from error

    def _locate(self, row: int) -> tuple[Part, int]:
        """The part of a row, and which of its rows that is, from 0."""
        k = int(np.searchsorted(self.ends, row, side="right"))
        return self.parts[k], row - int(self.ends[k]) + self.parts[k].num_rows


def open_parquet(
    name: str,
    weight: float,
    files: Sequence[Path],
    root: Path | None,
    num_samples: int | None,
    cache_dir: str | None,
    ignored: Sequence[str] = (),
) -> ArrowSource:
    """Parquet files as one table, whatever columns each has; image paths in them lead from `root` or the files' folder.

    Raises:
        SourceError: a file is damaged, has no columns that are known, or has columns that look like pictures, are not
            read and not among those `ignored`.
    """
    digest = hashlib.sha256()
    layout: Layout | None = None
    alike: list[tuple[Any, list[Path]]] = []  # of the same columns
    for file in files:
        footer, columns, layout = _check_footer(file, ignored, layout)
        digest.update(footer)
        of_same = next((of_same for known, of_same in alike if known == columns), None)
        if of_same is None:
            alike.append((columns, of_same := []))
        of_same.append(file)
    assert layout is not None  # a pattern that no file matches is none
    datasets = [_load_parquet(name, of_same, cache_dir, layout, ignored) for _, of_same in alike]
    parts = {}
    for table, (_, of_same) in enumerate(alike):
        first = 0
        for file in of_same:
            shown = os.path.relpath(file, folder_of(files)) if len(files) > 1 else ""
            parts[file] = Part(shown, _num_rows(file), table, first)
            first += parts[file].num_rows
        if first != len(datasets[table]):
            raise SourceError(f"{of_same[0]}: {first} rows are announced, {len(datasets[table])} are there; {DAMAGED}")
    in_order = [parts[file] for file in files]
    root = root or Path(folder_of(files))
    return _arrow_source(name, weight, datasets, in_order, root, num_samples, digest.hexdigest(), layout, ignored)


def open_hub(
    name: str,
    weight: float,
    dataset_id: str,
    split: str,
    revision: str | None,
    root: Path | None,
    num_samples: int | None,
    cache_dir: str | None,
    ignored: Sequence[str] = (),
) -> ArrowSource:
    """A split of a data set on the Hugging Face hub.

    Raises:
        SourceError: it is not to be had, has no columns that are known, or has columns that look like pictures, are not
            read and not among those `ignored`.
    """
    remedy = (
        "wanted a data set on the Hugging Face hub and one of its splits; without a network, copy its Parquet files "
        "here and set path to them"
    )
    place = f"{dataset_id}, split {split!r}"
    dataset = _load(place, remedy, dataset_id, split=split, revision=revision, cache_dir=cache_dir)
    whole = [Part("", len(dataset), 0, 0)]
    fingerprint = f"{dataset_id}@{dataset.info.version}"
    layout = layout_of_file(dataset.column_names, name, ignored, None)
    return _arrow_source(name, weight, [dataset], whole, root, num_samples, fingerprint, layout, ignored)


DAMAGED = "is it damaged? Write or download it anew"


def _load_parquet(
    name: str, files: Sequence[Path], cache_dir: str | None, layout: Layout, ignored: Sequence[str]
) -> Any:
    """Parquet files of the same columns as one data set. SourceError names the first one that cannot be read."""
    data_files = [glob.escape(str(file)) for file in files]
    options = _without_foreign(files[0], layout, ignored)
    try:
        return _load(name, DAMAGED, "parquet", data_files=data_files, split="train", cache_dir=cache_dir, **options)
    except SourceError:
        for file in files:
            _check_content(file)
        raise


def _without_foreign(file: Path, layout: Layout, ignored: Sequence[str]) -> dict[str, Any]:
    """What keeps `datasets` from columns of types that it does not know, such as maps: nothing where there are none.

    Raises:
        SourceError: there is one that is not among those `ignored`, so that nobody knows whether it holds pictures.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    known, foreign = [], []
    schema = pyarrow.parquet.read_schema(file)
    for field in schema:
        try:
            datasets.Features.from_arrow_schema(pa.schema([field]))
            known.append(field)
        except (OSError, *_UNREADABLE):
            foreign.append(field)
    for field in foreign:
        if field.name not in ignored:
            is_read = field.name in layout.columns
            remedy = "write it as another" if is_read else "list it in ignore_columns of the source"
            raise SourceError(
                f"{file}: the column {field.name!r} is of a type that is not read, {field.type}; {remedy}"
            )
    if not foreign:
        return {}
    features = datasets.Features.from_arrow_schema(pa.schema(known))
    return {"columns": list(features), "features": features}


def _check_content(file: Path) -> None:
    """SourceError where a Parquet file cannot be read to its end."""
    import pyarrow.parquet

    try:
        for _ in pyarrow.parquet.ParquetFile(file).iter_batches(1000):
            pass
    except (OSError, *_UNREADABLE) as error:
        raise SourceError(f"{file}: cannot be read as Parquet: {_one_line(error)}; {DAMAGED}") from error


def _num_rows(file: Path) -> int:
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(file).num_rows)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _check_footer(file: Path, ignored: Sequence[str], layout_so_far: Layout | None) -> tuple[bytes, Any, Layout]:
    """The footer of a Parquet file (its schema, and place, size and extremes of every column), its columns as what
    tells them from those of another, and their layout."""
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
        schema = metadata.schema.to_arrow_schema()
        columns = [(field.name, str(field.type)) for field in schema]
    except (OSError, *_UNREADABLE) as error:
        raise SourceError(f"{file}: cannot be read as Parquet: {_one_line(error)}; is the file complete?") from error
    layout = layout_of_file(schema.names, str(file), ignored, layout_so_far)
    if not metadata.num_rows:
        raise SourceError(f"{file}: no rows; wanted at least one")
    return footer, (columns, (schema.metadata or {}).get(b"huggingface")), layout


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
    except (OSError, *_UNREADABLE, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise SourceError(f"{place}: {reason}; {remedy}") from error


def _arrow_source(
    name: str,
    weight: float,
    datasets: Sequence[Any],
    parts: Sequence[Part],
    root: Path | None,
    num_samples: int | None,
    fingerprint: str,
    layout: Layout,
    ignored: Sequence[str],
) -> ArrowSource:
    ends = np.cumsum([part.num_rows for part in parts])
    if num_samples is not None and num_samples < ends[-1]:
        count = int(np.searchsorted(ends, num_samples)) + 1
        ends, parts = ends[:count].copy(), list(parts[:count])
        left = parts[-1].num_rows - int(ends[-1]) + num_samples
        parts[-1], ends[-1] = replace(parts[-1], num_rows=left), num_samples
    if not ends[-1]:
        raise SourceError(f"{name}: no rows; wanted at least one")
    _check_unread(name, datasets, parts, layout, ignored)
    tables = [_read_columns(dataset, layout) for dataset in datasets]
    of_tables = [_estimates_of(dataset, layout) for dataset, _ in tables]
    num_images, text_bytes = (
        np.concatenate([of_tables[part.table][which][part.first : part.first + part.num_rows] for part in parts])
        for which in (0, 1)
    )
    return ArrowSource(
        name,
        weight,
        tuple(tables),
        tuple(parts),
        ends,
        root,
        num_images.astype(np.int32),
        text_bytes,
        fingerprint,
        layout,
        tuple(_columns_beside(dataset, layout) for dataset in datasets),
        tuple(ignored),
    )


def _columns_beside(dataset: Any, layout: Layout) -> Any:
    """The columns of texts, numbers and truths that the layout does not read."""
    import datasets

    plain = [
        name
        for name, feature in dataset.features.items()
        if isinstance(feature, datasets.Value) and re.match("string|large_string|u?int|float|bool", feature.dtype)
    ]
    return dataset.select_columns([name for name in plain if name not in layout.columns]).with_format("arrow")


def _read_columns(dataset: Any, layout: Layout) -> tuple[Any, Any]:
    """The columns that the layout reads of a data set, as Arrow tables, and what decodes them."""
    import datasets

    used = [column for column in layout.columns if column in dataset.column_names]
    features = datasets.Features({column: _undecoded(dataset.features[column]) for column in used})
    return dataset.select_columns(used).with_format("arrow"), features


def _check_unread(
    name: str, datasets: Sequence[Any], parts: Sequence[Part], layout: Layout, ignored: Sequence[str]
) -> None:
    """SourceError where the first filled values of columns that are not read, or of keys of turns, look like pictures,
    in any of the files."""
    for part in parts:
        rows = datasets[part.table].with_format("arrow").select(range(part.first, part.first + part.num_rows))
        first_rows: dict[str, int] = {}
        for row, columns in _filled_values(rows, layout, ignored):
            for unread in unread_pictures(columns, layout, ignored):
                first_rows.setdefault(unread, row)
        if first_rows:
            found = [f"{unread!r} (row {row + 1})" for unread, row in first_rows.items()]
            raise SourceError(f"{os.path.join(name, part.file)}: {unread_message(found, layout)}")


def _filled_values(rows: Any, layout: Layout, ignored: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The first filled values of each column but those of pictures, each with its row from 0 and the row's pictures."""
    pictures = rows.select_columns([column for column in layout.image_columns if column in rows.column_names])
    for column in rows.column_names:
        if column not in (*layout.image_columns, *ignored):
            for row, value in _first_filled(rows.select_columns([column]), column):
                yield row, {column: value} | _values_of(pictures, row)


def _values_of(rows: Any, row: int) -> dict[str, Any]:
    """The values of a row by column; none where they cannot be read."""
    with suppress(*_UNREADABLE):  # where the row is used, reading it says so
        return dict(rows[row].to_pylist()[0]) if rows.column_names else {}
    return {}


def _first_filled(rows: Any, column: str) -> list[tuple[int, Any]]:
    """The first few values of a column that hold text or bytes, and their rows from 0."""
    found: list[tuple[int, Any]] = []
    before = 0
    for table in rows.iter(10_000):
        filled = np.concatenate([_per_row(chunk, np.sign, np.maximum) for chunk in table.column(column).chunks])
        for at in np.flatnonzero(filled)[: _LOOKED_AT - len(found)].tolist():
            with suppress(*_UNREADABLE):  # where the row is used, reading it says so
                found.append((before + at, table.column(column)[at].as_py()))
        before += len(table)
        if len(found) >= _LOOKED_AT:
            break
    return found


def _undecoded(feature: Any) -> Any:
    """The feature without decoding of anything but JSON: by itself `datasets` opens any path or URL it finds in a row,
    as whatever the file says that its columns are: images, sounds, documents."""
    import datasets

    if getattr(feature, "decode", False) and not isinstance(feature, datasets.Json):
        return replace(feature, decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_undecoded(feature.feature))
    return feature


def _estimates_of(dataset: Any, layout: Layout) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """int64[num_rows] each: images and bytes of text per row."""
    num_images, text_bytes = zip(*[_estimates(table, layout) for table in dataset.iter(10_000)], strict=True)
    return np.concatenate(num_images), np.concatenate(text_bytes)


def _estimates(table: Any, layout: Layout) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """int64[num_rows] each: images and bytes of text per row, from Arrow's offsets alone; the values stay on disk."""
    num_images = text_bytes = np.zeros(len(table), np.int64)
    for column in table.column_names:
        chunks = table.column(column).chunks
        if column in layout.image_columns:
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
    if pa.types.is_dictionary(kind):
        return _per_row(array.dictionary_decode(), leaf, join)
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
    if kind in (pa.string_view(), pa.binary_view()):  # whose lengths Arrow does not tell
        return _per_row(array.cast(pa.large_binary()), leaf, join)
    if kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        return leaf(pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64))
    return np.zeros(len(array), np.int64)
