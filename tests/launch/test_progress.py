"""The progress line."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from vlskv_ray.files import Follower
from vlskv_ray.launch.progress import ProgressLine
from vlskv_ray.storage.run_log import truncate_logs
from vlskv_ray.words import format_duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, **metrics: Any) -> str:
    always = {"step": number, "loss": 0.5, "top1_agreement": 0.9, "tokens_per_second": 1234.5, "step_seconds": 2.0}
    return json.dumps(always | metrics) + "\n"


def test_a_terminal_gets_one_line_redrawn(tmp_path: Path) -> None:
    path, out = tmp_path / "metrics.jsonl", Terminal()
    progress = ProgressLine(path, 10, out=out)
    progress.update()
    assert out.getvalue() == "\r\x1b[Kstarting 0:00"
    path.write_text(step(1, kl_vision=0.25))
    progress.update()
    path.write_text(step(1, kl_vision=0.25) + step(2, kl_text=0.125) + step(3)[:20])
    progress.update()
    progress.close()
    _, first, second = out.getvalue().removeprefix("\r\x1b[K").split("\r\x1b[K")
    assert first == "step 1/10  loss 0.5  image 0.25  agree 90%  1,234 tok/s"
    assert second.startswith("step 2/10  loss 0.5  image 0.25  text 0.125  agree 90%  1,234 tok/s  ")
    assert second.endswith("  0:16 left\n")  # by the seconds that steps take, whatever else there was between them


def test_a_log_gets_plain_lines_and_always_the_last(tmp_path: Path) -> None:
    path, out = tmp_path / "metrics.jsonl", io.StringIO()
    progress = ProgressLine(path, 3, out=out)
    for count in (1, 2, 3):
        path.write_text("".join(step(i) for i in range(1, count + 1)))
        progress.update()
    progress.close()
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == ["step 1/3", "step 3/3"]
    assert "\r" not in out.getvalue()


def test_what_is_waited_for_is_told_in_whole_lines(tmp_path: Path) -> None:
    """Also on a terminal, and there is nothing to save until the next step."""
    path, out, notes = tmp_path / "metrics.jsonl", Terminal(), tmp_path / "ray" / "waiting"
    progress = ProgressLine(path, 10, out=out, notes=notes)
    path.write_text(step(1))
    progress.update()
    assert not progress.waits
    notes.parent.mkdir()
    notes.write_text(f"waiting {'x' * 200}\n")
    for _ in range(2):
        progress.update()
        assert progress.waits
    assert f"waiting {'x' * 200}\n" in out.getvalue()
    path.write_text(step(1) + step(2))
    progress.update()
    assert not progress.waits


def test_steps_taken_back_by_a_restart_are_shown_again(tmp_path: Path) -> None:
    path, out = tmp_path / "metrics.jsonl", Terminal()
    progress = ProgressLine(path, 10, out=out)
    path.write_text(step(1) + step(2) + step(3))
    progress.update()
    path.write_text(step(1))
    progress.update()
    assert "step 3/10" in out.getvalue() and "step 1/10" in out.getvalue().rpartition("\r")[2]
    assert "a worker was lost; all were started again from the newest checkpoint\n" in out.getvalue()


def test_a_log_that_is_begun_anew_between_two_looks_is_read_from_its_start(tmp_path: Path) -> None:
    """Though it is as long as before by then, or longer; one that only lost nothing is gone on with."""
    for name in ("metrics", "rejected"):
        (tmp_path / f"{name}.jsonl").write_text(step(1) + step(2))
    followers = [Follower(tmp_path / f"{name}.jsonl") for name in ("metrics", "rejected")]
    truncate_logs(tmp_path, 2)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(step(3))
    assert [json.loads(line)["step"] for line in followers[0].new_lines()] == [3]
    truncate_logs(tmp_path, 0)
    assert (tmp_path / "rejected.jsonl").read_text() == ""
    for number in range(1, 7):
        for name in ("metrics", "rejected"):
            with open(tmp_path / f"{name}.jsonl", "a") as file:
                file.write(step(number))
    for follower in followers:
        assert [json.loads(line)["step"] for line in follower.new_lines()] == [1, 2, 3, 4, 5, 6]
        assert follower.taken_back and not follower.new_lines() and not follower.taken_back


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
