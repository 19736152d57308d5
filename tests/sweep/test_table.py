"""The table of a sweep's trials, on a terminal and elsewhere."""

import io
import json
from pathlib import Path
from typing import Any

from vlskv_ray.sweep.table import SweepTable
from vlskv_ray.sweep.trials import TRIAL_DONE, TRIAL_FAILED, Trial, write_outcome

N = "model.num_key_value_layers"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def metrics(folder: Path, **values: Any) -> None:
    folder.mkdir(exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "epoch": 0.25, "loss": 0.5, "step_seconds": 1.0} | values) + "\n")


TRIALS = [Trial("N2", {N: 2}), Trial("N4", {N: 4}), Trial("N6", {N: 6})]


def test_a_terminal_has_one_table_redrawn(tmp_path: Path) -> None:
    out = Terminal()
    table = SweepTable(TRIALS, tmp_path, epochs=1, shown=True, out=out)
    table.begin(TRIALS[0])
    metrics(tmp_path / "N2", eval_kl_mean=0.125, eval_accuracy=0.5)
    table.update()
    first = out.getvalue()
    assert "trial  status  step     loss  KL copied  KL fitted  KL     accuracy  time" in first
    assert (
        "N2     runs    5 (25%)  0.5                         0.125  50.0%     0:00" in first and "N4     waits" in first
    )
    write_outcome(tmp_path / "N2", TRIALS[0], TRIAL_FAILED, "no room")
    table.update()
    second = out.getvalue()[len(first) :]
    assert second.startswith("\x1b[5F") and "N2     failed" in second and "1 of 3 trials have ended" in second


def test_elsewhere_lines_tell_what_begins_and_ends(tmp_path: Path) -> None:
    """Once each, and nothing is drawn again."""
    out = io.StringIO()
    table = SweepTable(TRIALS, tmp_path, epochs=1, shown=True, out=out)
    (tmp_path / "N6").mkdir()
    write_outcome(tmp_path / "N6", TRIALS[2], TRIAL_DONE)
    table.begin(TRIALS[0])
    for _ in range(3):
        table.update()
    metrics(tmp_path / "N2", eval_kl_mean=0.125, eval_accuracy=0.5)
    table.written_at -= 60
    table.update()
    write_outcome(tmp_path / "N2", TRIALS[0], TRIAL_FAILED, "no room")
    for _ in range(3):
        table.update()
    assert out.getvalue().splitlines() == [
        "N2 starts",
        "N6 done before",
        "1 of 3 trials  N2 25%",
        "N2 failed in 0:00  KL 0.125  accuracy 50.0%: no room",
    ]


def test_a_trial_that_is_done_shows_how_it_began(tmp_path: Path) -> None:
    out, terminal = io.StringIO(), Terminal()
    for file in (out, terminal):
        table = SweepTable(TRIALS[:1], tmp_path, epochs=1, shown=True, out=file)
        table.begin(TRIALS[0])
        if not (tmp_path / "N2").exists():
            metrics(tmp_path / "N2")
            sides = {"student_before": {"kl_mean": 2.5}, "student_fitted": {"kl_mean": 0.5}}
            sides["student"] = {"kl_mean": 0.125, "accuracy": 0.5}
            (tmp_path / "N2" / "evaluation.json").write_text(json.dumps(sides))
            write_outcome(tmp_path / "N2", TRIALS[0], TRIAL_DONE)
        table.update()
    assert out.getvalue() == "N2 done in 0:00  KL copied 2.5  KL fitted 0.5  KL 0.125  accuracy 50.0%\n"
    assert "N2     done                2.5        0.5        0.125  50.0%" in terminal.getvalue()


def test_a_trial_whose_workers_lack_room_says_so(tmp_path: Path) -> None:
    """As long as that is so, in the table and, elsewhere, each time with the numbers."""
    out, terminal = io.StringIO(), Terminal()
    tables = [SweepTable(TRIALS, tmp_path, epochs=1, shown=True, out=file) for file in (out, terminal)]
    notes = tmp_path / "N2" / "ray" / "waiting"
    notes.parent.mkdir(parents=True)
    for table in tables:
        table.begin(TRIALS[0])
        table.update()
    notes.write_text("waiting       for a while\n")
    for table in [*tables, *tables]:
        table.update()
    assert out.getvalue().splitlines() == ["N2 starts", "N2 waits: for a while"]
    assert "N2     waits" in terminal.getvalue()
    metrics(tmp_path / "N2", eval_kl_mean=0.125, eval_accuracy=0.5)
    tables[1].update()
    assert "N2     runs" in terminal.getvalue()
