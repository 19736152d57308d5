"""A run folder has one owner, on whatever machine; workers of an owner that is gone know it."""

import json
import threading
import time
from pathlib import Path

import pytest
from waiting import wait_until

from vlskv_ray.storage import run_lock
from vlskv_ray.storage.run_lock import is_owner, own_run_folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.1)


def test_the_second_one_is_told_who_has_it(tmp_path: Path) -> None:
    told = r"another process runs this run \(process \d+ on .*\); wait"
    with own_run_folder(tmp_path), pytest.raises(ValueError, match=told), own_run_folder(tmp_path):
        pass
    with own_run_folder(tmp_path):  # it is free again
        pass


def test_workers_know_whether_their_owner_still_has_it(tmp_path: Path) -> None:
    with own_run_folder(tmp_path) as first:
        assert is_owner(tmp_path, first)
    with own_run_folder(tmp_path) as second:
        assert is_owner(tmp_path, second) and not is_owner(tmp_path, first)
        wait_until(lambda: json.loads((tmp_path / ".lock").read_text())["beats"] >= 2)
        assert is_owner(tmp_path, second)  # beats go on being the second one's


def elsewhere(folder: Path, beats: int) -> None:
    """What an owner on another machine writes, whose lock this one does not see."""
    about = {"owner": "x", "pid": 7, "host": "elsewhere", "beats": beats}
    (folder / ".lock").write_text(json.dumps(about))


def test_an_owner_on_another_machine_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 5.0)  # listened for 15 s at most, and a second where all goes well
    elsewhere(tmp_path, 0)
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(0.05):
            elsewhere(tmp_path, count := count + 1)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ValueError, match="process 7 on elsewhere"), own_run_folder(tmp_path):
            pass
    finally:
        ended.set()
        thread.join()


def test_an_owner_on_another_machine_that_is_dead_or_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listened: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (listened.append(seconds), sleep(seconds)))
    elsewhere(tmp_path, 41)
    with own_run_folder(tmp_path) as owner:
        assert listened
        assert is_owner(tmp_path, owner)
        (tmp_path / "config.yaml").touch()
    elsewhere(tmp_path, run_lock.LEFT)
    listened.clear()
    with own_run_folder(tmp_path):
        assert not listened


def test_a_folder_of_which_nothing_came_is_gone(tmp_path: Path) -> None:
    with own_run_folder(tmp_path / "a"):
        assert (tmp_path / "a").exists()
    assert not (tmp_path / "a").exists()
    with own_run_folder(tmp_path / "b"):
        (tmp_path / "b" / "config.yaml").touch()
    assert (tmp_path / "b").exists()


@pytest.mark.parametrize("junk", ["", "{", "[1]", "\0" * 240])
def test_junk_in_the_lock_is_nobody(tmp_path: Path, junk: str) -> None:
    (tmp_path / ".lock").write_text(junk)
    with own_run_folder(tmp_path) as owner:
        assert is_owner(tmp_path, owner)
