"""How counts and tables are written."""

from vlskv_ray.words import plural, terminal_table


def test_plurals() -> None:
    assert [plural(count, "worker") for count in (0, 1, 2)] == ["0 workers", "1 worker", "2 workers"]
    assert [plural(count, "process") for count in (1, 2)] == ["1 process", "2 processes"]
    assert [plural(count, "point") for count in ("1", "1.5", "0.1")] == ["1 point", "1.5 points", "0.1 points"]


def test_columns_are_as_wide_as_what_they_hold() -> None:
    """Nothing follows the last text of a line; columns of numbers stand to the right."""
    rows = [["", "seconds", "answer"], ["teacher", "1.5", "yes"], ["student", "0.25", ""]]
    assert terminal_table(rows, to_the_right=[1]) == [
        "         seconds  answer",
        "teacher      1.5  yes",
        "student     0.25",
    ]
    assert terminal_table(rows)[1:] == ["teacher  1.5      yes", "student  0.25"]
