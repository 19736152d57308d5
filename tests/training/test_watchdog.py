"""A worker that gets on with nothing ends, and says where it was; a step that fails again and again is known."""

import subprocess
import sys
from pathlib import Path

import pytest
from waiting import HANG_SECONDS

from vlskv_ray.training import watchdog
from vlskv_ray.training.watchdog import Attempts

WORK = """
import sys, time
from pathlib import Path
from runpy import run_path

def a_part_that_hangs(): time.sleep(100_000)

seconds = float(sys.argv[3]) if sys.argv[3] != "None" else None
watchdog = run_path(sys.argv[1])["Watchdog"](Path(sys.argv[2]), 3, seconds)
watchdog.begin()
for part in eval(sys.argv[4]):
    time.sleep(part)
    watchdog.done()
if sys.argv[5] == "hang":
    a_part_that_hangs()
watchdog.rest()
"""


def work(folder: Path, seconds: float | None, parts: list[float], end: str = "") -> int:
    """The exit status of a process that does these parts; it imports no more of the package than the one module."""
    command = [sys.executable, "-c", WORK, watchdog.__file__, str(folder), str(seconds), str(parts), end]
    return subprocess.run(command, timeout=HANG_SECONDS, check=False).returncode


def test_one_that_hangs_ends_with_its_stacks(tmp_path: Path) -> None:
    assert work(tmp_path / "stacks", 0.5, [0.01, 0.01], "hang") == 1
    (path,) = (tmp_path / "stacks").iterdir()
    assert path.name.endswith("-rank-3.txt") and "a_part_that_hangs" in path.read_text()


def test_one_that_is_slow_goes_on(tmp_path: Path) -> None:
    """The first part may take ten times as long, and each ten times as long as the slowest so far."""
    assert work(tmp_path / "stacks", 0.5, [1.0, 3.0]) == 0
    assert not (tmp_path / "stacks").exists()
    assert work(tmp_path / "stacks", 0.5, [0.0], "hang") == 1


def test_without_a_limit_nothing_ends(tmp_path: Path) -> None:
    assert work(tmp_path / "stacks", None, [1.0]) == 0
    assert not (tmp_path / "stacks").exists()


def die(path: Path, *steps: int, after: bool = False) -> int | None:
    """A process that computes these steps and dies in the last, or after it; what it was told of poison at first."""
    attempts = Attempts(path)
    poisoned = attempts.poisoned(20)
    for step in steps:
        attempts.begin(step)
        if after or step != steps[-1]:
            attempts.done(step)
    return poisoned


def test_a_step_in_which_three_died_is_poison(tmp_path: Path) -> None:
    """Also where each of them went on from a checkpoint some steps before it."""
    path = tmp_path / "attempt.json"
    assert [die(path, 4, 5, 6), die(path, 4, 5, 6), die(path, 4, 5, 6), die(path)] == [None, None, None, 6]
    Attempts(path).end()
    assert die(path, 6) is None


def test_a_step_that_was_done_after_all_is_none(tmp_path: Path) -> None:
    path = tmp_path / "attempt.json"
    assert [die(path, 6), die(path, 6), die(path, 6, 7), die(path, 6, 7), die(path, 8)] == [None] * 5
    assert die(path) is None


def test_an_end_between_steps_is_none_of_theirs(tmp_path: Path) -> None:
    """While samples are waited for, answers are measured or a checkpoint is written, however often."""
    path = tmp_path / "attempt.json"
    assert [die(path, 6, after=True) for _ in range(5)] == [None] * 5
    assert [die(path, 6), die(path, 6), die(path, 6, after=True), die(path, 6), die(path, 6)] == [None] * 5
    assert [die(path, 6), die(path, 6)] == [None, 6]


@pytest.mark.parametrize(
    "junk",
    [
        *("", "{", "[]", "[" * 100_000, '{"step": null, "died": {}}', '{"died": 3}', '{"step": 1e999, "died": {}}'),
        *('{"step": 1, "died": {"x": 5}}', '{"step": 99, "died": {"-1": 9, "99": 9}}'),
    ],
)
def test_junk_is_no_attempt(tmp_path: Path, junk: str) -> None:
    (tmp_path / "attempt.json").write_text(junk)
    assert Attempts(tmp_path / "attempt.json").poisoned(20) is None
