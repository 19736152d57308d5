"""What is told of answers on the way, and how rows become lines."""

import json

import pytest

from vlskv_ray.evaluation.answers import Answer, Part
from vlskv_ray.launch import answer_prompts
from vlskv_ray.launch.answer_prompts import Tally, line_of


def part(window: int, batch: int, num_batches: int, first: int, finish_reason: str = "stop", **more: int) -> Part:
    """Two answers of ten tokens each."""
    answers = [Answer(first + i, "yes", finish_reason, 10) for i in range(2)]
    return Part(window, batch, num_batches, answers, [], **more)


def test_progress_is_of_this_command_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates and the time that is left leave out what was there before; rows that stay as they are count as done."""
    now = 100.0
    monkeypatch.setattr(answer_prompts.time, "monotonic", lambda: now)
    tally = Tally(20)
    tally.add(part(0, 1, 2, first=0))
    tally.begin()
    assert tally.progress() == "answered 2 of 20 rows  0 tokens/s"
    now = 105.0
    tally.add(part(0, 0, 2, first=2, num_kept=1))
    assert tally.progress() == "answered 5 of 20 rows  4 tokens/s  0:25 left"
    assert (tally.complete, tally.done, tally.num_parts) == ({0}, {0: {0, 1}}, 2)
    now = 110.0
    tally.add(part(1, 0, 3, first=5, finish_reason="length"))
    tally.left_out[7] = {"row": 7, "id": "x", "reason": "too_long", "detail": "..."}
    assert tally.progress() == "answered 8 of 20 rows  2 cut  4 tokens/s  0:20 left"
    assert tally.complete == {0}


def test_letters_are_written_as_they_are() -> None:
    """But for what no text can hold, such as half a surrogate pair in a column that nothing reads."""
    assert line_of({"topic": "ü\u2028ない"}) == '{"topic": "ü\u2028ない"}\n'
    assert line_of({"topic": "ü\ud800"}) == '{"topic": "\\u00fc\\ud800"}\n'
    assert json.loads(line_of({"topic": "\ud800"})) == {"topic": "\ud800"}
