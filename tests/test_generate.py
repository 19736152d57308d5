"""The command that asks: it answers as `generate` does, SwiftKV on or off, and says what is wrong with its input."""

import io
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlskv_ray.data.images import load_image
from vlskv_ray.evaluation.ask import Answer, answer, compare, comparison, open_image, read_question
from vlskv_ray.evaluation.loading import load
from vlskv_ray.generate import main
from vlskv_ray.model.build import find_model
from vlskv_ray.model.processor import load_processor

TIMES = r"first token after \d+\.\d{3} s, \d+\.\d tokens/s after it, (\d+) prompt tokens \((\d+) of images\)\n"


@pytest.fixture
def folder(student: Callable[..., Any], teacher_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A saved student, as `final/` of a run."""
    student().save_pretrained(tmp_path / "final")
    load_processor(find_model(str(teacher_folder()))).save_pretrained(tmp_path / "final")
    return tmp_path / "final"


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        path.write_bytes(picture(60 + 30 * seed, 50, seed))
    return [str(path) for path in paths]


def by_hand(folder: Path, prompt: str, images: list[str], swiftkv: bool) -> tuple[str, int, int]:
    """The README's way: the answer, the prompt's tokens and those of them of images."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model.config.text_config.swiftkv = swiftkv
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    opened = [Image.open(path).convert("RGB") for path in images] or None
    inputs = processor(text=text, images=opened, add_special_tokens=False, return_tensors="pt")
    prompt_ids = inputs["input_ids"][0]
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, len(prompt_ids) :]
    of_images = int((prompt_ids == model.config.image_token_id).sum())
    return processor.decode(tokens, skip_special_tokens=True), len(prompt_ids), of_images


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_it_answers_as_generate_does(
    folder: Path, pictures: list[str], num_images: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text only, about an image and about several, by the student and by the teacher, whose answers differ."""
    images = pictures[:num_images]
    asked = ["--model", str(folder), "--prompt", "What is it?", "--max-new-tokens", "12"]
    asked += [word for path in images for word in ("--image", path)]
    answers = []
    for swiftkv, flags in ((True, []), (False, ["--teacher"])):
        assert main([*asked, *flags]) == 0
        printed = capsys.readouterr().out
        text, num_tokens, of_images = by_hand(folder, "What is it?", images, swiftkv)
        assert printed.startswith(f"{text}\n")
        told = re.fullmatch(TIMES, printed.removeprefix(f"{text}\n"))
        assert told is not None and (int(told[1]), int(told[2])) == (num_tokens, of_images)
        answers.append(text)
    assert answers[0] != answers[1] and (of_images > 0) == (num_images > 0)


def test_compare_shows_both_answers(folder: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher's row first, then the student's, each with its own answer, whatever was warmed up before."""
    asked = ["--model", str(folder), "--prompt", "hello", "--max-new-tokens", "12", "--image", pictures[0], "--compare"]
    assert main(asked) == 0
    _, teacher, student, ratio, tokens = capsys.readouterr().out.split("\n")[:-1]
    assert teacher.split("  ")[-1] != student.split("  ")[-1]
    for row, name, swiftkv in ((teacher, "teacher", False), (student, "student", True)):
        text, num_tokens, of_images = by_hand(folder, "hello", pictures[:1], swiftkv)
        assert row.startswith(f"{name} ") and row.endswith(f"  {' '.join(text.split())}")
    assert re.fullmatch(r"time to first token, teacher / student: \d+\.\d\d", ratio)
    assert tokens == f"{num_tokens} prompt tokens ({of_images} of images)"


@pytest.mark.parametrize(("enough_seconds", "turns"), [(math.inf, 4), (0, 1)])
def test_sides_are_timed_in_turn(folder: Path, pictures: list[str], enough_seconds: float, turns: int) -> None:
    """Each is asked as often, by the whole prompt, before it is timed as while it is: the teacher, then the student.

    Where one turn takes longer than is enough there is one.
    """
    model, processor = load(str(folder))
    inputs, _ = read_question(model.config, processor, "hello", [open_image(pictures[0])])
    prefills: list[bool] = []
    steps: list[bool] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        passes = prefills if kwargs["input_ids"].shape == inputs["input_ids"].shape else steps
        passes.append(module.config.text_config.swiftkv)

    model.register_forward_pre_hook(note, with_kwargs=True)
    teacher, student = compare(model, processor, inputs, max_new_tokens=6, turns=4, enough_seconds=enough_seconds)
    assert prefills == [False, True] * (1 + turns + 1)  # warming up, being timed, and the answers
    assert steps == [False, True] + [False] * (teacher.num_tokens - 1) + [True] * (student.num_tokens - 1)
    assert model.config.text_config.swiftkv


def test_the_time_to_the_first_token_is_the_median(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the model's passes move: neither the first uses nor a stray slow pass are what is told."""
    model, processor = load(str(folder))
    inputs, _ = read_question(model.config, processor, "hello", [])
    took = iter([9.0, 90.0, 3.0, 1.0, 2.0, 50.0, 40.0, 2.0, 5.0, 5.0])  # the teacher's, the student's, and so on
    now = 0.0

    def pass_time(*_: Any) -> None:
        nonlocal now
        now += next(took)

    model.register_forward_pre_hook(pass_time)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    teacher, student = compare(model, processor, inputs, max_new_tokens=1, turns=3, enough_seconds=math.inf)
    assert (teacher.first_token_seconds, student.first_token_seconds) == (3.0, 2.0)


def test_the_table_of_a_comparison() -> None:
    """An answer of several lines stays in its row, one of a single token has no rate."""
    assert comparison(Answer("a red\n cat", 4, 1.5, 20.04), Answer("", 1, 0.5, None)).splitlines() == [
        "         first token  tokens/s  answer",
        "teacher      1.500 s      20.0  a red cat",
        "student      0.500 s         -",
        "time to first token, teacher / student: 3.00",
    ]


def test_a_plain_model_answers_as_the_teacher_only(
    folder: Path, teacher_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same words as its student with SwiftKV off; presets are models too."""
    answers = []
    for model in (folder, teacher_folder()):
        assert main(["--model", str(model), "--prompt", "hello", "--teacher"]) == 0
        answers.append(re.sub(TIMES, "", capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert main(["--model", "shapes-llava-next", "--prompt", "hello", "--teacher", "--max-new-tokens", "2"]) == 0
    for flags in ([], ["--compare"]):
        assert main(["--model", str(teacher_folder()), "--prompt", "hello", *flags]) == 2
        assert "holds no SwiftKV weights; --teacher shows what it answers" in capsys.readouterr().err


@pytest.mark.parametrize("bos", ["", "{{ bos_token }}"])
def test_a_prompt_begins_once(folder: Path, bos: str) -> None:
    """With one token for the beginning, whether the chat template writes it or the tokenizer adds it."""
    model, processor = load(str(folder))
    processor.chat_template = processor.chat_template.replace("{{ bos_token }}", bos)
    begin = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", processor.tokenizer.bos_token_id)])
    processor.tokenizer.backend_tokenizer.post_processor = begin
    inputs, _ = read_question(model.config, processor, "hello", [])
    assert inputs["input_ids"].eq(processor.tokenizer.bos_token_id).sum() == 1


def test_a_prompt_is_prepared_as_the_stock_processor_does(folder: Path) -> None:
    """But for names of control tokens, which are characters of the question."""
    model, processor = load(str(folder))
    images = [load_image(picture(60, 40)), load_image(picture(30, 50))]
    inputs, _ = read_question(model.config, processor, "What is it?", images)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    stock = processor(text=text, images=images, add_special_tokens=False, return_tensors="pt")
    assert inputs.keys() == stock.keys() and all(torch.equal(inputs[name], stock[name]) for name in inputs)
    inputs, _ = read_question(model.config, processor, "What is </s>?", [])
    assert not inputs["input_ids"].eq(processor.tokenizer.eos_token_id).any()
    assert "What is </s>?" in processor.tokenizer.decode(inputs["input_ids"][0])


def test_times_are_those_of_the_tokens(folder: Path) -> None:
    """They fit into the time the answer took; a single token has no rate."""
    model, processor = load(str(folder))
    inputs, _ = read_question(model.config, processor, "What is it?", [])
    began = time.perf_counter()
    several = answer(model, processor, inputs, max_new_tokens=6)
    took = time.perf_counter() - began
    assert several.num_tokens == 6 and several.tokens_per_second is not None and several.first_token_seconds > 0
    assert several.first_token_seconds + 5 / several.tokens_per_second < took
    single = answer(model, processor, inputs, max_new_tokens=1)
    assert (single.num_tokens, single.tokens_per_second) == (1, None)


def test_an_answer_ends_where_the_positions_do(folder: Path) -> None:
    """Of 512 positions a prompt may take all; the token after it is told and not read."""
    model, processor = load(str(folder))
    inputs, room = read_question(model.config, processor, "x", [])
    length = inputs["input_ids"].shape[1]
    assert length + room == 513
    assert read_question(model.config, processor, "x" * room, [])[1] == 1
    with pytest.raises(ValueError, match="--prompt: 513 tokens, 0 of them of images, but the model has positions for"):
        read_question(model.config, processor, "x" * (room + 1), [])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_the_same_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--model", str(folder), "--prompt", "hello"]
    assert main(asked) == 0
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(asked) == 0
    answers = [re.sub(TIMES, "", printed) for printed in (terminal.getvalue(), capsys.readouterr().out)]
    assert answers[0] == answers[1]


def test_ctrl_c_ends_it_midway(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 130 without a traceback, while the answer is being printed."""

    class Interrupted(Terminal):
        def write(self, text: str) -> int:
            signal.raise_signal(signal.SIGINT)
            return super().write(text)

    terminal = Interrupted()
    monkeypatch.setattr(sys, "stdout", terminal)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it
    try:
        assert main(["--model", str(folder), "--prompt", "hello"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "first token" not in terminal.getvalue()


PROBLEMS = {
    "no folder": (["--model", "./nowhere"], "--model: there is no folder './nowhere'; wanted a preset"),
    "no model": (["--model", "empty"], "--model: empty holds no config.json"),
    "damaged weights": (["--model", "damaged"], "--model: damaged: weights cannot be loaded"),
    "another's template": (["--model", "text-template"], "--model: its chat template does not take this question: can"),
    "blind template": (
        ["--model", "blind", "--image", "a.png"],
        "--model: its chat template writes 0 image tokens for",
    ),
    "missing image": (["--image", "b.png"], "--image: there is no file 'b.png'"),
    "damaged image": (["--image", "a.png", "cut.png"], "--image: cut.png: the PNG image ends too early"),
    "no image": (["--image", "text.png"], "--image: text.png: cannot be read as any of JPEG, PNG"),
    "image folder": (["--image", "empty"], "is a folder"),
    "too long": (["--prompt", "x" * 600, "--image", "a.png"], "of images, but the model has positions for 512"),
    "empty prompt": (["--prompt", " \n"], "--prompt: is empty"),
    "image token": (["--prompt", "<image> what?"], "--prompt: holds '<image>', which stands for an image; use --image"),
    "no text": (["--prompt", "\udcff"], "--prompt: is not UTF-8 text"),
}


@pytest.mark.parametrize(("arguments", "message"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_wrong_input_gives_one_line_and_status_2(
    arguments: list[str],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is answered, and no key of a run's config is named."""
    monkeypatch.chdir(folder.parent)
    os.mkdir("empty")
    for name, file, content in (
        ("damaged", "model.safetensors", "damaged"),
        ("text-template", "chat_template.jinja", "{{ 'USER: ' + messages[0]['content'] }}"),
        ("blind", "chat_template.jinja", "{{ messages[0]['content'][-1]['text'] }}"),
    ):
        shutil.copytree("final", name)
        Path(name, file).write_text(content)
    Path("a.png").write_bytes(picture(60, 40))
    Path("cut.png").write_bytes(picture(60, 40)[:200])
    Path("text.png").write_text("no image at all")
    capsys.readouterr()
    assert main(["--model", "final", "--prompt", "What is it?", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert message in printed.err and "name_or_path" not in printed.err
