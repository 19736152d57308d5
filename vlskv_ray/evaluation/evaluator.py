"""What a student kept of its teacher on held-out samples: its greedy answers, and the distributions behind them.

Up to four models answer side by side: the teacher, the student whose SwiftKV weights are copies of the teacher's, the
one that is fitted, and the student itself. It knows neither Ray nor the config; workers each take their share of the
samples.

Shapes: T tokens, D hidden, V vocabulary, n supervised positions of a batch.
"""

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vlskv_ray.data.collate import IGNORE_INDEX, Encoded, collate, supervised_positions
from vlskv_ray.data.images import load_image
from vlskv_ray.data.questions import HeldOut, Question, read_questions
from vlskv_ray.data.sample import Sample
from vlskv_ray.evaluation.generation import as_text, generate_answers
from vlskv_ray.model.swiftkv import SwiftKVPass, has_swiftkv, swiftkv_backbone
from vlskv_ray.training.distill import kl_divergence, rows_per_chunk, shared_pass
from vlskv_ray.training.fit import set_weights

FITTED = "student_fitted"
"""The side that is the student as it was fitted, before it was trained."""
NUM_EXAMPLES = 8
SAMPLES_HELD = 8
"""Batches of samples that are held prepared at a time: enough to sort by length, few enough for memory."""
EXAMPLE_SIDE = 192
"""Pixels of the longer side of an example's picture."""


@dataclass(frozen=True)
class Measured:
    """One question answered by one model; arrays are per token of the reference answer."""

    answer: str
    correct: bool
    agreed_prefix: int | None
    """Tokens at the start of the greedy answer that are the teacher's too."""
    cross_entropy: NDArray[np.float64]
    kl: NDArray[np.float64] | None
    """KL(teacher || this), in nats, at temperature 1."""
    agrees: NDArray[np.bool_] | None
    """Whether its likeliest token is the teacher's."""
    teacher_length: int | None
    """Tokens of the teacher's greedy answer, of which `agreed_prefix` is a part."""


@dataclass(frozen=True)
class Result:
    """A question with its answers by `teacher`, `student_before`, `student_fitted` and `student`, or by `sft_model`."""

    id: str
    place: tuple[int, int]
    kind: str
    has_image: bool
    question: str
    reference: str
    by: dict[str, Measured]


def sides_with(sides: Sequence[str], *, fitted: bool) -> tuple[str, ...]:
    """The sides that answer, the student's own the last; before it that of the fitted student, if there is one."""
    return (*sides[:-1], *([FITTED] if fitted else []), sides[-1])


# ----------------------------------------------------------------------------------------------------------- the models
@contextmanager
def toggled(model: Any, on: bool) -> Iterator[None]:
    """The model as student (on) or as teacher (off); as it was, afterwards."""
    config = swiftkv_backbone(model).config
    before, config.swiftkv = config.swiftkv, on
    try:
        yield
    finally:
        config.swiftkv = before


def as_teacher(model: Any) -> AbstractContextManager[None]:
    """A model as it answers without SwiftKV, whether it has it or not."""
    return toggled(model, on=False) if has_swiftkv(model.config) else nullcontext()


@contextmanager
def before_distillation(model: Any, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """The student whose SwiftKV weights are copies of the teacher's, but for those given by name. As it was,
    afterwards."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if "_swiftkv" in name}
    try:
        swiftkv_backbone(model).start_from_teacher()
        set_weights(model, weights or {})
        yield
    finally:
        set_weights(model, kept)


# ---------------------------------------------------------------------------------------------------------- the answers
def batches(questions: Sequence[Question], size: int) -> Iterator[list[int]]:
    """Indices of questions with prompts of like length and number of images."""
    order = sorted(range(len(questions)), key=lambda i: (questions[i].num_images, questions[i].start))
    yield from (order[at : at + size] for at in range(0, len(order), size))


def greedy_answers(
    model: Any, questions: Sequence[Question], processor: Any, held_out: HeldOut
) -> tuple[list[list[int]], list[str]]:
    """The greedy answer to each question as token ids, the one that ends it included, and as text.

    Prompts are the sample's own tokens up to the answer, padded on the left.
    """
    answers: list[list[int]] = [[] for _ in questions]
    for of_batch in batches(questions, held_out.batch_size):
        prompts = [prompt_of(questions[i]) for i in of_batch]
        generated = generate_answers(model, prompts, processor.tokenizer, held_out.max_new_tokens)
        for i, ids in zip(of_batch, generated, strict=True):
            answers[i] = ids
    return answers, [as_text(processor, ids) for ids in answers]


def prompt_of(question: Question) -> Encoded:
    """What comes before the answer, as a sample of its own."""
    ids = question.sample.input_ids[: question.start]
    images = question.sample.images[: question.num_images]
    return Encoded(question.id, ids, np.full_like(ids, IGNORE_INDEX), images)


# ---------------------------------------------------------------------------------------------------- the distributions
@torch.inference_mode()
def distributions(
    model: Any, questions: Sequence[Question], held_out: HeldOut, teacher: Any = None, alone: bool = False
) -> list[dict[str, NDArray[Any]]]:
    """Of each question, per token of its reference answer: `kl`, `agrees`, `teacher_ce` and `student_ce`.

    Args:
        model: with a SwiftKV backbone, teacher and student at once; a plain one where it is `alone`.
        questions: of whole samples: a sample's questions stand side by side.
        held_out: says how many samples a batch has.
        teacher: another model that is the teacher.
        alone: there is no student: only `teacher_ce` is measured.
    """
    samples = list({id(question.sample): question.sample for question in questions}.values())
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].input_ids))
    found: dict[int, dict[str, NDArray[Any]]] = {}
    for at in range(0, len(order), held_out.batch_size):
        of_batch = [samples[i] for i in order[at : at + held_out.batch_size]]
        batch = collate(of_batch, 0).to(model.device)
        keep = supervised_positions(batch.labels)
        targets = batch.labels[:, 1:][keep[:, :-1]]
        teacher_head = (teacher or model).get_output_embeddings()
        student_hidden: Tensor | None = None
        if alone or teacher is not None:
            with as_teacher(teacher or model):
                inputs = batch.model_inputs((teacher or model).config)
                whole = (teacher or model).base_model(**inputs, use_cache=False)
            teacher_hidden = whole.last_hidden_state[keep]  # [n, D]
            if not alone:
                one_side = SwiftKVPass(keep=keep)
                student_hidden = model.base_model(
                    **batch.model_inputs(model.config), use_cache=False, swiftkv=one_side
                ).last_hidden_state[0]
        else:
            states = shared_pass(model, batch)
            student_hidden, teacher_hidden = states.student, states.teacher
        columns = _columns(model.get_output_embeddings(), teacher_head, student_hidden, teacher_hidden, targets)
        per_sample = keep.sum(1).tolist()
        for sample, *parts in zip(of_batch, *(c.split(per_sample) for c in columns.values()), strict=True):
            found[id(sample)] = dict(zip(columns, (part.numpy() for part in parts), strict=True))
    taken: Counter[int] = Counter()
    results = []
    for question in questions:  # a sample's supervised tokens are its answers', one after another
        first = taken[id(question.sample)]
        taken[id(question.sample)] = last = first + question.stop - question.start
        results.append({name: values[first:last] for name, values in found[id(question.sample)].items()})
    return results


def _columns(
    head: Any, teacher_head: Any, student: Tensor | None, teacher: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Per supervised position, float64[n] and bool[n] on the CPU; logits are made in chunks of rows."""
    columns: dict[str, list[Tensor]] = {}
    rows = rows_per_chunk(head.weight.shape[0], logits_memory_mib=256)
    for start in range(0, len(targets), rows):
        chunk = slice(start, start + rows)
        teacher_logits = teacher_head(teacher[chunk].to(teacher_head.weight.dtype)).float()
        values = {"teacher_ce": F.cross_entropy(teacher_logits, targets[chunk], reduction="none").double()}
        if student is not None:
            student_logits = head(student[chunk].to(head.weight.dtype)).float()
            values["student_ce"] = F.cross_entropy(student_logits, targets[chunk], reduction="none").double()
            values["kl"] = kl_divergence(student_logits, teacher_logits, temperature=1.0)[0].double()
            values["agrees"] = student_logits.argmax(-1) == teacher_logits.argmax(-1)
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return {name: torch.cat(parts).cpu() for name, parts in columns.items()}


# ---------------------------------------------------------------------------------------------------------- the measure
class Evaluator:
    """A worker's share of the held-out samples, and what models answer to them."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        held_out: HeldOut,
        *,
        rank: int = 0,
        world_size: int = 1,
        teacher: Any = None,
        fitted: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:
        """
        Args:
            model: a SwiftKV model, or a plain one that is measured alone.
            processor: its own.
            held_out: the same on every worker.
            rank, world_size: which share of the samples is this worker's.
            teacher: another model that is the teacher; None: the model itself with SwiftKV off.
            fitted: the weights in which the side "student_fitted" differs from "student_before".
        """
        self.fitted = fitted
        self.model, self.processor, self.held_out, self.teacher = model, processor, held_out, teacher
        rows = held_out.rows()
        self.places = rows[rank::world_size]
        self.largest_share = -(-len(rows) // world_size)
        """Of any worker: as many parts as these are `results` measured in, on every worker."""
        self.left_out: Counter[str] = Counter()
        """Samples that could not be used when they were last read, by reason."""
        self.example: dict[str, Any] | None = None
        """The first of them that was read."""
        self.refused: list[dict[str, Any]] = []
        """The refused ones that have been read, see `left_out` of data/sample.py."""
        self._of_teacher: dict[str, tuple[list[int], str]] = {}  # kept: it does not change as the student does

    def typical_sample(self) -> Encoded | None:
        """The first one with an image, else the first one; None where none can be used."""
        self.left_out = Counter()
        first: Encoded | None = None
        for place in self.places:
            for question in self._read([place])[:1]:
                if question.sample.images:
                    return question.sample
                first = first or question.sample
        return first

    def results(self, *sides: str, on_progress: Callable[[int, int], None] | None = None) -> list[Result]:
        """Every question with what each side makes of it. Few samples are held at a time.

        Args:
            sides: of "teacher", "student_before", "student_fitted" and "student", or "sft_model" for a plain model.
            on_progress: told how many of how many samples are done, as often on every worker; what it raises ends it.
        """
        self.left_out = Counter()
        results: list[Result] = []
        size = SAMPLES_HELD * self.held_out.batch_size
        for start in range(0, self.largest_share, size):
            questions = self._read(self.places[start : start + size])
            references = [as_text(self.processor, question.answer_ids) for question in questions]
            measured = {side: self._measure(side, questions, references) for side in sides}
            for i, (question, reference) in enumerate(zip(questions, references, strict=True)):
                by_side = {side: measured[side][i] for side in sides}
                has_image = question.num_images > 0
                results.append(
                    Result(question.id, question.place, question.kind, has_image, question.text, reference, by_side)
                )
            if on_progress:
                on_progress(min(start + size, len(self.places)), len(self.places))
        return results

    def _read(self, places: Sequence[tuple[int, int]]) -> list[Question]:
        questions, left_out, rejected = read_questions(self.held_out, places, self.processor, self.model.config)
        self.left_out += left_out
        self.example = self.example or next(iter(rejected), None)
        self.refused += [row for row in rejected if row.get("refused")]
        return questions

    def _measure(self, side: str, questions: Sequence[Question], references: Sequence[str]) -> list[Measured]:
        if side in ("student_before", FITTED):
            with before_distillation(self.model, self.fitted() if side == FITTED else None):
                return self._measure("student", questions, references)
        wanted: Sequence[list[int] | None]
        if side == "sft_model":
            answers, texts = greedy_answers(self.model, questions, self.processor, self.held_out)
            pairs = distributions(self.model, questions, self.held_out, alone=True)
            wanted = [None] * len(questions)
        elif side == "teacher":
            answers, texts = self._teacher_answers(questions)
            pairs = distributions(self.teacher or self.model, questions, self.held_out, alone=True)
            of_itself = [np.zeros_like(pair["teacher_ce"]) for pair in pairs]
            pairs = [{**pair, "kl": zero, "agrees": zero == 0} for pair, zero in zip(pairs, of_itself, strict=True)]
            wanted = answers
        else:
            wanted, _ = self._teacher_answers(questions)
            with toggled(self.model, on=True):
                answers, texts = greedy_answers(self.model, questions, self.processor, self.held_out)
            pairs = distributions(self.model, questions, self.held_out, self.teacher)
        cross_entropy = "student_ce" if side == "student" else "teacher_ce"
        return [
            Measured(
                answer=text,
                correct=text == reference,
                agreed_prefix=None if its is None else common_prefix(mine, its),
                cross_entropy=pair[cross_entropy],
                kl=pair.get("kl"),
                agrees=pair.get("agrees"),
                teacher_length=None if its is None else len(its),
            )
            for mine, its, text, reference, pair in zip(answers, wanted, texts, references, pairs, strict=True)
        ]

    def _teacher_answers(self, questions: Sequence[Question]) -> tuple[list[list[int]], list[str]]:
        if any(question.id not in self._of_teacher for question in questions):
            model = self.teacher or self.model
            with as_teacher(model):
                answers, texts = greedy_answers(model, questions, self.processor, self.held_out)
            for question, ids, text in zip(questions, answers, texts, strict=True):
                self._of_teacher[question.id] = (ids, text)
        known = [self._of_teacher[question.id] for question in questions]
        return [ids for ids, _ in known], [text for _, text in known]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two answers begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------------------------------------------------- the figures
def evaluation_of(
    shares: Sequence[tuple[list[Result], Counter[str]]], sides: Sequence[str], held_out: HeldOut
) -> dict[str, Any]:
    """What evaluation.json says of answers: each side's figures, and examples; of every worker's results."""
    results = [result for of_worker, _ in shares for result in of_worker]
    results.sort(key=lambda result: result.place)
    return {
        **{side: figures_of(results, side) for side in sides},
        "samples": len({result.place for result in results}),
        "questions": len(results),
        "left_out": dict(sum((left_out for _, left_out in shares), Counter())),
        "max_new_tokens": held_out.max_new_tokens,
        "sources": [source.name for source in held_out.sources],
        "examples": examples_of(results, held_out),
    }


def figures_of(results: Sequence[Result], side: str) -> dict[str, Any]:
    """One side's figures: over all questions, by modality and by kind of question. None where there is nothing."""
    whole = _figures([result.by[side] for result in results])
    parts = {
        name: _figures([result.by[side] for result in results if result.has_image == with_image])
        for name, with_image in (("vision", True), ("text", False))
    }
    kinds = sorted({result.kind for result in results} - {""})
    by_kind = {kind: _figures([result.by[side] for result in results if result.kind == kind]) for kind in kinds}
    return {
        "accuracy": whole["accuracy"],
        "accuracy_vision": parts["vision"]["accuracy"],
        "accuracy_text": parts["text"]["accuracy"],
        "kl_vision": parts["vision"]["kl_mean"],
        "kl_text": parts["text"]["kl_mean"],
        "by_kind": {kind: figures["accuracy"] for kind, figures in by_kind.items()},
        **{name: value for name, value in whole.items() if name not in ("accuracy", "questions")},
        "details": {**parts, "kinds": by_kind},
    }


def _figures(measured: Sequence[Measured]) -> dict[str, Any]:
    kl = _joined([m.kl for m in measured if m.kl is not None])
    agrees = [m.agrees for m in measured if m.agrees is not None]
    prefixes = [m.agreed_prefix for m in measured if m.agreed_prefix is not None]
    teacher_tokens = sum(m.teacher_length or 0 for m in measured)
    cross_entropy = mean(_joined([m.cross_entropy for m in measured]))
    return {
        "questions": len(measured),
        "accuracy": mean([m.correct for m in measured]),
        "kl_mean": mean(kl),
        "kl_p95": percentile_95(kl),
        "top1_agreement": mean(_joined(agrees)),
        "agreed_prefix": mean(prefixes),
        "agreed_prefix_share": sum(prefixes) / teacher_tokens if teacher_tokens else None,
        "perplexity": None if cross_entropy is None else perplexity(cross_entropy),
        "cross_entropy": cross_entropy,
    }


def perplexity(cross_entropy: float) -> float | None:
    """Of how many tokens, all as likely, it would be as unsure; None where no float holds it."""
    with np.errstate(over="ignore"):
        return _finite(np.exp(cross_entropy))


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0)


def mean(values: Any) -> float | None:
    """None of nothing, or where it is not finite."""
    return _finite(np.mean(values)) if len(values) else None


def percentile_95(values: NDArray[Any]) -> float | None:
    """Likewise."""
    with np.errstate(invalid="ignore"):  # between two infinities it is no number
        return _finite(np.percentile(values, 95)) if len(values) else None


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None  # JSON has no word for the others


def examples_of(results: Sequence[Result], held_out: HeldOut) -> list[dict[str, Any]]:
    """Questions to show, of as many kinds as fit, most of them about images where there are any, with their pictures as
    data URIs."""
    in_turn = {with_image: _kinds_in_turn(results, with_image) for with_image in (True, False)}
    num_text = max(NUM_EXAMPLES - len(in_turn[True]), NUM_EXAMPLES // 4)
    text = in_turn[False][:num_text]
    chosen = [*in_turn[True][: NUM_EXAMPLES - len(text)], *text]
    return [
        {
            "id": result.id,
            "kind": result.kind,
            "question": result.question,
            "reference": result.reference,
            **{side: measured.answer for side, measured in result.by.items()},
            "images": _pictures(held_out.sources[result.place[0]].read(result.place[1])) if result.has_image else [],
        }
        for result in chosen
    ]


def _kinds_in_turn(results: Sequence[Result], with_image: bool) -> list[Result]:
    """The first of every kind of question, then the second ones, and so on: as many as are ever shown."""
    by_kind: dict[str, list[Result]] = {}
    for result in results:
        if result.has_image == with_image:
            by_kind.setdefault(result.kind, []).append(result)
    groups = [by_kind[kind] for kind in sorted(by_kind)]
    in_turn = [group[nth] for nth in range(NUM_EXAMPLES) for group in groups if nth < len(group)]
    return in_turn[:NUM_EXAMPLES]


def _pictures(sample: Sample) -> list[str]:
    return [_data_uri(load_image(image)) for image in sample.images]


def _data_uri(pixels: Any) -> str:
    picture = pixels.copy()
    picture.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG")
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
