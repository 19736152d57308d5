"""What is added to a journal is there, whatever is killed when; it is not gone on with under other settings."""

import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from vlskv_ray.storage.journal import Journal

SETTINGS: dict[str, Any] = {"seed": 3, "model": "a" * 64, "data": [["rows.jsonl", 7]]}
LINES = [{"window": 0, "text": "é\n"}, {"window": 1, "text": ""}]


def opened(path: Path, anew: bool = False, **settings: Any) -> Journal:
    return Journal(path, SETTINGS | settings, "--output", anew)


def test_cut_at_any_byte_it_goes_on_with_the_lines_that_are_whole(tmp_path: Path) -> None:
    """And ends as one that was never cut."""
    journal = opened(tmp_path / "journal")
    for line in LINES:
        journal.append(line)
    whole = (tmp_path / "journal").read_bytes()
    for cut in range(len(whole) + 1):
        path = tmp_path / "cut"
        path.write_bytes(whole[:cut])
        journal = opened(path)
        kept = max(whole[:cut].count(b"\n") - 1, 0)
        assert journal.lines == LINES[:kept]
        for line in LINES[kept:]:
            journal.append(line)
        assert path.read_bytes() == whole
    journal.remove()
    assert not path.exists()


def test_a_full_disk_names_the_journal(tmp_path: Path) -> None:
    """And loses nothing of it: what was begun of a line is taken away when it is gone on with."""
    journal = opened(tmp_path / "journal")
    journal.append(LINES[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then it is an error, as a full disk is
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "journal").stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written: File too large; what it holds is kept, .*/journal'"):
            journal.append(LINES[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert opened(tmp_path / "journal").lines == LINES[:1]


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    """Unless nothing would be lost, or all is to be made anew."""
    opened(tmp_path / "journal", seed=4)
    journal = opened(tmp_path / "journal")
    journal.append(LINES[0])
    with pytest.raises(ValueError) as told:
        opened(tmp_path / "journal", seed=4, model="b" * 64)
    assert str(told.value) == (
        f"--output: {tmp_path}/journal holds what was made with other settings (seed: 3, now 4, another model); give "
        f"the same ones to go on, or --anew to begin anew, without the 1 line in it"
    )
    assert opened(tmp_path / "journal").lines == LINES[:1]
    assert opened(tmp_path / "journal", anew=True, seed=4).lines == []
    assert opened(tmp_path / "journal").lines == []


@pytest.mark.parametrize("damaged", [b"{\n", b"[1]\n", b"\0\0\0\n"])
def test_a_line_that_is_damaged_is_named(tmp_path: Path, damaged: bytes) -> None:
    """It was written whole once, so this is no kill."""
    journal = opened(tmp_path / "journal")
    journal.append(LINES[0])
    with open(tmp_path / "journal", "ab") as file:
        file.write(damaged)
    with pytest.raises(ValueError, match=r"--output: .*/journal:3: the line is damaged .*; delete it and all lines"):
        opened(tmp_path / "journal")
