"""Prompts answered by a teacher: what is answered is kept at once, and written as rows at the end."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from vlskv_ray.command import name_option
from vlskv_ray.config import SourceConfig
from vlskv_ray.data.check import check_processor
from vlskv_ray.data.plan import Table, first_of_mixture
from vlskv_ray.data.prompts import Prompts, common_root, has_pictures
from vlskv_ray.data.sample import Rejected, left_out, refused_message
from vlskv_ray.data.sources import open_sources
from vlskv_ray.errors import StoppedRun
from vlskv_ray.evaluation.answers import Answer, Part
from vlskv_ray.files import write_json, write_texts
from vlskv_ray.launch.answer_workers import Job, parts_of
from vlskv_ray.launch.progress import LiveLine
from vlskv_ray.model.build import ModelFiles, find_model
from vlskv_ray.model.processor import load_processor
from vlskv_ray.storage.journal import Journal, changed_settings
from vlskv_ray.storage.run_lock import own_run_folder
from vlskv_ray.training.faults import fault_point
from vlskv_ray.words import format_duration, plural, short_path

EVERY_SECONDS = 10
"""Between two lines of progress where no terminal shows one."""


class Tally:
    """What has become of the rows so far."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows, self.began = num_rows, time.monotonic()
        self.answers: dict[int, Answer] = {}
        self.left_out: dict[int, dict[str, Any]] = {}
        self.num_kept = self.num_cut = self.num_tokens = self.num_parts = 0
        self.has_pictures = False
        """Of the rows that are written."""
        self.done: dict[int, set[int]] = {}
        """Batches of each window."""
        self.complete: set[int] = set()
        """Windows of which nothing is left to do."""
        self.before = (0, 0)
        """Rows and tokens that were there when this command began."""

    def add(self, part: Part) -> None:
        self.answers |= {answer.row: answer for answer in part.answers}
        self.left_out |= {row["row"]: row for row in part.left_out}
        self.num_kept += part.num_kept
        self.num_cut += sum(answer.finish_reason == "length" for answer in part.answers)
        self.num_tokens += sum(answer.num_tokens for answer in part.answers)
        self.num_parts += 1
        of_window = self.done.setdefault(part.window, set())
        of_window.add(part.batch)
        if len(of_window) == part.num_batches:
            self.complete.add(part.window)

    def begin(self) -> None:
        """From now on it is this command that adds to it."""
        self.began, self.before = time.monotonic(), (self.num_done, self.num_tokens)

    @property
    def num_done(self) -> int:
        return len(self.answers) + len(self.left_out) + self.num_kept

    def speed(self) -> str:
        """Tokens a second, of this command."""
        seconds = max(time.monotonic() - self.began, 1e-3)
        return f"{(self.num_tokens - self.before[1]) / seconds:,.0f} tokens/s"

    def summary(self) -> dict[str, Any]:
        """Figures of all that is done."""
        left_out = Counter(row["reason"] for row in self.left_out.values())
        counts = {"answers": len(self.answers), "cut": self.num_cut, "tokens": self.num_tokens, "kept": self.num_kept}
        return counts | {"left_out": dict(left_out.most_common())}

    def progress(self) -> str:
        """One line for a reader."""
        done = self.num_done - self.before[0]
        left = (time.monotonic() - self.began) * (self.num_rows - self.num_done) / max(done, 1)
        cut = f"  {self.num_cut} cut" if self.num_cut else ""
        time_left = f"  {format_duration(left)} left" if done else ""
        return f"answered {self.num_done} of {self.num_rows} rows{cut}  {self.speed()}{time_left}"


def open_prompts(specs: Sequence[SourceConfig], output: Path, num_samples: int | None) -> Prompts:
    """The rows of the data, the first so many of their mixture. ValueError where they cannot be read, or would be
    written over."""
    with name_option("--data", "data.sources"):
        sources = tuple(open_sources(specs))
    files = [file for source in sources for file in source.files]
    if output.exists() and any(file.exists() and output.samefile(file) for file in files):
        raise ValueError(f"--output: {output} is read as --data too; name another file")
    tables = [Table(source.num_rows) for source in sources]
    count = sum(table.rows for table in tables) if num_samples is None else num_samples
    return Prompts(sources, tuple(table.rows for table in first_of_mixture(tables, count)))


def find_teacher(name_or_path: str) -> ModelFiles:
    """The files of a model, checked; prints what its chat template makes of rows. ValueError where it is of no use."""
    with name_option("--model"):
        files = find_model(name_or_path)
        for notice in check_processor(files, load_processor(files)):
            print(f"warning: {notice}")
    return files


def answer_prompts(
    job: Job,
    output: Path,
    *,
    workers: int | None = None,
    threads: int | None = None,
    on_refused: str = "stop",
    anew: bool = False,
) -> None:
    """Answers what is not answered yet, keeps it in a journal beside the output, and writes the output at the end.

    An output that is finished, by the same settings, is left as it is.

    Args:
        job: see `Job`.
        output: JSON lines. Until it is there, its name with `.partial` is a folder of what is answered so far.
        workers: processes, on a Ray cluster; None: as many as there are CPUs and memory for; 0: this process.
        threads: of each; None: the CPUs shared out, or PyTorch's own in this process.
        on_refused: `stop` or `skip`, what a row does that asks for what data may not open.
        anew: answer all of it again, whatever is there.

    Raises:
        ValueError: another command writes this output, a file of that name is there that is something else, what is
            answered so far is of other settings, or no row can be answered.
        StoppedRun: a row is refused, or workers are lost again and again.
        NoRoom: others hold the cluster for longer than this waits.
        OSError: the disk is full.
    """
    partial, settings = output.with_name(f"{output.name}.partial"), job.settings()
    journal_file = partial / "journal"
    if output.exists() and not anew and not journal_file.exists():
        print(told_of_finished(output, settings), flush=True)
        return
    tally = Tally(job.prompts.num_rows)
    with own_run_folder(partial, "--output", "wait, or name another --output"):
        journal = Journal(journal_file, settings, "--output", anew)
        for line in journal.lines:
            tally.add(Part.from_json(line))
        tally.begin()
        stop_if_refused(tally.left_out.values(), on_refused)
        if tally.num_done:
            print(f"going on: {tally.num_done} of {plural(tally.num_rows, 'row')} were done before", flush=True)
        try:
            answer_the_rest(job, tally, journal, workers, threads, on_refused)
        except (KeyboardInterrupt, SystemExit):
            done = f"{tally.num_done} of {plural(tally.num_rows, 'row')} are done and kept"
            print(f"\ninterrupted: {done} in {short_path(partial)}; the same command goes on", flush=True)
            raise
        if not tally.answers:
            journal.remove()
            raise ValueError(f"--data: {why_nothing(job.prompts, tally)}")
        root = common_root(job.prompts.sources)
        write_rows(job.prompts, tally, output, root)
        write_json(summary_file(output), tally.summary() | {"sha256": digest_of(output), "settings": settings})
        fault_point("answers_written", tally.num_parts)
        journal.remove()
    print(told_at_the_end(tally, output, root), flush=True)


def answer_the_rest(
    job: Job, tally: Tally, journal: Journal, workers: int | None, threads: int | None, on_refused: str
) -> None:
    """Answers the windows that are not complete, showing how far it is; each part is in the journal before the next."""
    todo = [window for window in range(job.num_windows) if window not in tally.complete]
    line, told = LiveLine(), time.monotonic()
    with closing(parts_of(job, todo, tally.done, workers, threads)) as parts:  # whatever ends this ends the workers
        for part in parts:
            fault_point("answers_made", tally.num_parts)
            journal.append(part.to_json())
            tally.add(part)
            fault_point("answers_kept", tally.num_parts)
            stop_if_refused(part.left_out, on_refused)
            if line.live or time.monotonic() - told >= EVERY_SECONDS:
                line.write(tally.progress())
                told = time.monotonic()
    if line.live and todo:
        line.write(tally.progress(), lasting=True)


def stop_if_refused(rows: Iterable[dict[str, Any]], on_refused: str) -> None:
    """StoppedRun where a row asked for what data may not open."""
    if message := refused_message(rows, on_refused, "--on-refused skip"):
        raise StoppedRun(message)


def why_nothing(prompts: Prompts, tally: Tally) -> str:
    """Why there is no answer to any of the rows."""
    names = ", ".join(source.name for source in prompts.sources)
    if tally.num_kept:
        others = f", or cannot be used ({reasons(tally)})" if tally.left_out else ""
        return f"all rows of {names} end with an answer{others}; --replace has them answered anew"
    example = tally.left_out[min(tally.left_out)]
    return f"no row of {names} can be used ({reasons(tally)}). For one, {example['id']}: {example['detail']}"


def write_rows(prompts: Prompts, tally: Tally, output: Path, root: Path | None) -> None:
    """Writes the output, in the order of the prompts, and those left out into a file beside it.

    Args:
        root: the folder that image paths are to be relative to; None: pictures are written into the rows.
    """
    fault_point("answers_write", tally.num_parts)
    write_texts(output, lines_of(prompts, tally, root))
    listed = rejected_file(output)
    listed.unlink(missing_ok=True)
    if tally.left_out:
        rows = [dict(tally.left_out[number]) for number in sorted(tally.left_out)]
        write_texts(listed, [line_of({name: row[name] for name in row if name != "row"}) for row in rows])


def lines_of(prompts: Prompts, tally: Tally, root: Path | None) -> Iterator[str]:
    """The lines of the output; see `write_rows`."""
    for number in range(prompts.num_rows):
        if number not in tally.left_out:
            answer = tally.answers.get(number)
            try:
                row = prompts.written(number, answer.turn() if answer else None, root)
                tally.has_pictures = tally.has_pictures or has_pictures(row)
                yield line_of(row)
            except Rejected as reason:  # a picture of a row that nobody was asked about, and that is to be written
                tally.left_out[number] = {"row": number} | left_out(prompts.uid(number), reason)


def line_of(row: dict[str, Any]) -> str:
    """A line of JSON, with letters as they are, where they are any."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, in a column that nothing reads
        text = json.dumps(row)
    return f"{text}\n"


def rejected_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}.rejected.jsonl")


def summary_file(output: Path) -> Path:
    """Says how an output was made, and how many answers it has."""
    return output.with_name(f"{output.stem}.summary.json")


def digest_of(output: Path) -> str:
    with open(output, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def told_of_finished(output: Path, settings: dict[str, Any]) -> str:
    """What is told of an output that is there. ValueError unless these settings have made it, and it is as it was."""
    remedy = "name another file, or --anew answers all of it again"
    try:
        summary = dict(json.loads(summary_file(output).read_text()))
    except (OSError, TypeError, ValueError):
        summary = {}
    if summary.get("sha256") != digest_of(output):
        raise ValueError(f"--output: {output} is there already; {remedy}")
    of_journal = {"format": settings["format"]}  # which a finished file has no part in
    if changed := changed_settings(summary["settings"] | of_journal, settings):
        raise ValueError(f"--output: {output} was made with other settings ({', '.join(changed)}); {remedy}")
    answers, tokens = plural(summary["answers"], "answer"), plural(summary["tokens"], "token")
    return f"{short_path(output.absolute())} is finished: {answers} of {tokens}, {summary['cut']} of them cut"


def reasons(tally: Tally) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in tally.summary()["left_out"].items())


def told_at_the_end(tally: Tally, output: Path, root: Path | None) -> str:
    """What was done, and how to go on with it."""
    seconds = time.monotonic() - tally.began
    kept = f", {plural(tally.num_kept, 'row')} kept as they were" if tally.num_kept else ""
    lines = [
        f"{plural(len(tally.answers), 'answer')} of {plural(tally.num_tokens, 'token')}, {tally.num_cut} of them cut"
        f"{kept}; {tally.speed()}, {seconds:.0f} s"
    ]
    if tally.left_out:
        first = tally.left_out[min(tally.left_out)]
        listed = short_path(rejected_file(output).absolute())
        lines.append(
            f"{len(tally.left_out)} left out ({reasons(tally)}), see {listed}. For one, {first['id']}: "
            f"{first['detail']}"
        )
    path = short_path(output.absolute())
    is_elsewhere = tally.has_pictures and root not in (None, output.absolute().parent)
    where = f", image_root: {short_path(root)}" if root and is_elsewhere else ""
    written = plural(tally.num_rows - len(tally.left_out), "row")
    lines.append(f"{written} written, for data.sources=[{{path: {path}{where}}}]")
    return "\n".join(lines)
