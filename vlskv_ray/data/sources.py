"""Sources: files and data sets as random-access tables of conversations.

Opening a source scans it once and answers what a plan needs: how many rows, and about how many images and how much text
each holds. Reading a row parses that row alone and gives a `Sample`, or raises `Rejected`; no row harms another. A file
which cannot be used at all raises `SourceError` when it is opened.
"""

import base64
import codecs
import glob
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vlskv_ray.data.sample import ImageFile, Rejected, Sample

_WINDOW = 2**24  # characters of a JSON list held at once


class SourceError(ValueError):
    """A source that cannot be used: names the file and the place, what was wanted, and the remedy."""


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


class Source(Protocol):
    """A table of rows, counted from 0. Pickles without open handles, so that it can travel to workers.

    `name` is unique among the sources of a run and begins every uid; `weight` is as in the spec. `num_images`,
    int32[num_rows], and `text_bytes`, int64[num_rows], estimate what a row holds; 0 for a row that cannot be used.
    """

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_images(self) -> npt.NDArray[np.int32]: ...
    @property
    def text_bytes(self) -> npt.NDArray[np.int64]: ...

    def uid(self, row: int) -> str:
        """Where a person finds this row: the source's name, the file if it has several, the line or row from 1."""

    def read(self, row: int) -> Sample:
        """The sample of this row.

        Raises:
            Rejected: the row cannot be used.
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
    if spec.path is None:
        if spec.name == "shapes":
            from vlskv_ray.data.shapes import ShapesSource  # drawn on demand: only a run that uses it pays for it

            count = {} if spec.num_samples is None else {"num_samples": spec.num_samples}
            return ShapesSource(split=spec.split, weight=spec.weight, **count)
        return _open_hub(spec, name, cache_dir)
    files = _matches(spec.path)
    formats = [_sniffed(file) if spec.format == "auto" else spec.format for file in files]
    if "parquet" not in formats:
        return _open_json(spec, name, files, formats)
    if set(formats) != {"parquet"}:
        raise SourceError(f"{spec.path}: matches Parquet and JSON files; list them as two sources")
    return _open_parquet(spec, name, files, cache_dir)


def _name(spec: SourceSpec, depth: int) -> str:
    """The name a source goes by; `depth` is how many parts of its path are shown."""
    return f"{spec.name}/{spec.split}" if spec.path is None else "/".join(Path(spec.path).parts[-depth:])


def _matches(pattern: str) -> list[Path]:
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


def _sniffed(file: Path) -> str:
    """The format of a file, by its content first: JSON lines are often named .json, and the reverse."""
    with _opened(file) as stream:
        head = stream.read(4096)
    if head.startswith(b"PAR1") or file.suffix == ".parquet":
        return "parquet"
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if start == b"[":
        return "json"
    if start == b"{" or file.suffix in (".jsonl", ".ndjson", ".json"):
        return "jsonl"
    raise SourceError(f"{file}: begins with {head[:8]!r}; wanted JSON lines, a JSON list or Parquet")


def _opened(file: Path) -> io.BufferedReader:
    try:
        return file.open("rb")
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror}") from error


# --- From a row to a sample -----------------------------------------------------------------------------------------

# How each layout of conversations becomes turns of {"role", "content"}, by the column that shows it, preferred first. A
# further layout is one more entry. Images come from the columns `images` or `image` in all of them.
_LAYOUTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "messages": lambda row: row["messages"],
}
_IMAGE_COLUMNS = ("images", "image")
_WANTED = f"{' or '.join(_LAYOUTS)} (list of {{role, content}}), with {' or '.join(_IMAGE_COLUMNS)} for images"


def _layout(columns: Sequence[str]) -> Callable[[Mapping[str, Any]], Any]:
    for column, turns in _LAYOUTS.items():
        if column in columns:
            return turns
    raise Rejected("schema", f"found the columns {', '.join(map(repr, columns)) or '(none)'}; wanted {_WANTED}")


def _sample(uid: str, row: Mapping[str, Any], root: Path | None) -> Sample:
    """Checks a row and brings it into the one form everything else knows.

    Raises:
        Rejected: schema, conv_empty, role_unknown, no_answer, role_order, answer_empty, marker_mismatch, text_encoding.
    """
    turns = _layout(list(row))(row)
    if not turns:
        raise Rejected("conv_empty", "the conversation has no turns")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise Rejected("schema", f"the conversation is {type(turns).__name__}; wanted a list of {{role, content}}")
    roles = [turn.get("role") for turn in turns]
    _check_roles(roles)
    images = _images(row, root)
    messages = [
        {"role": role, "content": _parts(turn.get("content"), role, bool(images))}
        for role, turn in zip(roles, turns, strict=True)
    ]
    if any(m["role"] == "assistant" and not any(p["text"].strip() for p in m["content"]) for m in messages):
        raise Rejected("answer_empty", "an assistant turn has no text")
    num_markers = sum(part["type"] == "image" for message in messages for part in message["content"])
    if images and not num_markers:
        first_user = messages[roles.index("user")]
        first_user["content"] = [{"type": "image"} for _ in images] + first_user["content"]
    elif num_markers != len(images):
        raise Rejected("marker_mismatch", f"{num_markers} image markers for {len(images)} images; wanted equally many")
    return Sample(uid, messages, images)


def _check_roles(roles: list[Any]) -> None:
    known = ("system", "user", "assistant")
    unknown = [role for role in roles if role not in known]
    if unknown:
        raise Rejected("role_unknown", f"role {unknown[0]!r}; wanted one of {', '.join(known)}")
    if "assistant" not in roles:
        raise Rejected("no_answer", "the conversation has no assistant turn to learn from")
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise Rejected("role_order", f"{', '.join(roles)}; wanted an optional system, then user and assistant in turn")


def _parts(content: Any, role: str, has_images: bool) -> list[dict[str, str]]:
    """The parts of one turn. Only user turns hold images; a string's `<image>` is one if the row has any at all."""
    if content is None:
        return []
    if isinstance(content, str):
        pieces = content.split("<image>") if has_images and role == "user" else [content]
        parts: list[dict[str, str]] = []
        for index, piece in enumerate(pieces):
            parts += [{"type": "image"}] if index else []
            parts += [{"type": "text", "text": _text(piece)}] if piece else []
        return parts
    if not isinstance(content, list):
        raise Rejected("schema", f"content is {type(content).__name__}; wanted text or a list of parts")
    return [_part(part, role) for part in content]


def _part(part: Any, role: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": _text(part["text"])}
    if kind != "image":
        raise Rejected("schema", f"content part {kind!r}; wanted {{type: text, text: ...}} or {{type: image}}")
    if role != "user":
        raise Rejected("schema", f"an image in a turn of role {role!r}; wanted images in user turns only")
    return {"type": "image"}


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected("text_encoding", f"half a surrogate pair at character {error.start}: not valid text") from error
    return text


def _images(row: Mapping[str, Any], root: Path | None) -> list[bytes | ImageFile]:
    """The images of a row; null and "" are none."""
    column = next((column for column in _IMAGE_COLUMNS if row.get(column)), None)
    values = row[column] if column else []
    images: list[bytes | ImageFile] = []
    for value in values if isinstance(values, list) else [values]:
        if isinstance(value, Mapping) and value.keys() & {"bytes", "path"}:
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            images.append(value)
        elif isinstance(value, str) and value:
            images.append(ImageFile(value, root))
        elif value is not None and value != "":
            raise Rejected("schema", f"{column} holds {type(value).__name__}; wanted a path, bytes or {{bytes, path}}")
    return images


# --- JSON: lines and lists ------------------------------------------------------------------------------------------

_ROW = np.dtype(
    [("file", "i4"), ("number", "i4"), ("offset", "i8"), ("length", "i8"), ("num_images", "i4"), ("text_bytes", "i8")]
)
_Found = tuple[int, int, int, Any]  # number from 1, byte offset, byte length, the row or why it is rejected


@dataclass(frozen=True, eq=False)
class _JsonSource:
    """JSON files, each row found again by its bytes.

    `index` is _ROW[num_rows]; its `number` is the line of JSON lines, the element of a list, from 1.
    """

    name: str
    weight: float
    files: tuple[Path, ...]
    root: Path | None
    index: npt.NDArray[Any]

    @property
    def num_rows(self) -> int:
        return len(self.index)

    @property
    def num_images(self) -> npt.NDArray[np.int32]:
        return np.ascontiguousarray(self.index["num_images"])

    @property
    def text_bytes(self) -> npt.NDArray[np.int64]:
        return np.ascontiguousarray(self.index["text_bytes"])

    def uid(self, row: int) -> str:
        entry = self.index[row]
        file = self.files[entry["file"]]
        place = f"{os.path.relpath(file, _folder(self.files))}:" if len(self.files) > 1 else ""
        return f"{self.name}:{place}{entry['number']}"

    def read(self, row: int) -> Sample:
        entry = self.index[row]
        file = self.files[entry["file"]]
        with file.open("rb") as stream:
            stream.seek(entry["offset"])
            data = stream.read(entry["length"])
        root = file.parent if self.root is None else self.root
        return _sample(self.uid(row), _parsed(data, file, int(entry["number"])), root)


def _folder(files: Sequence[Path]) -> str:
    return os.path.commonpath([file.parent for file in files])


def _open_json(spec: SourceSpec, name: str, files: list[Path], formats: list[str]) -> Source:
    rows = (
        (number, *entry)
        for number, (file, format) in enumerate(zip(files, formats, strict=True))
        for entry in _measured(file, _list_rows(file) if format == "json" else _line_rows(file))
    )
    index = np.fromiter(itertools.islice(rows, spec.num_samples), dtype=_ROW)
    return _JsonSource(name, spec.weight, tuple(files), _root(spec), index)


def _root(spec: SourceSpec) -> Path | None:
    return None if spec.image_root is None else Path(os.path.abspath(os.path.expanduser(spec.image_root)))


def _measured(file: Path, rows: Iterator[_Found]) -> Iterator[tuple[int, int, int, int, int]]:
    """One index entry per row of a file, after the checks which concern the file as a whole."""
    _check_utf8(file)
    num_objects = 0
    first_reason: Rejected | None = None
    for number, offset, length, found in rows:
        num_images = text_bytes = 0
        try:
            row = _object(found, f"{file}:{number}")
            num_objects += 1
            if num_objects == 1:
                _check_columns(list(row), f"{file}:{number}")
            sample = _sample("", row, None)
        except Rejected as reason:  # counted when the row is read; here it only matters if no row is any good
            first_reason = first_reason or reason
        else:
            num_images = len(sample.images)
            parts = [part for message in sample.messages for part in message["content"]]
            text_bytes = sum(len(part["text"].encode()) for part in parts if part["type"] == "text")
        yield number, offset, length, num_images, text_bytes
    if not num_objects:
        raise SourceError(f"no row of the file can be read; the first: {first_reason and first_reason.detail}")


def _check_columns(columns: Sequence[str], place: str) -> None:
    try:
        _layout(columns)
    except Rejected as reason:
        raise SourceError(f"{place}: {reason.detail}") from reason


def _parsed(data: bytes, file: Path, number: int) -> dict[str, Any]:
    """One row of JSON.

    Raises:
        Rejected: json_line, json_depth.
    """
    place = f"{file}:{number}"
    try:
        row = json.loads(data.decode())
    except RecursionError as error:
        raise Rejected("json_depth", f"{place}: brackets are nested too deep; wanted {_WANTED}") from error
    except json.JSONDecodeError as error:
        raise Rejected("json_line", f"{place}:{error.colno}: {error.msg}; wanted one JSON object") from error
    except ValueError as error:  # a number of thousands of digits; bytes changed since the file was opened
        raise Rejected("json_line", f"{place}: {error}; wanted one JSON object") from error
    return _object(row, place)


def _object(row: Any, place: str) -> dict[str, Any]:
    if isinstance(row, Rejected):
        raise row
    if not isinstance(row, dict):
        raise Rejected("json_line", f"{place}: the row is {type(row).__name__}; wanted a JSON object")
    return row


def _line_rows(file: Path) -> Iterator[_Found]:
    """The rows of JSON lines, by physical line; blank lines are none."""
    offset = _text_start(file)
    empty = True
    with file.open("rb") as stream:
        stream.seek(offset)
        for number, line in enumerate(stream, 1):
            if line.strip():
                empty = False
                try:
                    row: Any = _parsed(line, file, number)
                except Rejected as error:
                    row = error
                yield number, offset, len(line), row
            offset += len(line)
    if empty:
        raise SourceError(f"{file}: the file is empty; wanted one JSON object per line")


def _list_rows(file: Path) -> Iterator[_Found]:
    """The elements of a JSON list, found by parsing one at a time; only a window of the file is held as text."""
    offset, number = _text_start(file), 0  # offset: in bytes, of text[start]
    text, start, at_end = "", 0, False
    with file.open(encoding="utf-8-sig", newline="") as stream:
        while True:
            end, problem = len(text), None
            try:
                begin, end, row = _next_element(text, start, number)
            except json.JSONDecodeError as error:
                problem = error
            if end == len(text) and not at_end:
                # What ends with the window may go on behind it: look again with more text, twice as much each time.
                text = text[start:]
                more = stream.read(max(_WINDOW, len(text)))
                text, start, at_end = text + more, 0, not more
                continue
            if problem:
                place = _line_and_column(file, offset + len(text[start : problem.pos].encode()))
                wanted = "wanted a JSON list of objects: [{...}, {...}]; is the file complete?"
                raise SourceError(f"{file}:{place}: {problem.msg}; {wanted}") from problem
            if begin == end:
                break
            number += 1
            offset += len(text[start:begin].encode())
            length = len(text[begin:end].encode())
            yield number, offset, length, row
            offset, start = offset + length, end
    if not number:
        raise SourceError(f"{file}: the list is empty; wanted at least one row")


_PUNCTUATION = re.compile(r"[ \t\r\n]*([\[\],])[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def _next_element(text: str, start: int, number: int) -> tuple[int, int, Any]:
    """Begin, end and value of the element behind the bracket or comma at `start`; at the list's end begin equals end.

    Raises:
        json.JSONDecodeError: not a list, or `text` ends within it.
    """
    mark = _PUNCTUATION.match(text, start)
    if mark is None or (mark[1] == "[") != (number == 0):
        raise json.JSONDecodeError("',' or ']' is missing" if number else "no list begins here", text, start)
    begin = mark.end()
    if number == 0 and text.startswith("]", begin):
        mark = _PUNCTUATION.match(text, begin)
    if mark and mark[1] == "]":
        if mark.end() < len(text):
            raise json.JSONDecodeError("something follows the end of the list", text, mark.end())
        return mark.end(), mark.end(), None
    if number and text.startswith("]", begin):
        raise json.JSONDecodeError("no element between ',' and ']'", text, begin)
    try:
        row, end = _DECODER.raw_decode(text, begin)
    except RecursionError as error:
        raise json.JSONDecodeError("brackets are nested too deep", text, begin) from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise json.JSONDecodeError(str(error), text, begin) from error
    return begin, end, row


def _text_start(file: Path) -> int:
    """The byte behind the byte order mark."""
    with _opened(file) as stream:
        return len(codecs.BOM_UTF8) if stream.read(3) == codecs.BOM_UTF8 else 0


def _line_and_column(file: Path, offset: int) -> str:
    with file.open("rb") as stream:
        before = stream.read(offset)
    *lines, line = before.decode("utf-8-sig").split("\n")
    return f"{len(lines) + 1}:{len(line) + 1}"


def _check_utf8(file: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with _opened(file) as stream:
        if (encoding := json.detect_encoding(stream.read(4))) not in ("utf-8", "utf-8-sig"):
            raise SourceError(f"{file}: not UTF-8 at byte offset 0: looks like {encoding}; save it as UTF-8")
        stream.seek(0)
        chunk = b"start"
        while chunk:
            chunk = stream.read(2**20)
            pending = len(decoder.getstate()[0])  # bytes of a character that began in the chunk before
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                at = offset - pending + error.start
                raise SourceError(f"{file}: not UTF-8 at byte offset {at}: {error.reason}; save it as UTF-8") from error
            offset += len(chunk)


# --- Parquet and the hub --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _ArrowSource:
    """A memory-mapped `datasets.Dataset`, which pickles as file names. `features` decode JSON columns but no image."""

    name: str
    weight: float
    dataset: Any
    features: Any
    root: Path | None
    num_images: npt.NDArray[np.int32]
    text_bytes: npt.NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        return len(self.dataset)

    def uid(self, row: int) -> str:
        return f"{self.name}:{row + 1}"

    def read(self, row: int) -> Sample:
        columns = self.features.decode_example(self.dataset[row].to_pylist()[0])
        return _sample(self.uid(row), columns, self.root)


def _open_parquet(spec: SourceSpec, name: str, files: list[Path], cache_dir: str | None) -> Source:
    for file in files:
        _check_parquet(file)
    dataset = _load(
        spec.path or name,
        "is one of the files damaged, or do their columns differ?",
        "parquet",
        data_files=[glob.escape(str(file)) for file in files],
        split="train",
        cache_dir=cache_dir,
    )
    return _arrow_source(spec, name, dataset, _root(spec) or Path(_folder(files)))


def _open_hub(spec: SourceSpec, name: str, cache_dir: str | None) -> Source:
    remedy = (
        "wanted a data set on the Hugging Face hub and one of its splits; without a network, copy its Parquet files "
        "here and set path to them"
    )
    dataset = _load(
        f"{spec.name}, split {spec.split!r}",
        remedy,
        spec.name,
        split=spec.split,
        revision=spec.revision,
        cache_dir=cache_dir,
    )
    return _arrow_source(spec, name, dataset, _root(spec))


def _check_parquet(file: Path) -> None:
    import pyarrow.parquet

    if file.stat().st_size == 0:
        raise SourceError(f"{file}: the file is empty (0 bytes); wanted Parquet")
    try:
        metadata = pyarrow.parquet.read_metadata(file)
    except (OSError, ValueError) as error:
        raise SourceError(f"{file}: cannot be read as Parquet: {error}; is the file complete?") from error
    # Ray's extension types were a way to run code from a file (CVE-2026-41486); refused before Arrow builds any type.
    if b"ray.data." in base64.b64decode((metadata.metadata or {}).get(b"ARROW:schema", b"")):
        raise SourceError(f"{file}: holds Ray tensor columns, which are not opened; wanted images as encoded bytes")
    _check_columns(metadata.schema.to_arrow_schema().names, str(file))


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


def _arrow_source(spec: SourceSpec, name: str, dataset: Any, root: Path | None) -> Source:
    import datasets

    _check_columns(dataset.column_names, spec.path or name)
    used = [column for column in (*_LAYOUTS, *_IMAGE_COLUMNS) if column in dataset.column_names]
    dataset = dataset.select_columns(used).with_format("arrow")
    if spec.num_samples is not None:
        dataset = dataset.select(range(min(spec.num_samples, len(dataset))))
    if not len(dataset):
        raise SourceError(f"{spec.path or name}: no rows; wanted at least one")
    features = datasets.Features({column: _undecoded(dataset.features[column]) for column in used})
    estimates = [_estimates(table) for table in dataset.iter(10_000)]
    num_images, text_bytes = (np.concatenate(column) for column in zip(*estimates, strict=True))
    return _ArrowSource(name, spec.weight, dataset, features, root, num_images.astype(np.int32), text_bytes)


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
        if column in _IMAGE_COLUMNS:
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
