"""What is measured of a student: against plain references, whatever the batches and however many workers."""

import base64
import contextlib
import copy
import io
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import conversation, mixed_samples, picture, tiny_config
from PIL import Image
from torch.nn import functional as F

from vlskv_ray.config import SourceConfig
from vlskv_ray.data.chat import Limits, encode
from vlskv_ray.data.collate import IGNORE_INDEX, Encoded, collate
from vlskv_ray.data.images import load_image
from vlskv_ray.data.questions import HeldOut, Question, questions_of, read_questions
from vlskv_ray.data.sample import Sample
from vlskv_ray.data.shapes import ShapesSource
from vlskv_ray.data.sources import Source, open_sources
from vlskv_ray.evaluation.evaluator import (
    EXAMPLE_SIDE,
    NUM_EXAMPLES,
    Evaluator,
    Measured,
    Result,
    before_distillation,
    distributions,
    evaluation_of,
    examples_of,
    figures_of,
    greedy_answers,
    toggled,
)
from vlskv_ray.model.build import build_plain, find_model, load_config
from vlskv_ray.model.processor import load_processor
from vlskv_ray.model.swiftkv import swiftkv_backbone

LATER_IMAGE = [
    {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
    {"role": "user", "content": [{"type": "text", "text": "2+3?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "5"}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "colour?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "deep red"}]},
]
"""A question without an image, then one about an image."""


def samples() -> list[Sample]:
    return [*mixed_samples(), Sample("i", LATER_IMAGE, [picture(50, 40, 6)], kinds=("sum", "colour"))]


@pytest.fixture
def processor(teacher_folder: Callable[..., Path]) -> Any:
    return load_processor(find_model(str(teacher_folder())))


@pytest.fixture
def questions(teacher_folder: Callable[..., Path], processor: Any) -> list[Question]:
    """Of `samples`: 13, with no, one and two images, as first and as second turns."""
    return [question for i, sample in enumerate(samples()) for question in asked(sample, teacher_folder(), i)]


def asked(sample: Sample, folder: Path, row: int = 0) -> list[Question]:
    files = find_model(str(folder))
    config, processor = load_config(files), load_processor(files)
    return questions_of(sample, encode(sample, processor, config, Limits()), (0, row), config)


def held_out(*sources: Source, **options: Any) -> HeldOut:
    return HeldOut(
        sources, **{"num_samples": None, "limits": Limits(512), "batch_size": 4, "max_new_tokens": 5} | options
    )


# ---------------------------------------------------------------------------------------------------------- the samples
@pytest.mark.parametrize(
    ("num_samples", "rows"),
    [
        (4, [(0, 0), (0, 1), (0, 2), (1, 0)]),
        (None, [*((0, row) for row in range(6)), (1, 0), (1, 1)]),
        (99, [*((0, row) for row in range(6)), (1, 0), (1, 1)]),
    ],
)
def test_held_out_are_the_first_rows_of_the_mixture(num_samples: int | None, rows: list[tuple[int, int]]) -> None:
    """Each source in proportion; all rows where no number is given."""
    sources = (ShapesSource("test", 6), ShapesSource("train", 2))
    assert held_out(*sources, num_samples=num_samples).rows() == rows


def test_a_question_is_an_assistants_turn(teacher_folder: Callable[..., Path], processor: Any) -> None:
    """Its answer with the token that ends it, its prompt up to there, the images before it, its kind and its words."""
    sample = samples()[-1]
    first, second = asked(sample, teacher_folder(), 7)
    whole = processor.apply_chat_template(sample.messages)
    for question, name, kind, text, answer, num_images in (
        (first, "i#1", "sum", "2+3?", "5</s>", 0),
        (second, "i#2", "colour", "colour?", "deep red</s>", 1),
    ):
        ids = question.sample.input_ids[: question.start]
        prompt = processor.tokenizer.decode(ids[ids != processor.image_token_id])
        assert (question.id, question.kind, question.text, question.place) == (name, kind, text, (0, 7))
        assert processor.tokenizer.decode(question.answer_ids) == answer
        assert prompt == whole.replace("<image>", "").split(answer)[0] and prompt.endswith("ASSISTANT:\n")
        assert question.num_images == num_images
    [single] = asked(
        Sample("a", conversation("a?", "b", images=2), [picture(40, 30), picture(30, 60)]), teacher_folder()
    )
    assert (single.id, single.kind, single.num_images) == ("a", "", 2)


def test_samples_that_cannot_be_used_are_counted(student: Callable[..., Any], processor: Any) -> None:
    """By reason; the others are asked about."""
    source = ShapesSource("test", 8)
    place = [(0, row) for row in range(8)]
    questions, left_out, _ = read_questions(held_out(source), place, processor, student().config)
    assert len(questions) == sum(len(source.read(row).kinds) for row in range(8)) and not left_out
    few = held_out(source, limits=Limits(512, max_images_per_sample=0))
    questions, left_out, _ = read_questions(few, place, processor, student().config)
    assert {question.place[1] for question in questions} == {4} and left_out == {"too_many_images": 7}


# ---------------------------------------------------------------------------------------------------- the distributions
def reference(question: Question, teacher: Any, student: Any) -> dict[str, list[float]]:
    """Two whole passes over the question's sample alone, and the formulas token by token, in float64."""
    inputs = collate([question.sample], 0).model_inputs(tiny_config())
    found: dict[str, list[float]] = {"kl": [], "agrees": [], "teacher_ce": [], "student_ce": []}
    with torch.no_grad():
        p, q = (F.log_softmax(logits(model, inputs).double(), -1) for model, logits in (teacher, student))
    for t in range(question.start, question.stop):
        found["kl"].append(F.kl_div(q[t - 1], p[t - 1], reduction="sum", log_target=True).item())
        found["agrees"].append(p[t - 1].argmax().item() == q[t - 1].argmax().item())
        found["teacher_ce"].append(-p[t - 1, question.sample.input_ids[t]].item())
        found["student_ce"].append(-q[t - 1, question.sample.input_ids[t]].item())
    return found


def plain(model: Any, inputs: Any) -> Any:
    return model(**inputs).logits[0]


def off(model: Any, inputs: Any) -> Any:
    with toggled(model, on=False):
        return plain(model, inputs)


def on(model: Any, inputs: Any) -> Any:
    with toggled(model, on=True):
        return plain(model, inputs)


@pytest.mark.parametrize("who", ["itself", "a wider model", "a student, its SwiftKV on"])
def test_distributions_are_those_of_two_whole_passes(
    student: Callable[..., Any], teacher_folder: Callable[..., Path], questions: list[Question], who: str
) -> None:
    """For every question, whatever it is batched with; the teacher is the model itself, or another without SwiftKV."""
    model = student()
    teacher = None
    if who == "a wider model":
        teacher = build_plain(find_model(str(teacher_folder(hidden_size=48, num_hidden_layers=3))))
    elif who == "a student, its SwiftKV on":
        teacher = student("llama", num_key_value_layers=3)
        with torch.no_grad():
            teacher.lm_head.weight.mul_(1.5)
    side = (teacher or model, plain if who == "a wider model" else off)
    wanted = [reference(question, side, (model, on)) for question in questions]
    assert len({agrees for its in wanted for agrees in its["agrees"]}) == 2 or who == "a wider model"
    for batch_size in (1, 4, 100):
        got = distributions(model, questions, held_out(batch_size=batch_size), teacher)
        for its, mine in zip(wanted, got, strict=True):
            assert mine.keys() == its.keys() and mine["agrees"].tolist() == its["agrees"]
            for name in ("kl", "teacher_ce", "student_ce"):
                np.testing.assert_allclose(mine[name], its[name], rtol=1e-4, atol=2e-6)


def test_distributions_of_a_model_alone(teacher_folder: Callable[..., Path], questions: list[Question]) -> None:
    """A plain model has a cross-entropy, and no one to be compared with."""
    model = build_plain(find_model(str(teacher_folder())))
    for question, got in zip(questions, distributions(model, questions, held_out(), alone=True), strict=True):
        assert got.keys() == {"teacher_ce"}
        wanted = reference(question, (model, plain), (model, plain))["teacher_ce"]
        np.testing.assert_allclose(got["teacher_ce"], wanted, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- the answers
def alone(model: Any, processor: Any, sample: Sample, turn: int, max_new_tokens: int) -> list[int]:
    """What `generate` answers to the conversation before a turn, prepared by the stock processor."""
    before = [i for i, message in enumerate(sample.messages) if message["role"] == "assistant"][turn]
    messages = sample.messages[:before]
    count = sum(part["type"] == "image" for message in messages for part in message["content"])
    inputs = processor(
        text=processor.apply_chat_template(messages, add_generation_prompt=True),
        images=[load_image(image) for image in sample.images[:count]] or None,
        add_special_tokens=False,
        return_tensors="pt",
    )
    whole = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return list(whole[0, inputs["input_ids"].shape[1] :].tolist())


@pytest.mark.parametrize("swiftkv", [False, True])
def test_answers_are_those_of_generate_on_each_prompt_alone(
    student: Callable[..., Any], questions: list[Question], processor: Any, swiftkv: bool
) -> None:
    """Unpadded, for every batch size; an answer ends with the first token that ends it, or is cut."""
    model = student()
    prompts = [(sample, turn) for sample in samples() for turn in range(len(sample.messages) // 2)]
    with toggled(model, on=swiftkv):
        uncut = [alone(model, processor, *prompt, max_new_tokens=8) for prompt in prompts]
        often = Counter(token for ids in uncut for token in ids[1:-1]).most_common(2)
        model.generation_config.eos_token_id = [2, *(token for token, _ in often)]  # so that some answers end early
        wanted = [alone(model, processor, *prompt, max_new_tokens=8) for prompt in prompts]
        assert min(map(len, wanted)) < max(map(len, wanted)) == 8
        for batch_size in (1, 3, 100):
            options = held_out(batch_size=batch_size, max_new_tokens=8)
            answers, texts = greedy_answers(model, questions, processor, options)
            assert answers == wanted
            assert texts == [processor.decode(ids, skip_special_tokens=True).strip() for ids in wanted]


# ----------------------------------------------------------------------------------------------------------- the models
def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("group", [1, 2])
def test_before_distillation_is_a_student_freshly_built(
    student: Callable[..., Any], questions: list[Question], group: int
) -> None:
    """The same KL to the bit, then the weights and the toggle as they were, even where something goes wrong."""
    model, fresh = student(key_value_group_size=group), student(moved=False, key_value_group_size=group)
    as_it_was = bits(model)
    with pytest.raises(ZeroDivisionError), before_distillation(model), toggled(model, on=False):
        assert swiftkv_backbone(model).config.swiftkv is False
        for mine, its in zip(
            distributions(model, questions, held_out()), distributions(fresh, questions, held_out()), strict=True
        ):
            assert np.array_equal(mine["kl"], its["kl"]) and mine["kl"].max() > 0
        raise ZeroDivisionError
    assert swiftkv_backbone(model).config.swiftkv is True
    for name, weight in bits(model).items():
        assert torch.equal(weight, as_it_was[name]), name


# ---------------------------------------------------------------------------------------------------------- the measure
def test_the_teacher_keeps_all_of_itself(student: Callable[..., Any], processor: Any) -> None:
    """KL 0, every token agreed, and its whole answer, as many tokens as it has."""
    evaluator = Evaluator(student(), processor, held_out(ShapesSource("test", 6)))
    with toggled(evaluator.model, on=False):
        questions, *_ = read_questions(evaluator.held_out, evaluator.places, processor, evaluator.model.config)
        answers, texts = greedy_answers(evaluator.model, questions, processor, evaluator.held_out)
    results = evaluator.results("teacher")
    assert [result.by["teacher"].answer for result in results] == texts
    assert [result.by["teacher"].agreed_prefix for result in results] == list(map(len, answers))
    figures = figures_of(results, "teacher")
    assert (figures["kl_mean"], figures["kl_p95"], figures["top1_agreement"]) == (0, 0, 1)
    assert figures["agreed_prefix_share"] == 1


def greedily(model: Any, question: Question, ends: list[int], most: int) -> list[int]:
    """The likeliest token, again and again, by whole passes over all that is there."""
    prompt = question.sample.input_ids[: question.start]
    answer: list[int] = []
    while len(answer) < most and not set(answer) & set(ends):
        ids = np.concatenate([prompt, np.array(answer, dtype=np.int64)])
        sample = Encoded("x", ids, np.full_like(ids, IGNORE_INDEX), question.sample.images[: question.num_images])
        with torch.no_grad():
            answer.append(int(plain(model, collate([sample], 0).model_inputs(tiny_config()))[-1].argmax()))
    return answer


def test_perplexity_and_agreed_prefix_are_those_of_float64(
    student: Callable[..., Any], processor: Any, float64_norms: None
) -> None:
    """Of the teacher, and of the student before and after: answers and sums over tokens, made once more, plainly."""
    model = student(num_key_value_layers=4)
    evaluator = Evaluator(model, processor, held_out(ShapesSource("test", 3), max_new_tokens=5))
    questions, *_ = read_questions(evaluator.held_out, evaluator.places, processor, model.config)
    with toggled(model, on=False):
        uncut, _ = greedy_answers(model, questions, processor, evaluator.held_out)
    often = Counter(token for ids in uncut for token in ids[1:-1]).most_common(1)[0][0]
    ends = model.generation_config.eos_token_id = [2, often]  # so that some answers end early
    results = evaluator.results("teacher", "student_before", "student")

    exact = copy.deepcopy(model).double()
    wanted: list[list[int]] = []
    shares = []
    kept_as_it_is = contextlib.nullcontext()
    for side, state in (
        ("teacher", kept_as_it_is),
        ("student_before", before_distillation(exact)),
        ("student", kept_as_it_is),
    ):
        with state, toggled(exact, on=side != "teacher"):
            answers = [greedily(exact, question, ends, 5) for question in questions]
            losses = [reference(question, (exact, plain), (exact, plain))["teacher_ce"] for question in questions]
        wanted = wanted or answers
        lengths = [
            next((i for i, (x, y) in enumerate(zip(mine, its, strict=False)) if x != y), min(len(mine), len(its)))
            for mine, its in zip(answers, wanted, strict=True)
        ]
        figures, tokens = figures_of(results, side), [loss for losses in losses for loss in losses]
        shares.append(sum(lengths) / sum(map(len, wanted)))
        assert figures["perplexity"] == pytest.approx(math.exp(sum(tokens) / len(tokens)), rel=1e-4), side
        assert figures["agreed_prefix"] == pytest.approx(sum(lengths) / len(lengths), rel=1e-12), side
        assert figures["agreed_prefix_share"] == pytest.approx(shares[-1], rel=1e-12), side
    assert shares[0] == 1 > shares[2] > 0 and len({*map(len, wanted)}) > 1, "something is told apart"


def test_a_typical_sample_has_an_image_if_any_has(student: Callable[..., Any], processor: Any, tmp_path: Path) -> None:
    """Else it is the first of text that can be used, and there is none where none can be."""
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in (("a", " "), ("b", "c"), ("d", "e"))
    ]
    for name, kept in (("text", rows), ("unusable", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    text, unusable = (
        open_sources([SourceConfig(path=str(tmp_path / f"{name}.jsonl"))])[0] for name in ("text", "unusable")
    )
    model = student()

    def typical(*sources: Source) -> Encoded | None:
        return Evaluator(model, processor, held_out(*sources)).typical_sample()

    assert (with_image := typical(text, ShapesSource("test", 3))) and with_image.images
    assert (first := typical(text)) and first.uid == "text.jsonl:2" and not first.images
    assert typical(unusable) is None


def test_a_student_of_the_last_layer_alone_starts_as_the_teacher(student: Callable[..., Any], processor: Any) -> None:
    """There SwiftKV's weights see what the teacher's do: nothing is lost before distillation, and something after these
    weights have moved."""
    model = student(num_key_value_layers=5)
    results = Evaluator(model, processor, held_out(ShapesSource("test", 6))).results(
        "teacher", "student_before", "student"
    )
    teacher, before, after = (figures_of(results, side) for side in ("teacher", "student_before", "student"))
    assert before["kl_p95"] < 1e-9 and before["top1_agreement"] == 1 and after["kl_mean"] > 1e-4
    assert after["agreed_prefix"] < before["agreed_prefix"] == teacher["agreed_prefix"]
    assert before["cross_entropy"] == pytest.approx(teacher["cross_entropy"], rel=1e-6)


def test_an_answer_is_right_if_it_reads_as_the_reference(
    teacher_folder: Callable[..., Path], processor: Any, tmp_path: Path
) -> None:
    """Its own words are the reference of one question, other words of another; of a plain model, which has no KL."""
    model = build_plain(find_model(str(teacher_folder())))
    letters = set(processor.tokenizer("qxzk", add_special_tokens=False)["input_ids"])
    model.generation_config.suppress_tokens = sorted(set(range(300)) - letters)

    def evaluated(*answers: str) -> list[Result]:
        rows = [
            {"messages": [{"role": "user", "content": "spell"}, {"role": "assistant", "content": a}]} for a in answers
        ]
        (tmp_path / "spell.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources = open_sources([SourceConfig(path=str(tmp_path / "spell.jsonl"))])
        return Evaluator(model, processor, held_out(*sources, max_new_tokens=3)).results("sft_model")

    answer = evaluated("?")[0].by["sft_model"].answer
    results = evaluated(answer, answer[::-1] + "q")
    assert len(answer) == 3 and [result.by["sft_model"].correct for result in results] == [True, False]
    figures = figures_of(results, "sft_model")
    assert (figures["accuracy"], figures["accuracy_vision"], figures["accuracy_text"]) == (0.5, None, 0.5)
    assert figures["kl_mean"] is figures["kl_p95"] is figures["top1_agreement"] is None
    assert figures["agreed_prefix"] is figures["agreed_prefix_share"] is None
    assert figures["cross_entropy"] > 0 and figures["by_kind"] == {}


def test_workers_find_together_what_one_finds(student: Callable[..., Any], processor: Any) -> None:
    """In the same order, for 1, 2 and 3 workers and for more of them than there are samples."""
    options = held_out(ShapesSource("test", 9), max_new_tokens=2, limits=Limits(512, max_images_per_sample=1))
    model, sides = student(), ("teacher", "student")

    def together(world_size: int) -> dict[str, Any]:
        workers = [Evaluator(model, processor, options, rank=r, world_size=world_size) for r in range(world_size)]
        return evaluation_of([(w.results(*sides), w.left_out) for w in workers], sides, options)

    one = together(1)
    assert (one["samples"], one["questions"], one["left_out"]) == (8, 20, {"too_many_images": 1})
    assert one["sources"] == ["shapes/test"] and one["student"]["kl_mean"] > 1e-3
    for world_size in (2, 3, 10):
        more = together(world_size)
        for side in sides:
            assert flat(more.pop(side)) == pytest.approx(flat(one[side]), rel=1e-5)
        assert more == {name: value for name, value in one.items() if name not in sides}


def flat(figures: dict[str, Any], prefix: str = "") -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, value in figures.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


# ---------------------------------------------------------------------------------------------------------- the figures
def result(kind: str, has_image: bool, *, correct: bool, prefix: int, kl: list[float], agrees: list[bool]) -> Result:
    measured = Measured("a", correct, prefix, 10 * np.array(kl), np.array(kl), np.array(agrees), teacher_length=4)
    return Result(kind, (0, 0), kind, has_image, "q", "a", {"student": measured})


def test_figures_are_means_over_questions_and_over_tokens() -> None:
    """Answers count each the same, tokens too; by modality and by kind."""
    results = [
        result("colour", True, correct=True, prefix=4, kl=[0.0, 1.0, 2.0], agrees=[True, True, False]),
        result("colour", True, correct=False, prefix=1, kl=[7.0], agrees=[False]),
        result("sum", False, correct=True, prefix=2, kl=[5.0], agrees=[True]),
        result("", False, correct=True, prefix=3, kl=[3.0], agrees=[True]),
    ]
    figures = figures_of(results, "student")
    details = figures.pop("details")
    assert figures == {
        "accuracy": 0.75,
        "accuracy_vision": 0.5,
        "accuracy_text": 1.0,
        "kl_vision": 2.5,
        "kl_text": 4.0,
        "by_kind": {"colour": 0.5, "sum": 1.0},
        "kl_mean": 3.0,
        "kl_p95": 6.5,  # of 0 1 2 3 5 7: three quarters of the way from 5 to 7
        "top1_agreement": 4 / 6,
        "agreed_prefix": 2.5,
        "agreed_prefix_share": 10 / 16,
        "perplexity": pytest.approx(math.exp(30)),
        "cross_entropy": 30.0,
    }
    assert details["vision"] == {
        "questions": 2,
        "accuracy": 0.5,
        "kl_mean": 2.5,
        "kl_p95": pytest.approx(6.25),
        "top1_agreement": 0.5,
        "agreed_prefix": 2.5,
        "agreed_prefix_share": 5 / 8,
        "perplexity": pytest.approx(math.exp(25)),
        "cross_entropy": 25.0,
    }
    assert details["text"]["agreed_prefix"] == 2.5 and details["text"]["kl_mean"] == 4.0
    assert {kind: part["agreed_prefix"] for kind, part in details["kinds"].items()} == {"colour": 2.5, "sum": 2.0}
    assert details["kinds"]["colour"] == details["vision"]


def test_a_perplexity_that_no_float_holds_is_null() -> None:
    """The cross-entropy behind it shows still."""
    figures = figures_of([result("", False, correct=False, prefix=0, kl=[80.0], agrees=[False])], "student")
    assert (figures["cross_entropy"], figures["perplexity"]) == (800.0, None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_are_always_json(value: float) -> None:
    """Nothing measured, or a model whose logits are no numbers: then a figure is null."""
    bad = result("colour", True, correct=False, prefix=0, kl=[value, value], agrees=[False, False])
    for results in ([], [bad]):
        figures = figures_of(results, "student")
        assert json.loads(json.dumps(figures, allow_nan=False)) == figures
        assert figures["kl_mean"] is figures["kl_p95"] is figures["cross_entropy"] is figures["perplexity"] is None
        assert figures["accuracy_text"] is None and figures["details"]["text"]["questions"] == 0
    assert figures_of([], "student")["accuracy"] is None


def test_examples_show_many_kinds_with_their_pictures() -> None:
    """At most 8, of as many kinds as fit, those with images first; pictures are small PNGs."""
    source = ShapesSource("test", 32)
    results = [
        Result(
            f"{row}",
            (0, row),
            turn,
            bool(sample.images),
            "q",
            "a",
            {"student": Measured("b", False, 0, *[np.ones(1)] * 3, teacher_length=1)},
        )
        for row, sample in enumerate(map(source.read, range(32)))
        for turn in sample.kinds
    ]
    examples = examples_of(results, held_out(source))
    assert len({example["kind"] for example in examples}) == len(examples) == NUM_EXAMPLES
    by_row = {result.id: result.place[1] for result in results}
    some = [r for kind in ("sum", "two pictures", "colour") for r in results if r.kind == kind]
    for example in (*examples, *(few := examples_of(some[:2] + some[-2:], held_out(source)))):
        originals = [load_image(image) for image in source.read(by_row[example["id"]]).images]
        shown = [decoded(uri) for uri in example["images"]]
        assert [picture.size for picture in shown] == [small(picture) for picture in originals]
        assert (example["student"], example["reference"]) == ("b", "a")
    assert [example["kind"] for example in few] == ["colour", "colour", "sum", "sum"]
    assert few[1]["images"] and few[2]["images"] == []
    text = [result for result in results if not result.has_image]
    assert len(examples_of(text, held_out(source))) == NUM_EXAMPLES < len(text)


def decoded(uri: str) -> Image.Image:
    scheme, data = uri.split(",")
    assert scheme == "data:image/png;base64"
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    shown.load()
    return shown


def small(original: Image.Image) -> tuple[int, int]:
    copy = original.copy()
    copy.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
    return copy.size


def test_holding_few_samples_at_a_time_changes_nothing(
    student: Callable[..., Any], processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in parts of two samples, of eight, and again with the teacher's answers kept: the same results."""
    sides = ("teacher", "student_before", "student")
    evaluator = Evaluator(student(), processor, held_out(ShapesSource("test", 7), batch_size=2))
    progress: list[tuple[int, int]] = []
    whole = [flat(figures_of(evaluator.results(*sides), side)) for side in sides]
    monkeypatch.setattr("vlskv_ray.evaluation.evaluator.SAMPLES_HELD", 1)
    for _ in range(2):
        results = evaluator.results(*sides, on_progress=lambda *done: progress.append(done))
        for side, wanted in zip(sides, whole, strict=True):
            assert flat(figures_of(results, side)) == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    assert progress == [(2, 7), (4, 7), (6, 7), (7, 7)] * 2
