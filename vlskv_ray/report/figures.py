"""The figures of a run, read from its folder and made ready for tables.

The report page, the model card and the terminal show these rows, so that a figure reads the same everywhere. What is
missing or not a finite number shows as a dash. Texts are as the files have them: who writes them escapes them.
"""

import math
from collections.abc import Callable
from typing import Any

from vlskv_ray.report.run_files import DASH, RunFiles, at, base_name
from vlskv_ray.words import shorten

SIDE_TITLES = {
    "teacher": "teacher",
    "student_before": "student copied",
    "student_fitted": "student fitted",
    "student": "student",
    "sft_model": "model",
}
"""Who may have answered, as evaluation.json names them, with the titles of their columns; see `title`."""
STUDENTS = ("student_before", "student_fitted", "student")

Rows = list[tuple[str, list[str]]]
"""Lines of a table: a label, and a text for each column."""


# --------------------------------------------------------------------------------------------------------- the formats
def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def percent(value: Any) -> str:
    return f"{value:.1%}" if is_number(value) else DASH


def decimal(value: Any) -> str:
    return f"{value:.4g}" if is_number(value) else DASH


def whole(value: Any) -> str:
    return f"{value:,.0f}" if is_number(value) else DASH


def seconds(value: Any) -> str:
    if not is_number(value):
        return DASH
    return f"{_three_digits(value * 1000)} ms" if value < 1 else f"{_three_digits(value)} s"


def operations(value: Any) -> str:
    """Floating-point operations: 12.3 GFLOP."""
    if not is_number(value):
        return DASH
    power = min(max(int(math.log10(abs(value) or 1)) // 3, 0), 5)
    return f"{_three_digits(value / 1000**power)} {['', 'k', 'M', 'G', 'T', 'P'][power]}FLOP"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 99.5 else f"{value:,.0f}"


# ------------------------------------------------------------------------------------------------------ the evaluation
def sides(evaluation: dict[str, Any]) -> list[str]:
    """Who was measured, as keys of evaluation.json."""
    return [side for side in SIDE_TITLES if isinstance(evaluation.get(side), dict)]


def title(side: str, evaluation: dict[str, Any]) -> str:
    """Of a side's column. What made the student last, evaluation.json says of a run's own."""
    made = evaluation.get("student_is") if side == "student" else None
    return f"student {made}" if isinstance(made, str) else SIDE_TITLES[side]


def columns(evaluation: dict[str, Any]) -> list[str]:
    """Titles of the columns of `result_rows` and `kind_rows`; none where no answers were measured."""
    return [title(side, evaluation) for side in sides(evaluation)]


MEASURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("kl_mean", "KL per token, mean", decimal),
    ("kl_vision", "KL per token, with images", decimal),
    ("kl_text", "KL per token, text only", decimal),
    ("kl_p95", "KL per token, 95th percentile", decimal),
    ("top1_agreement", "top-1 agreement", percent),
    ("perplexity", "perplexity", decimal),
    ("cross_entropy", "cross-entropy", decimal),
    ("agreed_prefix", "agreed greedy prefix, tokens", decimal),
    ("agreed_prefix_share", "agreed greedy prefix, share", percent),
    ("accuracy", "accuracy", percent),
    ("accuracy_vision", "accuracy, with images", percent),
    ("accuracy_text", "accuracy, text only", percent),
)
"""What is measured of each side, the first first: what says something of any answers, then exact match."""
ACCURACIES = ("accuracy", "accuracy_vision", "accuracy_text")
OF_MODALITY = ("kl_vision", "kl_text")
"""Shown where there are both: of one alone it is the mean of all."""

LEAST_ACCURACY = 0.05
"""Of the teacher, from which on exact match is shown. Where it matches fewer references word for word, they are free
text, of which a few match by chance."""


def result_rows(evaluation: dict[str, Any]) -> Rows:
    """The result, a column for each of `columns`. Left out are measures that none of them has, accuracies where the
    teacher does not score, and the parts of a modality where there is no other."""
    has_both = all(any(is_number(evaluation[side].get(key)) for side in sides(evaluation)) for key in OF_MODALITY)
    rows = [
        (label, [form(evaluation[side].get(key)) for side in sides(evaluation)])
        for key, label, form in MEASURES
        if (key not in ACCURACIES or scores(evaluation, key)) and (key not in OF_MODALITY or has_both)
    ]
    return [(label, texts) for label, texts in rows if set(texts) - {DASH}]


def scores(evaluation: dict[str, Any], *keys: str) -> bool:
    """Whether exact match says anything of these samples: the teacher, or a model without one, has enough right.

    Args:
        evaluation: evaluation.json.
        keys: of an accuracy in what it holds of a side.
    """
    accuracy = at(evaluation, *sides(evaluation)[:1], *keys)
    return is_number(accuracy) and accuracy >= LEAST_ACCURACY


def kind_rows(evaluation: dict[str, Any]) -> Rows:
    """Accuracy by kind of question, each with the number of questions, a column for each of `columns`. Left out are
    kinds on which the teacher does not score."""
    measured = [evaluation[side] for side in sides(evaluation)]
    kinds = sorted({kind for side in measured for kind in at(side, "by_kind") or {}})
    return [
        (
            f"{kind} ({whole(at(measured[0], 'details', 'kinds', kind, 'questions'))})",
            [percent(at(side, "by_kind", kind)) for side in measured],
        )
        for kind in kinds
        if scores(evaluation, "by_kind", kind)
    ]


def kept(evaluation: dict[str, Any], measure: str) -> str:
    """The student's accuracy, of all questions or of those of a modality, over the teacher's."""
    mine, its = (at(evaluation, side, measure) for side in ("student", "teacher"))
    return percent(mine / its) if is_number(mine) and is_number(its) and its else DASH


def held_out(run: RunFiles) -> str:
    """What was measured on, or why no answers were: one sentence."""
    evaluation = run.evaluation
    measured = sides(evaluation)
    if not evaluation:
        return "This run was not evaluated."
    if not measured:
        return "No held-out samples were given (evaluation.sources), so answers were not measured."
    samples, questions = (whole(evaluation.get(key)) for key in ("samples", "questions"))
    details = at(evaluation, measured[0], "details")
    parts = [whole(at(details, part, "questions")) for part in ("vision", "text")]
    left_out = ", ".join(f"{whole(count)} {reason}" for reason, count in (evaluation.get("left_out") or {}).items())
    sentence = (
        f"{questions} questions ({parts[0]} with images, {parts[1]} text only) of {samples} held-out samples from "
        f"{', '.join(map(str, evaluation.get('sources') or [DASH]))}; left out: {left_out or 'none'}."
    )
    return f"{sentence} {note}" if (note := answers_note(evaluation)) else sentence


def answers_note(evaluation: dict[str, Any]) -> str:
    """What a reader must know of the greedy answers, if anything: where they were cut, and why no accuracy is shown."""
    notes, measured = [], sides(evaluation)
    if is_number(most := evaluation.get("max_new_tokens")):
        notes.append(f"Greedy answers of at most {whole(most)} tokens.")
    if measured and at(evaluation, measured[0], "accuracy") == 0:
        who = "the model's" if measured[0] == "sft_model" else "the teacher's"
        notes.append(f"None of {who} matches its reference word for word, so no accuracy is shown.")
    return " ".join(notes)


# ------------------------------------------------------------------------------------------------------- the examples
def answer_pairs(evaluation: dict[str, Any], num_pairs: int, most: int) -> list[Rows]:
    """Some examples to read: of each the question, then the greedy answer of every side that has one.

    Args:
        evaluation: evaluation.json.
        num_pairs: how many of its examples, the first ones; they are of as many kinds as there are.
        most: characters of a text, which is cut where it has more.
    """
    pairs = []
    for example in (evaluation.get("examples") or [])[:num_pairs]:
        pictures = len(example.get("images") or [])
        question = "question" + (f", {pictures} images" if pictures > 1 else ", 1 image" if pictures else "")
        lines = [(question, example.get("question"))]
        lines += [(title(side, evaluation), example[side]) for side in SIDE_TITLES if side in example]
        pairs.append([(label, [shorten(DASH if text is None else str(text), most)]) for label, text in lines])
    return pairs


# --------------------------------------------------------------------------------------------------------- the savings
SAVINGS_COLUMNS = ["teacher", "student", "ratio"]
SAVINGS: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
    ("prefill operations", "prefill_flops", "prefill_flops_ratio", operations),
    ("prefill CPU time", "prefill_cpu_seconds", "prefill_cpu_time_ratio", seconds),
    ("prefill time", "prefill_seconds", "prefill_time_ratio", seconds),
    ("cache bytes per token", "cache_bytes_per_token", "cache_bytes_ratio", whole),
)
MOST_DISAGREEMENT = 1.5
"""The factor between a ratio of times and that of operations above which a reader is warned. At prompts of 1,024 and
2,048 tokens CPU time came within 1.25 of the operations, even of the smallest models and on two cores with six times
their work, where a clock was off by 2.4. Prompts of 64 tokens on the smallest models come to 1.8, where it is true that
the operations do not say how long a prefill takes, and threads that wait for each other on a busy machine to 3."""


def savings_rows(evaluation: dict[str, Any]) -> Rows:
    """What the student saves at the longest prompt, under `SAVINGS_COLUMNS`; none where it was not measured."""
    savings = at(evaluation, "savings")
    if not isinstance(savings, dict):
        return []
    rows = []
    for label, name, ratio, form in SAVINGS:
        values = [_at_longest(savings.get(f"{side}_{name}")) for side in ("teacher", "student")]
        share = savings.get(ratio)
        texts = [*map(form, values), f"{share:.2f}" if is_number(share) else DASH]
        if name != "prefill_cpu_seconds" or set(texts) - {DASH}:  # not of runs on a GPU, nor of older ones
            rows.append((label, texts))
    rows.append(("parameters", ["", whole(savings.get("parameters")), ""]))
    rows.append(("trained parameters", ["", whole(savings.get("trainable_parameters")), ""]))
    return rows


def savings_note(evaluation: dict[str, Any], *, briefly: bool = False) -> str:
    """What `savings_rows` were measured on, and how: two sentences, `briefly` the first."""
    length, threads = (whole(at(evaluation, "savings", key)) for key in ("prompt_length", "threads"))
    where = "on a GPU" if at(evaluation, "savings", "device") == "cuda" else f"with threads: {threads}"
    images = at(evaluation, "savings", "prompt_images")
    of = {None: "", 0: " of text", 1: ", 1 image among them"}.get(images, f", {whole(images)} images among them")
    times = "Teacher and student in turn, medians"
    if at(evaluation, "savings", "prefill_cpu_time_ratio") is not None:
        times += "; CPU time is that of all threads of the process"
    on = f"Prefill of a prompt of {length} tokens{of}, {where}."
    return on if briefly else f"{on} {times}."


def savings_warning(evaluation: dict[str, Any]) -> str:
    """One sentence where a measured time disagrees with the counted operations; empty where none does."""
    counted = at(evaluation, "savings", "prefill_flops_ratio")
    measured = {label: at(evaluation, "savings", name) for label, _, name, _ in SAVINGS if "time" in label}
    wrong = [
        f"{label} ({ratio:.2f})"
        for label, ratio in measured.items()
        if is_number(ratio)
        and is_number(counted)
        and not counted / MOST_DISAGREEMENT <= ratio <= counted * MOST_DISAGREEMENT
    ]
    if not wrong:
        return ""
    return (
        f"Warning: the ratio of {' and '.join(wrong)} is more than a factor of {MOST_DISAGREEMENT} off that of the "
        f"operations ({counted:.2f}): the machine was busy, or model and prompt are so small that other things than "
        f"these operations take the time."
    )


def _at_longest(values: Any) -> Any:
    return (values[-1] if values else None) if isinstance(values, list) else values


# ------------------------------------------------------------------------------------------------------------- the run
def headline(run: RunFiles) -> Rows:
    """The few figures that say how the run went, the first first; those that were not measured are left out."""
    evaluation, saved = run.evaluation, at(run.evaluation, "savings", "prefill_flops_ratio")
    if not run.objective.has_student:
        side = run.objective.trained_side
        rows = [
            ("cross-entropy", decimal(at(evaluation, side, "cross_entropy"))),
            ("perplexity", decimal(at(evaluation, side, "perplexity"))),
            ("accuracy", percent(at(evaluation, side, "accuracy")) if scores(evaluation, "accuracy") else DASH),
        ]
    else:
        rows = [
            ("mean KL", _on_the_way(evaluation, "kl_mean", decimal)),
            ("top-1 agreement", _on_the_way(evaluation, "top1_agreement", percent)),
            ("perplexity, teacher / student", _beside_teacher(evaluation, "perplexity", decimal)),
            ("agreed greedy prefix", _on_the_way(evaluation, "agreed_prefix_share", percent)),
            ("prefill operations saved", percent(1 - saved) if is_number(saved) else DASH),
            ("accuracy kept", kept(evaluation, "accuracy") if scores(evaluation, "accuracy") else DASH),
        ]
    rows.append(("training", seconds(at(run.summary, "training_seconds"))))
    return [(label, [text]) for label, text in rows if text != DASH]


def _on_the_way(evaluation: dict[str, Any], key: str, form: Callable[[Any], str]) -> str:
    """A student's figure copied, fitted and at its end, as far as they are known: 1.9 → 0.12 → 0.012."""
    known = [form(at(evaluation, side, key)) for side in STUDENTS]
    return DASH if known[-1] == DASH else " → ".join(text for text in known if text != DASH)


def _beside_teacher(evaluation: dict[str, Any], key: str, form: Callable[[Any], str]) -> str:
    """The teacher's figure and the student's: 4.1 / 4.3."""
    its, mine = (form(at(evaluation, side, key)) for side in ("teacher", "student"))
    return mine if DASH in (its, mine) else f"{its} / {mine}"


def training_rows(run: RunFiles) -> Rows:
    """How the model was made."""
    config, summary = run.config, run.summary
    layers, first, group = (
        whole(at(run.evaluation, "model", key) or at(config, "model", key))
        for key in ("num_hidden_layers", "num_key_value_layers", "key_value_group_size")
    )
    swiftkv = f"from text layer {first}" + (f" of {layers}" if layers != DASH else "") + f", in groups of {group}"
    rejected = at(summary, "rejected")
    facts = [
        ("objective", run.objective.description if config else DASH),
        ("from", run.model + (f", revision {summary['revision']}" if at(summary, "revision") else "")),
        ("SwiftKV", swiftkv if first != DASH and run.objective.has_student else DASH),
        *((f"{how} weights", _weights(at(summary, "parameters", how))) for how in ("trained", "frozen")),
        ("data", "; ".join(map(_source, at(config, "data", "sources") or [])) or DASH),
        ("samples", whole(at(summary, "data", "samples"))),
        ("rows left out", whole(sum(rejected.values())) if isinstance(rejected, dict) else DASH),
        ("steps", whole(at(summary, "steps"))),
        ("temperature", decimal(at(config, "temperature")) if run.objective.name == "distill" else DASH),
        ("learning rate", _learning_rate(at(config, "optimizer"))),
        ("training", seconds(at(summary, "training_seconds"))),
    ]
    return [(label, [text]) for label, text in facts if text != DASH]


def _weights(sizes: Any) -> str:
    """How many weights of which parts of a model: 10 vision_tower, 20 text."""
    texts = [f"{whole(size)} {part}" for part, size in sizes.items()] if isinstance(sizes, dict) else []
    return ", ".join(texts) or DASH


def _learning_rate(optimizer: Any) -> str:
    """The learning rate, and those of parts that have their own."""
    own = at(optimizer, "learning_rates")
    of_parts = [f"{decimal(rate)} {part}" for part, rate in own.items() if is_number(rate)] if own else []
    return ", ".join([decimal(at(optimizer, "lr")), *of_parts])


def _source(source: Any) -> str:
    if not isinstance(source, dict):
        return base_name(str(source))
    name = f"{source['name']} ({source.get('split')})" if source.get("name") else base_name(str(source.get("path")))
    weight = source.get("weight")
    return name + (f", weight {decimal(weight)}" if weight not in (None, 1) else "")


def environment_rows(run: RunFiles) -> Rows:
    """What the run ran on: versions and machine."""
    machine = at(run.summary, "environment") or {}
    labels = {"python": "Python", "cpus": "CPUs", "threads": "threads per worker"}
    rows = [(labels.get(name, name), [str(value)]) for name, value in machine.items() if value is not None]
    return rows + [(name, [str(value)]) for name, value in (at(run.summary, "versions") or {}).items()]
