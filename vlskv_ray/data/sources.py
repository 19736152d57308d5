"""Sources: files and data sets as random-access tables of conversations.

Opening a source scans it once and answers what a plan needs: how many rows, and about how many images and how much text
each holds. Reading a row parses that row alone and gives a `Sample`, or raises `Rejected`; no row harms another. A file
which cannot be used at all raises `SourceError` when it is opened.
"""

import codecs
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vlskv_ray.data.json_files import open_binary, open_json
from vlskv_ray.data.layouts import Layout
from vlskv_ray.data.refused_formats import refuse_other_formats
from vlskv_ray.data.sample import Sample, SourceError


class SourceSpec(Protocol):
    """What a source is opened from, an entry of `data.sources`: files (`path`), `shapes` or a hub data set (`name`)."""

    @property
    def name(self) -> str | None: ...
    @property
    def path(self) -> str | None: ...
    @property
    def image_root(self) -> str | None: ...
    @property
    def format(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def split(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def num_samples(self) -> int | None: ...
    @property
    def ignore_columns(self) -> tuple[str, ...]: ...


class Source(Protocol):
    """A table of rows, counted from 0. Pickles without open handles, so that it can travel to workers.

    `name` is unique among the sources of a run and begins every uid; `weight` is as in the spec. Reading a row opens
    some of `files`, so they must be there wherever rows are read. `num_images`,
    int32[num_rows], and `text_bytes`, int64[num_rows], estimate what a row holds; 0 for a row that cannot be used.
    Workers have no use for them, so they may be missing from what travels.
    """

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_images(self) -> npt.NDArray[np.int32]: ...
    @property
    def text_bytes(self) -> npt.NDArray[np.int64]: ...

    @property
    def fingerprint(self) -> str:
        """Changes when the rows do; pictures beside a file are not looked at."""

    @property
    def layout(self) -> Layout | None:
        """Of its rows; None where they are of no file, or none can be used."""

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders that image paths of its rows are relative to; none where no path can be used."""

    def uid(self, row: int) -> str:
        """Where a person finds this row: the source's name, the file if it has several, the line or row from 1."""

    def read(self, row: int, *, prompt: bool = False) -> Sample:
        """The sample of this row.

        Args:
            row: from 0.
            prompt: the conversation may end with a question.

        Raises:
            Rejected: the row cannot be used.
        """

    def columns(self, row: int) -> dict[str, Any]:
        """What the file says in this row, for a command that writes it anew: all of it in JSON; elsewhere what the
        conversation is made of, and texts, numbers and truths beside it.

        Raises:
            Rejected: the row cannot be read.
        """


def open_sources(specs: Sequence[SourceSpec], *, cache_dir: str | None = None) -> list[Source]:
    """Opens every source of a run under a name of its own: files of one name are told apart by their folders.

    Args:
        specs: what to open.
        cache_dir: where the `datasets` library keeps Parquet and hub data; None: its default.

    Raises:
        SourceError: a source cannot be used, or is listed twice.
    """
    names = [_name(spec, 1) for spec in specs]
    for depth in range(2, 1 + max((len(Path(spec.path or "").parts) for spec in specs), default=0)):
        names = [_name(spec, depth) if names.count(name) > 1 else name for spec, name in zip(specs, names, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise SourceError(f"source {name!r} is listed {names.count(name)} times; list it once and raise its weight")
    return [open_source(spec, cache_dir=cache_dir, name=name) for spec, name in zip(specs, names, strict=True)]


def open_source(spec: SourceSpec, *, cache_dir: str | None = None, name: str | None = None) -> Source:
    """Opens one source; a glob pattern is one source over all its files, in the order of their names.

    Args:
        spec: what to open.
        cache_dir: where the `datasets` library keeps Parquet and hub data; None: its default.
        name: the source's name; None: the file's or data set's own.

    Raises:
        SourceError: the source cannot be used.
    """
    name = name or _name(spec, 1)
    root = None if spec.image_root is None else Path(os.path.abspath(os.path.expanduser(spec.image_root)))
    ignored = spec.ignore_columns
    if root is not None and not root.is_dir():
        raise SourceError(f"{name}: image_root: there is no folder {root}")
    if spec.name == "shapes":
        from vlskv_ray.data.shapes import ShapesSource  # drawn on demand: only a run that uses it pays for it

        count = {} if spec.num_samples is None else {"num_samples": spec.num_samples}
        return ShapesSource(split=spec.split, weight=spec.weight, **count)
    from vlskv_ray.data.arrow_tables import open_hub, open_parquet  # likewise

    if spec.path is None:
        assert spec.name is not None
        return open_hub(
            name, spec.weight, spec.name, spec.split, spec.revision, root, spec.num_samples, cache_dir, ignored
        )
    files = _matching_files(spec.path)
    for file in files:
        refuse_other_formats(file)
    formats = [_sniff_format(file) if spec.format == "auto" else spec.format for file in files]
    if "parquet" not in formats:
        return open_json(name, spec.weight, files, formats, root, spec.num_samples, ignored)
    if set(formats) != {"parquet"}:
        raise SourceError(f"{spec.path}: matches Parquet and JSON files; list them as two sources")
    return open_parquet(name, spec.weight, files, root, spec.num_samples, cache_dir, ignored)


def _name(spec: SourceSpec, depth: int) -> str:
    """The name a source goes by; `depth` is how many parts of its path are shown."""
    return f"{spec.name}/{spec.split}" if spec.path is None else str(Path(*Path(spec.path).parts[-depth:]))


def _matching_files(pattern: str) -> list[Path]:
    """The files a path or glob pattern means, as absolute paths, sorted."""
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        raise SourceError(f"{pattern}: is a folder; name its files, such as {os.path.join(pattern, '*.jsonl')}")
    found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    files = [Path(os.path.abspath(file)) for file in found if os.path.isfile(file)]
    if not files:
        wanted = "no file matches this pattern" if glob.has_magic(pattern) else "no such file"
        raise SourceError(f"{pattern}: {wanted} (looked in {os.path.dirname(os.path.abspath(pattern))})")
    return files


def _sniff_format(file: Path) -> str:
    """The format of a file, by its content first: JSON lines are often named .json, and the reverse."""
    with open_binary(file) as stream:
        head = stream.read(4096)
    if head.startswith(b"PAR1") or file.suffix == ".parquet":
        return "parquet"
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if start == b"[":
        return "json"
    if start == b"{" or file.suffix in (".jsonl", ".ndjson", ".json"):
        return "jsonl"
    raise SourceError(f"{file}: begins with {head[:8]!r}; wanted JSON lines, a JSON list or Parquet")
