"""JSON lines and JSON lists as tables of rows, each row found again by its place in the file."""

import codecs
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlskv_ray.data.layouts import Layout, has_known_column, known_layouts, layout_of_file
from vlskv_ray.data.rows import sample_of, unread_message, unread_pictures
from vlskv_ray.data.sample import Rejected, Sample, SourceError
from vlskv_ray.files import DuplicateKey, reject_duplicate_keys

_WINDOW = 2**24  # characters of a JSON list held at once
_INDENTED_HEAD, _LARGEST_OBJECT = 2**10, 2**28  # bytes of a file looked at to tell what is wrong with it

_ROW = np.dtype(
    [("file", "i4"), ("number", "i4"), ("offset", "i8"), ("length", "i8"), ("num_images", "i4"), ("text_bytes", "i8")]
)
_Found = tuple[int, int, int, Any]  # number from 1, byte offset, byte length, the row or why it is rejected


@dataclass(frozen=True, eq=False)
class JsonSource:
    """JSON files, each row found again by its bytes.

    `index` is _ROW[num_rows]; its `number` is the line of JSON lines, the element of a list, from 1.
    """

    name: str
    weight: float
    files: tuple[Path, ...]
    root: Path | None
    index: npt.NDArray[Any]
    fingerprint: str
    layout: Layout | None
    """None where no row that was looked at is an object, so that none can be used."""
    ignored: tuple[str, ...] = ()

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
        place = f"{os.path.relpath(file, folder_of(self.files))}:" if len(self.files) > 1 else ""
        return f"{self.name}:{place}{entry['number']}"

    @property
    def roots(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(self.root or file.parent for file in self.files))

    def read(self, row: int, *, prompt: bool = False) -> Sample:
        root = self.root or self.files[self.index[row]["file"]].parent
        return sample_of(self.uid(row), self.columns(row), root, self.ignored, self.layout, prompt=prompt)

    def columns(self, row: int) -> dict[str, Any]:
        entry = self.index[row]
        file = self.files[entry["file"]]
        with file.open("rb") as stream:
            stream.seek(entry["offset"])
            data = stream.read(entry["length"])
        return _parse_row(data, file, int(entry["number"]))


@dataclass
class _Scan:
    """What is learnt of a source while its rows are looked at, one after the other."""

    ignored: Sequence[str]
    layout: Layout | None = None
    unread: dict[str, str] = field(default_factory=dict)
    """Columns that look like pictures and are not read, and the first place of each."""


def open_json(
    name: str,
    weight: float,
    files: Sequence[Path],
    formats: Sequence[str],
    root: Path | None,
    num_samples: int | None,
    ignored: Sequence[str] = (),
) -> JsonSource:
    """Scans JSON files of the given formats ("jsonl" or "json" each) into one table.

    Raises:
        SourceError: a file as a whole cannot be used, or has columns that look like pictures, are not read and not
            among those `ignored`.
    """
    scan = _Scan(ignored)
    rows = (
        (number, *entry)
        for number, (file, format) in enumerate(zip(files, formats, strict=True))
        for entry in _measure(file, _list_rows(file) if format == "json" else _line_rows(file), scan)
    )
    index = np.fromiter(itertools.islice(rows, num_samples), dtype=_ROW)
    if scan.layout and scan.unread:
        first = next(iter(scan.unread.values()))
        columns = [repr(column) if place == first else f"{column!r} ({place})" for column, place in scan.unread.items()]
        raise SourceError(f"{first}: {unread_message(columns, scan.layout)}")
    digest = hashlib.sha256()
    for file in files:
        with open_binary(file) as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return JsonSource(name, weight, tuple(files), root, index, digest.hexdigest(), scan.layout, tuple(ignored))


def folder_of(files: Sequence[Path]) -> str:
    """The folder that holds all of them."""
    return os.path.commonpath([file.parent for file in files])


def _measure(file: Path, rows: Iterator[_Found], scan: _Scan) -> Iterator[tuple[int, int, int, int, int]]:
    """One index entry per row of a file, after the checks which concern the file as a whole."""
    _check_utf8(file)
    layout: Layout | None = None
    first_reason: Rejected | None = None
    for number, offset, length, row in rows:
        num_images = text_bytes = 0
        try:
            if not isinstance(row, dict):
                raise _no_object(row, file, number)
            if layout is None:
                if _lists_in(row) and not has_known_column(row) and next(rows, None) is None:
                    raise SourceError(f"{file}:{number}: {_holder_message(row)}")
                layout = scan.layout = layout_of_file(row, f"{file}:{number}", scan.ignored, scan.layout)
            sample = sample_of("", row, None, scan.ignored, layout)
        except Rejected as reason:  # counted when the row is read; here it only matters if no row is any good
            first_reason = first_reason or reason
            if layout and reason.code == "image_unread":
                for column in unread_pictures(row, layout, scan.ignored):
                    scan.unread.setdefault(column, f"{file}:{number}")
        else:
            num_images = len(sample.images)
            texts = [part["text"] for message in sample.messages for part in message["content"] if len(part) > 1]
            text_bytes = sum([len(text) if text.isascii() else len(text.encode()) for text in texts])
        yield number, offset, length, num_images, text_bytes
    if layout is None:
        raise SourceError(f"no row of the file can be read; the first: {first_reason and first_reason.detail}")


def _lists_in(holder: dict[str, Any]) -> list[str]:
    """The keys under which an object has lists of objects."""
    return [key for key, value in holder.items() if isinstance(value, list) and value and isinstance(value[0], dict)]


def _holder_message(holder: dict[str, Any]) -> str:
    """What an object that holds the rows, instead of being one, has, and what to do."""
    keys = [
        f"{key!r} (list of {len(value)})" if isinstance(value, list) else repr(key) for key, value in holder.items()
    ]
    shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    lists = [repr(key) for key in _lists_in(holder)]
    remedy = f"save the list under {' or '.join(lists)}" if lists else "save its rows as a list"
    return f"holds one object with the keys {shown or '(none)'}; wanted a list of rows: {remedy} as a file of its own"


def _parse_row(data: bytes, file: Path, number: int) -> dict[str, Any]:
    """One row of JSON.

    Raises:
        Rejected: json_line, json_depth, json_duplicate_key.
    """
    try:
        row = _DECODER.decode(data.decode().removeprefix("\ufeff"))  # where files were put behind one another
    except RecursionError as error:
        wanted = known_layouts()
        raise Rejected("json_depth", f"{file}:{number}: brackets are nested too deep; wanted {wanted}") from error
    except json.JSONDecodeError as error:
        raise Rejected("json_line", f"{file}:{number}:{error.colno}: {error.msg}; wanted one JSON object") from error
    except DuplicateKey as error:
        raise Rejected("json_duplicate_key", f"{file}:{number}: {error}; keep one of them") from error
    except ValueError as error:  # a number of thousands of digits; bytes changed since the file was opened
        raise Rejected("json_line", f"{file}:{number}: {error}; wanted one JSON object") from error
    if not isinstance(row, dict):
        raise _no_object(row, file, number)
    return row


def _no_object(row: Any, file: Path, number: int) -> Rejected:
    if isinstance(row, Rejected):
        return row
    return Rejected("json_line", f"{file}:{number}: the row is {type(row).__name__}; wanted a JSON object")


_DECODER = json.JSONDecoder(object_pairs_hook=reject_duplicate_keys)
_LENIENT = json.JSONDecoder()


def _line_rows(file: Path) -> Iterator[_Found]:
    """The rows of JSON lines, by physical line; blank lines are none."""
    _check_one_a_line(file)
    offset = _text_start(file)
    empty = True
    with file.open("rb") as stream:
        stream.seek(offset)
        for number, line in enumerate(stream, 1):
            if line.strip():
                empty = False
                yield number, offset, len(line), _row_or_reason(line, file, number)
            offset += len(line)
    if empty:
        raise SourceError(f"{file}: the file is empty; wanted one JSON object per line")


def _row_or_reason(line: bytes, file: Path, number: int) -> dict[str, Any] | Rejected:
    """The row of a line, or why it is rejected."""
    try:
        return _parse_row(line, file, number)
    except Rejected as reason:
        return reason


def _check_one_a_line(file: Path) -> None:
    """SourceError where the file holds JSON objects, but over several lines each."""
    with open_binary(file) as stream:
        head = stream.read(_INDENTED_HEAD)
        if not re.match(rb"(\xef\xbb\xbf)?\s*{[ \t]*\r?\n", head):
            return
        content = head + stream.read(_LARGEST_OBJECT)
    try:
        text = content.decode("utf-8-sig")
        held, end = _LENIENT.raw_decode(text, len(text) - len(text.lstrip()))
    except (ValueError, RecursionError):  # told when its lines are read
        return
    if not text[end:].strip() and not has_known_column(held):
        raise SourceError(f"{file}: {_holder_message(held)}")
    raise SourceError(
        f"no row of the file can be read; the first: {file}:1 begins an object over several lines; wanted each object "
        f"on one line: jq -c . {file} > rows.jsonl"
    )


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


def _next_element(text: str, start: int, number: int) -> tuple[int, int, Any]:
    """Begin, end and value of the element behind the bracket or comma at `start`; at the list's end begin equals end.
    The value is why the element is rejected where a key of it is given twice.

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
        try:
            row, end = _DECODER.raw_decode(text, begin)
        except DuplicateKey as error:
            row = Rejected("json_duplicate_key", f"{error}; keep one of them")
            _, end = _LENIENT.raw_decode(text, begin)
    except RecursionError as error:
        raise json.JSONDecodeError("brackets are nested too deep", text, begin) from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise json.JSONDecodeError(str(error), text, begin) from error
    return begin, end, row


def _text_start(file: Path) -> int:
    """The byte behind the byte order mark."""
    with open_binary(file) as stream:
        return len(codecs.BOM_UTF8) if stream.read(3) == codecs.BOM_UTF8 else 0


def _line_and_column(file: Path, offset: int) -> str:
    with file.open("rb") as stream:
        before = stream.read(offset)
    *lines, line = before.decode("utf-8-sig").split("\n")
    return f"{len(lines) + 1}:{len(line) + 1}"


def _check_utf8(file: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open_binary(file) as stream:
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


def open_binary(file: Path) -> io.BufferedReader:
    """SourceError if it cannot be opened."""
    try:
        return file.open("rb")
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror}") from error
