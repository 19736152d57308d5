"""How counts and tables are written."""

from vlskv_ray.words import plural, shorten, terminal_table


def test_plurals() -> None:
    assert [plural(count, "worker") for count in (0, 1, 2)] == ["0 workers", "1 worker", "2 workers"]
    assert [plural(count, "process") for count in (1, 2)] == ["1 process", "2 processes"]
    assert [plural(count, "point") for count in ("1", "1.5", "0.1")] == ["1 point", "1.5 points", "0.1 points"]


def test_long_texts_are_cut_and_say_so() -> None:
    assert shorten("a" * 50, 50) == "a" * 50 and shorten("", 50) == ""
    assert shorten("a" * 20 + " " + "b" * 1000, 44) == "a" * 20 + "… (of 1,021 characters)"
    assert len(shorten("a" * 1000, 50)) == 50


def test_columns_are_as_wide_as_what_they_hold() -> None:
    """Nothing follows the last text of a line; columns of numbers stand to the right."""
    rows = [["", "seconds", "answer"], ["teacher", "1.5", "yes"], ["student", "0.25", ""]]
    assert terminal_table(rows, to_the_right=[1]) == [
        "         seconds  answer",
        "teacher      1.5  yes",
        "student     0.25",
    ]
    assert terminal_table(rows)[1:] == ["teacher  1.5      yes", "student  0.25"]
