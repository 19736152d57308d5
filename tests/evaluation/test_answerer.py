"""What a teacher answers depends on the prompt and the seed alone, and is what the stock model answers."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import conversation, picture
from transformers import GenerationConfig, TopPLogitsWarper

from vlskv_ray.config import SourceConfig
from vlskv_ray.data.chat import Limits, encode_prompt
from vlskv_ray.data.images import load_image
from vlskv_ray.data.prompts import Prompts
from vlskv_ray.data.sources import open_source
from vlskv_ray.evaluation.answers import Answer, Answerer, Part, Sampling, SeededSampling, rows_of_window
from vlskv_ray.evaluation.evaluator import toggled
from vlskv_ray.evaluation.loading import build_side
from vlskv_ray.model.build import find_model
from vlskv_ray.model.processor import load_processor

QUESTIONS = ("what?", "what is it, and why is it so?", "a", "which of these is the larger one of the two?", "hm, no")
DRAWN = Sampling(max_new_tokens=20, temperature=4.0, seed=7)


@pytest.fixture(scope="module")
def teacher(teacher_folder: Callable[..., Path]) -> tuple[Any, Any]:
    """Model and processor."""
    files = find_model(str(teacher_folder()))
    return build_side(files, is_student=False, teacher=True), load_processor(files)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    """Twenty, of one and two turns, with no, one and two pictures, and two rows that are none."""
    folder = tmp_path_factory.mktemp("prompts")
    rows: list[dict[str, Any]] = []
    for i in range(20):
        turns = [*(("hello", "so do I") if i % 4 == 2 else ()), QUESTIONS[i % 5]]
        names = [f"{i}-{k}.png" for k in range(i % 3)]
        for k, name in enumerate(names):
            (folder / name).write_bytes(picture(30 + 5 * i, 70 - 2 * i, i + k))
        rows.append({"messages": conversation(*turns, images=len(names)), "images": names})
    rows.insert(3, {"messages": conversation("is it?", "it is")})
    rows.insert(9, {"messages": conversation("is it?", images=1), "images": ["missing.png"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(SourceConfig(path=str(folder / "rows.jsonl")))
    return Prompts((source,), (source.num_rows,))


def answerer(teacher: tuple[Any, Any], prompts: Prompts, sampling: Sampling, batch_size: int) -> Answerer:
    return Answerer(*teacher, prompts, sampling, batch_size, Limits(512))


def parts_of(answering: Answerer) -> list[Part]:
    num_windows = -(-answering.prompts.num_rows // answering.window_size)
    return [part for window in range(num_windows) for part in answering.parts(window)]


def by_row(parts: list[Part]) -> dict[int, Answer]:
    return {answer.row: answer for part in parts for answer in part.answers}


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=20), DRAWN])
def test_many_at_once_are_answered_as_each_alone(
    teacher: tuple[Any, Any], prompts: Prompts, sampling: Sampling
) -> None:
    """Token for token, whatever their lengths, turns and pictures; by more batches too."""
    alone = by_row(parts_of(answerer(teacher, prompts, sampling, 1)))
    assert len(alone) == 20 and len({answer.text for answer in alone.values()}) > 15
    for batch_size in (3, 8, 32):
        assert by_row(parts_of(answerer(teacher, prompts, sampling, batch_size))) == alone


def test_greedy_answers_are_the_stock_models_own(teacher: tuple[Any, Any], prompts: Prompts) -> None:
    """Of `generate()` on what the stock processor makes of the same conversation; of a student with SwiftKV off too."""
    model, processor = teacher
    answers = by_row(parts_of(answerer(teacher, prompts, Sampling(max_new_tokens=12), 8)))
    for number in (0, 1, 2, 4):
        sample, _ = prompts.read(number)
        text = processor.apply_chat_template(sample.messages, add_generation_prompt=True)
        images = [load_image(image) for image in sample.images] or None
        inputs = processor(text=text, images=images, add_special_tokens=not text.startswith("<s>"), return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        words = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answers[number].text == words.rstrip("\ufffd").rstrip(), number


def test_a_student_answers_as_its_teacher(
    student: Callable[..., Any], teacher: tuple[Any, Any], prompts: Prompts, tmp_path: Path
) -> None:
    student().save_pretrained(tmp_path)
    teacher[1].save_pretrained(tmp_path)
    side = build_side(find_model(str(tmp_path)), is_student=True, teacher=True)
    sampling = Sampling(max_new_tokens=6)
    of_student = by_row(parts_of(answerer((side, teacher[1]), prompts, sampling, 8)))
    assert of_student == by_row(parts_of(answerer(teacher, prompts, sampling, 8)))
    with toggled(side, on=True):
        assert of_student != by_row(parts_of(answerer((side, teacher[1]), prompts, sampling, 8)))


def test_settings_of_the_models_file_change_no_answer(teacher: tuple[Any, Any], prompts: Prompts) -> None:
    """A penalty of repetition would count the padding, and make answers depend on the others of a batch."""
    model, _ = teacher
    wanted = by_row(parts_of(answerer(teacher, prompts, Sampling(max_new_tokens=9), 4)))
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, repetition_penalty=9.0, do_sample=True, top_k=1)
    assert by_row(parts_of(answerer(teacher, prompts, Sampling(max_new_tokens=9), 4))) == wanted


def test_what_is_drawn_follows_the_seed_and_the_place(teacher: tuple[Any, Any], prompts: Prompts) -> None:
    """The same prompt in two rows is answered in two ways; another seed answers all in other ways."""
    drawn = [by_row(parts_of(answerer(teacher, prompts, Sampling(20, 4.0, seed=seed), 8))) for seed in (7, 7, 8)]
    assert drawn[0] == drawn[1]
    assert all(drawn[0][row].text != drawn[2][row].text for row in drawn[0])
    rows = [row for row in drawn[0] if prompts.read(row)[0].messages == prompts.read(0)[0].messages]
    assert len(rows) > 1 and len({drawn[0][row].text for row in rows}) == len(rows)


def test_answers_end_or_are_cut(teacher: tuple[Any, Any], prompts: Prompts) -> None:
    """By the token that ends a turn, which counts but is no text, or after so many tokens; the first of both."""
    sampling = Sampling(max_new_tokens=90, temperature=50.0)
    answers = by_row(parts_of(answerer(teacher, prompts, sampling, 8))).values()
    assert Counter(answer.finish_reason for answer in answers).keys() == {"stop", "length"}
    for answer in answers:
        assert answer.num_tokens == 90 if answer.finish_reason == "length" else answer.num_tokens <= 90
        assert "</s>" not in answer.text and not answer.text.endswith("\ufffd") or answer.finish_reason == "stop"
    assert next(iter(answers)).turn().keys() == {"role", "content", "finish_reason", "num_tokens"}


def test_an_answer_ends_where_positions_do(teacher: tuple[Any, Any], prompts: Prompts) -> None:
    """Each prompt's own, though others of its batch have room for more; the last token needs no position."""
    model, processor = teacher
    lengths = {}
    for row in (0, 4):
        lengths[row] = len(encode_prompt(prompts.read(row)[0], processor, model.config, Limits(512)).input_ids)
    assert lengths[0] < lengths[4]
    parts = parts_of(Answerer(model, processor, prompts, Sampling(max_new_tokens=40), 8, Limits(lengths[4] + 7)))
    answers = by_row(parts)
    assert answers[4].num_tokens == 8
    assert answers[0].num_tokens == min(40, lengths[4] + 8 - lengths[0]) > 8
    reasons = {row["reason"] for part in parts for row in part.left_out}
    assert {"too_long", "image_missing"} <= reasons <= {"too_long", "too_long_image", "image_missing"}


def test_each_batch_is_made_once_and_the_same_again(teacher: tuple[Any, Any], prompts: Prompts) -> None:
    """What is done is not made again, and the first batch tells of rows that are not asked."""
    answering = answerer(teacher, prompts, Sampling(max_new_tokens=8), 3)
    answering.window_size = 12
    whole = list(answering.parts(0))
    assert [(part.batch, part.num_batches) for part in whole] == [(i, 4) for i in range(4)]
    assert (whole[0].num_kept, [row["row"] for row in whole[0].left_out]) == (1, [9])
    without = [row["row"] for part in whole[1:] for row in part.left_out if row["reason"] == "answer_empty"]
    assert sum(part.num_kept + len(part.left_out) for part in whole[1:]) == len(without)
    assert list(answering.parts(0, done={0, 2})) == [whole[1], whole[3]]
    assert [Part.from_json(json.loads(json.dumps(part.to_json()))) for part in whole] == whole
    assert sorted([*by_row(whole), *without]) == [row for row in range(12) if row not in (3, 9)]


def test_few_prompts_are_work_for_several_workers() -> None:
    """Windows are one batch each then, and four at most; they depend on the prompts and the batch size alone."""
    assert [rows_of_window(num_rows, 16) for num_rows in (0, 1, 16, 80, 240)] == [16] * 5
    assert [rows_of_window(num_rows, 16) for num_rows in (256, 404, 512, 10**6)] == [32, 48, 64, 64]
    assert rows_of_window(5, 1) == 1


def test_a_prompt_longer_than_the_model_is_told_so(teacher: tuple[Any, Any], prompts: Prompts) -> None:
    """By the model's positions: no option of an answer's says how long a prompt may be."""
    parts = parts_of(Answerer(*teacher, prompts, Sampling(max_new_tokens=1), 8, Limits(20, is_of_model=True)))
    left = [row["detail"] for part in parts for row in part.left_out if row["reason"] == "too_long"]
    assert left and all(detail.endswith(", more than the model's 20 positions") for detail in left)


def test_logits_that_are_no_numbers_end_it(teacher_folder: Callable[..., Path], prompts: Prompts) -> None:
    """Greedy or drawn: the likeliest of them would be a token like any other."""
    files = find_model(str(teacher_folder()))
    model = build_side(files, is_student=False, teacher=True)
    model.lm_head.weight.data[5] = float("nan")
    for sampling in (Sampling(max_new_tokens=2), DRAWN):
        with pytest.raises(ValueError, match=r"its logits are no numbers \(nan\): weights of it are damaged"):
            parts_of(answerer((model, load_processor(files)), prompts, sampling, 4))


def test_a_window_in_which_nothing_is_asked(teacher: tuple[Any, Any], tmp_path: Path) -> None:
    """Is done at once."""
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": conversation("is it?", "it is")}) + "\n") * 3)
    source = open_source(SourceConfig(path=str(tmp_path / "rows.jsonl")))
    assert parts_of(answerer(teacher, Prompts((source,), (3,)), Sampling(), 8)) == [Part(0, 0, 1, [], [], 3)]


def test_an_answer_without_a_word_is_none(teacher: tuple[Any, Any], prompts: Prompts) -> None:
    """The row is left out: here a character of four bytes was cut after its first."""
    parts = parts_of(answerer(teacher, prompts, Sampling(max_new_tokens=1), 8))
    empty = [row for part in parts for row in part.left_out if row["reason"] == "answer_empty"]
    assert empty and empty[0]["detail"] == "the model's answer of 1 token has no text"
    assert not {row["row"] for row in empty} & by_row(parts).keys()


# ---------------------------------------------------------------------------------------------------------- what is dra
def drawn(scores: torch.Tensor, num_draws: int, sampling: Sampling) -> Counter[int]:
    """How often each token is drawn, by as many prompts."""
    keys = [f"rows.jsonl:{i}" for i in range(num_draws)]
    noisy = SeededSampling(sampling, keys)(torch.zeros(num_draws, 1, dtype=torch.long), scores.expand(num_draws, -1))
    return Counter(noisy.argmax(-1).tolist())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_by_their_probabilities(temperature: float) -> None:
    """Within four standard deviations of each; what cannot be is never drawn."""
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, -math.inf]])
    counts = drawn(scores, 4000, Sampling(temperature=temperature))
    for token, probability in enumerate((scores[0].double() / temperature).softmax(-1).tolist()):
        deviation = math.sqrt(4000 * probability * (1 - probability))
        assert abs(counts[token] - 4000 * probability) <= 4 * deviation, token


def test_a_prompts_noise_is_its_own_and_new_for_each_token() -> None:
    scores, none = torch.zeros(3, 50), torch.zeros(3, 1, dtype=torch.long)
    together = SeededSampling(Sampling(temperature=1.0), ["a", "b", "c"])
    alone = SeededSampling(Sampling(temperature=1.0), ["b"])
    for _ in range(3):
        of_all, of_one = together(none, scores), alone(none[:1], scores[:1])
        assert torch.equal(of_all[1:2], of_one) and not torch.equal(of_all[0], of_all[1])
    assert not torch.equal(of_one, alone(none[:1], scores[:1]))


@pytest.mark.parametrize(
    ("options", "possible"),
    [({"top_k": 2}, {0, 1}), ({"top_k": 1}, {0}), ({"top_p": 0.85}, {0, 1}), ({"top_p": 0.999}, {0, 1, 2, 3})],
)
def test_only_the_likeliest_are_drawn(options: dict[str, Any], possible: set[int]) -> None:
    """Probabilities are .64, .24, .09 and .03."""
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    assert drawn(scores, 1000, Sampling(temperature=1.0, **options)).keys() == possible


@pytest.mark.parametrize("few", [2, 5, 1024])
def test_it_does_not_matter_where_the_likeliest_are_looked_for(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    """The same tokens are drawn, and they are those of the stock warper."""
    monkeypatch.setattr("vlskv_ray.evaluation.answers.FEW", few)
    scores = torch.randn(4, 60, generator=torch.Generator().manual_seed(1)) * 2
    draw = SeededSampling(Sampling(temperature=0.8, top_p=0.7, seed=3), ["a", "b", "c", "d"])
    tokens = torch.stack([draw(torch.zeros(4, 1), scores).argmax(-1) for _ in range(60)])
    possible = TopPLogitsWarper(0.7)(torch.zeros(4, 1), scores / 0.8).isfinite()
    assert possible.gather(1, tokens.T).all() and not possible.all()
    seen = torch.zeros_like(possible).scatter_(1, tokens.T, True)
    assert seen.sum() > possible.sum() / 2
    monkeypatch.setattr("vlskv_ray.evaluation.answers.FEW", 60)
    draw = SeededSampling(Sampling(temperature=0.8, top_p=0.7, seed=3), ["a", "b", "c", "d"])
    assert torch.equal(torch.stack([draw(torch.zeros(4, 1), scores).argmax(-1) for _ in range(60)]), tokens)
