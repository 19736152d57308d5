"""Files that people do have and that hold rows in no form that is read: called by their names, with what to do."""

from pathlib import Path

from vlskv_ray.data.json_files import open_binary
from vlskv_ray.data.sample import SourceError

_AS_ROWS = "write its rows as JSON lines or Parquet"
_PICTURE = "this is a picture; wanted the file of rows that names it"

# What a file begins with, at which byte, its name, and the remedy.
_MAGIC = (
    (0, b"\x1f\x8b", "gzip", "unpack it: gunzip -k {file}"),
    (0, b"\x28\xb5\x2f\xfd", "zstd", "unpack it: zstd -d {file}"),
    (0, b"BZh", "bzip2", "unpack it: bunzip2 -k {file}"),
    (0, b"\xfd7zXZ\0", "xz", "unpack it: unxz -k {file}"),
    (0, b"\x04\x22\x4d\x18", "LZ4", "unpack it: lz4 -d {file}"),
    (0, b"PK\3\4", "a zip archive", "unpack it: unzip {file}"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it: 7z x {file}"),
    (0, b"Rar!", "a RAR archive", "unpack it: unrar x {file}"),
    (257, b"ustar", "a tar archive", "unpack it: tar -xf {file}; of a WebDataset, list the samples as JSON lines"),
    (0, b"ARROW1", "an Arrow file", "write it as Parquet: pyarrow.parquet.write_table(pyarrow.ipc.open_file(...))"),
    (0, b"FEA1", "a Feather file", "write it as Parquet: pandas.read_feather(...).to_parquet(...)"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", "write it as Parquet: datasets.Dataset.from_file(...).to_parquet(...)"),
    (0, b"PARE", "encrypted Parquet", "write it without encryption"),
    (0, b"ORC", "ORC", _AS_ROWS),
    (0, b"Obj\1", "Avro", _AS_ROWS),
    (0, b"SQLite format 3\0", "an SQLite database", _AS_ROWS),
    (0, b"\x89HDF\r\n", "HDF5", _AS_ROWS),
    (0, b"\x93NUMPY", "a NumPy array", _AS_ROWS),
    (0, b"\xd0\xcf\x11\xe0", "an Office document", _AS_ROWS),
    (0, b"%PDF", "a PDF document", _AS_ROWS),
    (0, b"<!DOCTYPE", "a web page", "was the download an error page?"),
    (0, b"<html", "a web page", "was the download an error page?"),
    (0, b"<?xml", "XML", _AS_ROWS),
    (0, b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself: git lfs pull"),
    (0, b"\x89PNG", "PNG", _PICTURE),
    (0, b"\xff\xd8\xff", "JPEG", _PICTURE),
    (0, b"GIF8", "GIF", _PICTURE),
)
_PICKLES = tuple(bytes((0x80, protocol)) for protocol in (2, 3, 4, 5))  # each ends in a full stop

_SUFFIXES = {
    ".csv": ("CSV", _AS_ROWS),
    ".tsv": ("TSV", _AS_ROWS),
    ".yaml": ("YAML", _AS_ROWS),
    ".yml": ("YAML", _AS_ROWS),
    ".xml": ("XML", _AS_ROWS),
    ".tar": ("a tar archive", "unpack it: tar -xf {file}"),
    ".tfrecord": ("TFRecord", _AS_ROWS),
    ".safetensors": ("safetensors", "wanted rows of text and images"),
    ".pkl": ("a pickle", "it can run code and is never opened; " + _AS_ROWS + " where it was made"),
    ".pt": ("a torch file", "it can run code and is never opened; " + _AS_ROWS + " where it was made"),
}
"""Formats that nothing at their beginning tells, unless they hold JSON or Parquet after all."""


def refuse_other_formats(file: Path) -> None:
    """SourceError for a file that holds rows in no form that is read, if it is a known one."""
    with open_binary(file) as stream:
        head = stream.read(512)
    found = next(((name, remedy) for at, magic, name, remedy in _MAGIC if head.startswith(magic, at)), None)
    if found and found[0] != "a tar archive" and file.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        found = ("a packed tar archive", "unpack it: tar -xf {file}")
    if head.startswith(_PICKLES):
        found = _SUFFIXES[".pkl"]
    if found is None and head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"{", b"[") and not head.startswith(b"PAR1"):
        found = _SUFFIXES.get(file.suffix.lower())
    if found:
        name, remedy = found
        raise SourceError(f"{file}: is {name}; wanted JSON lines, a JSON list or Parquet; {remedy.format(file=file)}")
