"""What a finished run has, in one list, and what of it is missing or damaged, so that it is made again.

    final/             the model, every file of which summary.json has a seal
    evaluation.json    what was measured of it
    summary.json       how the run went; written when all of the above is there
    report.html        made of the above
    final/README.md    the model card, made of the above

The first three come of the end of the run, which is gone through once more from the last checkpoint; the pages are
functions of the files before them.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from vlskv_ray.report.model_card import card, write_model_card
from vlskv_ray.report.run_files import as_written, read_run
from vlskv_ray.report.run_page import write_report
from vlskv_ray.report.summary import closing_lines
from vlskv_ray.training.faults import fault_point

CARD = "final/README.md"
PAGES = {"report.html": write_report, CARD: write_model_card}
"""What is made of a run's other files, and how, in this order."""
SEALED_ENDS = 2**20
"""Bytes of either end of a file that its seal is made of: large weights are not read through each time."""


def is_finished(folder: Path) -> bool:
    """Whether a run has all that a finished one has, whole as far as that is quickly seen."""
    return unfinished(folder) is None and not unmade(folder)


def unfinished(folder: Path, steps: int | None = None) -> str | None:
    """Why the end of a run is to be gone through once more; None where model, measurement and summary are whole.

    Args:
        folder: of the run.
        steps: after which the run ends; a summary of another number is of an earlier end. None: of any.
    """
    for name in ("evaluation.json", "summary.json"):
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        run = read_run(folder)
        with as_written(folder):
            closing_lines(run), card(run)
            done, sealed = run.summary["steps"], dict(run.summary["final"])
    except ValueError as error:
        return str(error)
    if steps is not None and done != steps:
        return f"summary.json is of {done} steps"
    wrong = [name for name, seal in sealed.items() if seal_of(folder / name) != seal]
    return f"{', '.join(wrong)}: missing, or not what the run wrote" if wrong or not sealed else None


def unmade(folder: Path) -> list[str]:
    """Which of `PAGES` a run lacks that has all else: missing ones and those cut short. One that somebody edited is
    left as it is."""
    whole = card(read_run(folder)).encode("utf-8", "replace").decode()
    report, found = _text(folder / "report.html"), _text(folder / CARD)
    lacks = {"report.html": not report.endswith("</html>\n"), CARD: found != whole and whole.startswith(found)}
    return [name for name in PAGES if lacks[name]]


def is_untouched(folder: Path) -> bool:
    """Whether all that lies in `final/` is what the run wrote: then nothing is lost with it."""
    try:
        run = read_run(folder)
        with as_written(folder):
            sealed, whole = dict(run.summary["final"]), card(run)
    except ValueError:
        return False
    found = seals(folder)
    return found.items() <= sealed.items() and _text(folder / CARD) in ("", whole)


def write_pages(folder: Path, names: Sequence[str] = tuple(PAGES)) -> list[Path]:
    """Writes these of `PAGES` anew. Those of before go first: a kill leaves none that is not of the files beside it."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    written = []
    for name in names:
        written.append(PAGES[name](folder))
        fault_point(written[-1].name, 0)
    return written


def seals(folder: Path) -> dict[str, str]:
    """The seal of every file of a run's model, by its path in the run folder."""
    paths = sorted(path for path in (folder / "final").rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): seal_of(path) for path in paths}
    found.pop(CARD, None)
    return found


def seal_of(path: Path) -> str:
    """Size and sha256 of both ends of a file; "" of what is none."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(file.read(SEALED_ENDS))
        file.seek(max(SEALED_ENDS, size - SEALED_ENDS))
        digest.update(file.read())
    return f"{size}-{digest.hexdigest()}"


def _text(path: Path) -> str:
    """What a text file holds; "" where there is none."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError):
        return ""
