"""The command that has a teacher answer prompts: rows to distil on, whatever stops it on the way."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from clusters import plan_faults
from conftest import conversation, picture
from runs import lines
from transformers import GenerationMixin
from waiting import HANG_SECONDS, wait_until

import vlskv_ray.answers
from vlskv_ray.answers import main
from vlskv_ray.config import SourceConfig
from vlskv_ray.data.chat import Limits, encode
from vlskv_ray.data.collate import IGNORE_INDEX
from vlskv_ray.data.sources import open_source
from vlskv_ray.model.build import find_model, load_config
from vlskv_ray.model.processor import load_processor
from vlskv_ray.training import faults

NUM_ROWS, NUM_ASKED, NUM_PARTS = 40, 33, 20
OPTIONS = ("--workers", "0", "--threads", "1", "--batch-size", "2", "--max-new-tokens", "30", "--temperature", "50")
# a process in which everything is imported, from which each command is forked: a second instead of six
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["vlskv_ray.launch.answer_prompts", "transformers.models.llava_next.modeling_llava_next"],
)


def write_prompts(folder: Path) -> Path:
    """Forty rows: prompts of one and two turns, with no, one and two pictures; some answered, one of no use."""
    (folder / "images").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for i in range(NUM_ROWS):
        turns = [*(("hello", "yes?") if i % 4 == 2 else ()), f"what is {'so ' * (i % 5)}{i}?"]
        turns += ["an answer"] if i % 7 == 3 else []
        names = [f"{i}-{k}.png" for k in range(i % 3)]
        for k, name in enumerate(names):
            (folder / "images" / name).write_bytes(picture(30 + i, 80 - i, i + k))
        rows.append({"id": f"r{i}", "topic": "ü", "messages": conversation(*turns, images=len(names)), "images": names})
    rows[14]["images"] = ["missing.png"] * 2
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "prompts.jsonl"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    write_prompts(folder)
    return folder


@pytest.fixture(scope="module")
def ask(files: Path, teacher_folder: Callable[..., Path]) -> Callable[..., list[str]]:
    """The options of a command that writes an output of that name."""

    def arguments(name: str, *options: str) -> list[str]:
        data = ["--data", str(files / "prompts.jsonl"), "--image-root", str(files / "images")]
        return ["--model", str(teacher_folder()), *data, "--output", str(files / name), *OPTIONS, *options]

    return arguments


@pytest.fixture(scope="module")
def alone(files: Path, ask: Callable[..., list[str]]) -> Path:
    """The output of a command that nothing has stopped."""
    assert main(ask("alone.jsonl")) == 0
    return files / "alone.jsonl"


def command(arguments: list[str], environment: dict[str, str], printed: Path) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores it, which is inherited
    with open(printed, "ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    raise SystemExit(vlskv_ray.answers.main(arguments))


def start(arguments: list[str], folder: Path, *wanted: tuple[str, int, str]) -> Any:
    """The command in a process of its own, to which something happens: phase, batches that are done, action."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    plan_faults(folder, *((phase, step, 0, action) for phase, step, action in wanted))
    process = FORKS.Process(target=command, args=(arguments, {faults.FOLDER: str(folder)}, folder / "printed"))
    process.start()
    return process


def ended(process: Any, folder: Path) -> int:
    process.join(HANG_SECONDS)
    assert process.exitcode is not None, (folder / "printed").read_text()
    return int(process.exitcode)


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The numbers of prompts that a model is asked at a time."""
    asked: list[int] = []
    generate = GenerationMixin.generate

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.extend([len(kwargs["input_ids"])] if "attention_mask" in kwargs else [])  # not the trial of a new model
        return generate(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", counted)
        yield asked


# --------------------------------------------------------------------------------------------------- what is written
def test_rows_are_written_with_their_answers(files: Path, alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the prompts: all that they say, and an answer as their last turn; those that have one as they
    are; those that cannot be used are listed, and nothing else is left."""
    before, after = lines(files / "prompts.jsonl"), lines(alone)
    left_out = lines(files / "alone.rejected.jsonl")
    assert [row["id"] for row in left_out if row["reason"] == "image_missing"] == ["prompts.jsonl:15"]
    without = {int(row["id"].rpartition(":")[2]) - 1 for row in left_out}
    assert [row["id"] for row in after] == [f"r{i}" for i in range(NUM_ROWS) if i not in without]
    by_id = {row["id"]: row for row in before}
    for row in after:
        prompt = by_id[row["id"]]
        has_answer = prompt["messages"][-1]["role"] == "assistant"
        turns = row["messages"] if has_answer else row["messages"][:-1]
        assert row | {"messages": turns} == prompt
        if not has_answer:
            assert row["messages"][-1].keys() == {"role", "content", "finish_reason", "num_tokens"}
            assert row["messages"][-1]["content"] and 1 <= row["messages"][-1]["num_tokens"] <= 30
    assert not list(files.glob("*alone.jsonl.*")) and not list(files.glob(".writing*"))


def test_they_are_ready_to_be_learnt(files: Path, alone: Path, teacher_folder: Callable[..., Path]) -> None:
    """Every row can be used; the end of an answer is learnt where the teacher wrote one, and not where it was cut."""
    model = find_model(str(teacher_folder()))
    config, processor = load_config(model), load_processor(model)
    source = open_source(SourceConfig(path=str(alone), image_root=str(files / "images")))
    reasons = set()
    for number, row in enumerate(lines(alone)):
        encoded = encode(source.read(number), processor, config, Limits(512))
        last = encoded.labels[encoded.labels != IGNORE_INDEX][-1]
        reason = row["messages"][-1].get("finish_reason")
        assert (last == processor.tokenizer.eos_token_id) == (reason != "length"), row["id"]
        reasons.add(reason)
    assert reasons == {"stop", "length", None}


def test_what_is_told_of_it(files: Path, ask: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """How many answers, how many of them cut, tokens, their rate, rows left out and why, and how to go on."""
    assert main(ask("told.jsonl", "--num-samples", "16")) == 0
    answers = [row["messages"][-1] for row in lines(files / "told.jsonl") if "num_tokens" in row["messages"][-1]]
    cut = sum(answer["finish_reason"] == "length" for answer in answers)
    tokens = sum(answer["num_tokens"] for answer in answers)
    first, second, third = capsys.readouterr().out.splitlines()[-3:]
    kept = sum("num_tokens" not in row["messages"][-1] for row in lines(files / "told.jsonl"))
    assert first.startswith(
        f"{len(answers)} answers of {tokens} tokens, {cut} of them cut, {kept} rows kept as they were; "
    )
    assert "tokens/s, " in first and first.endswith(" s")
    assert "1 x image_missing" in second and f"see {files}/told.rejected.jsonl. For one, prompts.jsonl:" in second
    num_rows = len(lines(files / "told.jsonl"))
    assert third == (
        f"{num_rows} rows written, for data.sources=[{{path: {files}/told.jsonl, image_root: {files}/images}}]"
    )


def test_the_folder_of_pictures_is_told_only_where_there_are_some(
    tmp_path: Path, teacher_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever has texts alone is not told to name one."""
    (tmp_path / "x.png").write_bytes(picture(30, 40, 0))
    part = {"type": "image", "image": "x.png"}
    rows = {
        "texts": {"messages": conversation("a?"), "images": []},
        "columns": {"messages": conversation("a?", images=1), "images": ["x.png"]},
        "parts": {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "a?"}]}]},
    }
    (tmp_path / "out").mkdir()
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        asked = ["--model", str(teacher_folder()), "--data", str(tmp_path / f"{name}.jsonl"), *OPTIONS]
        assert main([*asked, "--output", str(tmp_path / "out" / f"{name}.jsonl")]) == 0
        where = "" if name == "texts" else f", image_root: {tmp_path}"
        told = f"for data.sources=[{{path: {tmp_path}/out/{name}.jsonl{where}}}]\n"
        assert capsys.readouterr().out.endswith(told)


def test_answers_are_replaced_where_that_is_asked_for(tmp_path: Path, teacher_folder: Callable[..., Path]) -> None:
    """The last of each row; those before it are part of the prompt. Pictures without files are written along."""
    asked = ["--model", str(teacher_folder()), "--data", "shapes", "--output", str(tmp_path / "rows.jsonl"), *OPTIONS]
    assert main([*asked, "--num-samples", "6", "--replace", "--system", "Be brief."]) == 0
    old = open_source(SourceConfig(name="shapes", num_samples=6))
    new = open_source(SourceConfig(path=str(tmp_path / "rows.jsonl")))
    for number in range(6):
        system, *turns, answer = new.read(number).messages
        assert system == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
        assert turns == old.read(number).messages[:-1] and answer != old.read(number).messages[-1]
        assert len(new.read(number).images) == len(old.read(number).images)


# ----------------------------------------------------------------------------------------------------- what stops it
@pytest.mark.parametrize(
    ("phase", "step"),
    [("answers_made", 0), ("answers_made", 4), ("answers_kept", 5), ("answers_write", NUM_PARTS)],
)
def test_killed_at_any_moment_the_same_command_goes_on(
    files: Path,
    alone: Path,
    ask: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    phase: str,
    step: int,
) -> None:
    """To the same file, byte for byte; nothing that has an answer is asked again, and nothing is left unasked."""
    name, folder = f"{phase}-{step}.jsonl", files / "faults"
    assert ended(start(ask(name), folder, (phase, step, "kill")), folder) == -signal.SIGKILL
    assert not (files / name).exists()
    kept = (files / f"{name}.partial" / "journal").read_text().splitlines()[1:]
    assert len(kept) == step
    with counting(monkeypatch) as asked:
        assert main(ask(name)) == 0
    done = sum(len(json.loads(line)["answers"]) for line in kept)
    without = sum(row["reason"] == "answer_empty" for line in kept for row in json.loads(line)["left_out"])
    assert sum(asked) == NUM_ASKED - done - without
    assert (files / name).read_bytes() == alone.read_bytes()
    assert not (files / f"{name}.partial").exists()
    told = f"of {NUM_ROWS} rows were done before" if step else "answers of"
    assert told in capsys.readouterr().out


def test_killed_when_all_is_written(files: Path, alone: Path, ask: Callable[..., list[str]]) -> None:
    """The same command tidies up."""
    folder = files / "faults"
    process = start(ask("last.jsonl"), folder, ("answers_written", NUM_PARTS, "kill"))
    assert ended(process, folder) == -signal.SIGKILL
    assert (files / "last.jsonl").read_bytes() == alone.read_bytes() and (files / "last.jsonl.partial").exists()
    assert main(ask("last.jsonl")) == 0
    assert (files / "last.jsonl").read_bytes() == alone.read_bytes() and not (files / "last.jsonl.partial").exists()


def test_what_is_finished_is_left_as_it_is(
    files: Path,
    ask: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same command has nothing to do; what has other settings, or is somebody else's, is not written over."""
    few = ("--num-samples", "4")
    assert main(ask("finished.jsonl", *few)) == 0
    written = (files / "finished.jsonl").read_bytes()
    summary = json.loads((files / "finished.summary.json").read_text())
    assert (summary["answers"], summary["kept"], summary["left_out"]) == (3, 1, {})
    older = summary | {"settings": summary["settings"] | {"format": 1}}  # its journals were kept in another way
    (files / "finished.summary.json").write_text(json.dumps(older))
    with counting(monkeypatch) as asked:
        assert main(ask("finished.jsonl", *few, "--threads", "1")) == 0
    assert (
        not asked
        and f"finished.jsonl is finished: 3 answers of {summary['tokens']} tokens, " in capsys.readouterr().out
    )
    assert main(ask("finished.jsonl", *few, "--seed", "1")) == 2
    assert "finished.jsonl was made with other settings (seed: 0, now 1); name another" in capsys.readouterr().err
    (files / "finished.jsonl").write_bytes(written + b"{}\n")
    assert main(ask("finished.jsonl", *few)) == 2
    assert "finished.jsonl is there already; name another file, or --anew" in capsys.readouterr().err
    assert (files / "finished.jsonl").read_bytes() == written + b"{}\n"
    assert main(ask("finished.jsonl", *few, "--anew")) == 0
    assert (files / "finished.jsonl").read_bytes() == written


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_answered(
    files: Path, alone: Path, ask: Callable[..., list[str]], number: int, status: int
) -> None:
    folder, name = files / "faults", f"{status}.jsonl"
    process = start(ask(name), folder, ("answers_kept", 3, "wait"))
    wait_until((folder / "00.json.done").exists, process.is_alive, (folder / "printed").read_text)
    os.kill(process.pid, number)
    assert ended(process, folder) == status
    told = (folder / "printed").read_text()
    assert "rows are done and kept in " in told and f"{name}.partial; the same command goes on" in told
    assert "Traceback" not in told
    assert main(ask(name)) == 0
    assert (files / name).read_bytes() == alone.read_bytes()


def test_two_commands_do_not_write_one_output(
    files: Path, alone: Path, ask: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = files / "faults"
    process = start(ask("two.jsonl"), folder, ("answers_kept", 1, "wait"))
    wait_until((folder / "00.json.done").exists, process.is_alive, (folder / "printed").read_text)
    assert main(ask("two.jsonl")) == 2
    told = capsys.readouterr().err
    assert f"two.jsonl.partial: another process runs this run (process {process.pid} on " in told
    assert told.endswith("; wait, or name another --output\n")
    (folder / "00.json.go").touch()
    assert ended(process, folder) == 0 and (files / "two.jsonl").read_bytes() == alone.read_bytes()


def test_other_settings_do_not_go_on(
    files: Path, alone: Path, ask: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """They are named; `--anew` begins again. What refused rows do may change."""
    folder = files / "faults"
    assert ended(start(ask("other.jsonl"), folder, ("answers_kept", 2, "kill")), folder) == -signal.SIGKILL
    assert main(ask("other.jsonl", "--seed", "4", "--replace")) == 2
    told = capsys.readouterr().err
    assert "made with other settings (replace: false, now true, seed: 0, now 4); give the same ones" in told
    assert main(ask("other.jsonl", "--on-refused", "skip")) == 0
    assert (files / "other.jsonl").read_bytes() == alone.read_bytes()
    assert main(ask("other.jsonl", "--seed", "4", "--anew", "--num-samples", "8")) == 0
    with_other_seed, before = lines(files / "other.jsonl"), lines(alone)[:8]
    for new, old in zip(with_other_seed, before, strict=True):
        assert new["id"] == old["id"]
        assert (new == old) == ("num_tokens" not in old["messages"][-1])


# ------------------------------------------------------------------------------------------------------ what is wrong
def test_a_row_that_asks_for_what_it_may_not_have(
    tmp_path: Path, teacher_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Stops the command; `--on-refused skip` goes on without it, and without asking again."""
    rows = [{"messages": conversation("a?")}, {"messages": conversation("b?", images=1), "images": ["../x.png"]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--model", str(teacher_folder()), "--data", str(tmp_path / "rows.jsonl"), *OPTIONS]
    asked += ["--output", str(tmp_path / "out.jsonl")]
    for _ in range(2):
        assert main(asked) == 1
        told = capsys.readouterr().err
        assert told.startswith("error: rows.jsonl:2: path_outside_root: ") and "--on-refused skip leaves" in told
    assert main([*asked, "--on-refused", "skip"]) == 0
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == ["rows.jsonl:1"]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([conversation("a?", "b")], "--data: all rows of rows.jsonl end with an answer; --replace has them answered"),
        ([conversation(" "), conversation(" ")], "--data: no row of rows.jsonl can be used (2 x question_empty). For"),
    ],
)
def test_where_there_is_nothing_to_answer(
    tmp_path: Path,
    teacher_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    rows: list[Any],
    told: str,
) -> None:
    """Nothing is written, and nothing left that would be in the way of a better command."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
    asked = ["--model", str(teacher_folder()), "--data", str(tmp_path / "rows.jsonl"), *OPTIONS]
    assert main([*asked, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert capsys.readouterr().err.startswith(told)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--output", "{}/no/out.jsonl"], "--output: there is no folder {}/no; wanted a file in a folder that can be"),
        (["--output", "{}/images.jsonl"], "--output: {}/images.jsonl is no regular file; wanted a file"),
        (["--output", "{}/prompts.jsonl", "--anew"], "--output: {}/prompts.jsonl is read as --data too; name another"),
        (["--data", "{}/none.jsonl", "--output", "{}/x.jsonl"], "--data: {}/none.jsonl: no such file"),
        (["--model", "{}/none", "--output", "{}/x.jsonl"], "--model: there is no folder '{}/none'"),
        (["--output", "{}/other/a.jsonl"], "--output: {}/other/a.jsonl is there already; name another file, or --anew"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_asked(
    files: Path,
    alone: Path,
    ask: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    told: str,
) -> None:
    (files / "images.jsonl").mkdir(exist_ok=True)
    (files / "other").mkdir(exist_ok=True)
    (files / "other" / "a.jsonl").touch()
    assert main(ask("x.jsonl", *(option.format(files) for option in options))) == 2
    assert capsys.readouterr().err.startswith(told.format(files))
    assert not (files / "x.jsonl").exists() and not (files / "x.jsonl.partial").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--temperature", "0", "--top-p", "0.5"], "--top-p and --top-k go with a --temperature above 0"),
        (["--temperature", "1e-40"], "--temperature: wanted 0, for the likeliest token, or 0.001 at least"),
        (["--temperature", "hot"], "--temperature: wanted a number from 0 to 100, got 'hot'"),
        (["--temperature", "nan"], "--temperature: wanted a number from 0 to 100, got 'nan'"),
        (["--top-p", "0"], "--top-p: wanted a number from 1e-06 to 1, got '0'"),
        (["--workers", "-1"], "--workers: wanted a number from 0 to 100000"),
        (["--output", "rows.json"], "--output: wanted a name that ends in .jsonl, got 'rows.json'"),
        (["--split", "test"], "--split goes with a named data set of --data, files have none"),
    ],
)
def test_options_that_make_no_sense(
    ask: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as status:
        main(ask("x.jsonl", *options))
    assert status.value.code == 2 and told in capsys.readouterr().err
