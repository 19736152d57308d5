"""Distillation: one pass for teacher and student, and its loss terms as sums and counts.

The vision tower, the projector and the layers below N are frozen and shared, so they run once. Above N the student
takes keys and values from the input of layer N only, so its queries, MLPs and logits are needed just at supervised
positions, as is the teacher's last layer; none of this changes a gradient (SwiftKV, arXiv 2410.03960).

Shapes: B samples, T tokens, D hidden, V vocabulary, n supervised positions of the micro-batch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlskv_ray.data.collate import Batch, FrozenStates, supervised_positions
from vlskv_ray.data.teacher_cache import TeacherCache
from vlskv_ray.model.swiftkv import SwiftKVPass, swiftkv_backbone

ELEMENTS_IN_CACHE = 2**18
"""Of float32: 1 MiB, which with what is computed from them is about what a core's own cache holds."""
BLOCK = 256
"""Of neighbouring tokens of the vocabulary."""


@dataclass(frozen=True)
class DistillationLoss:
    """What the loss of a supervised position is made of."""

    temperature: float = 2.0
    vision_loss_weight: float = 1.0
    text_loss_weight: float = 1.0
    hidden_loss_weight: float = 0.0
    logits_memory_mib: int = 96
    cache: TeacherCache | None = None
    """Where the frozen states of every batch that comes without them are kept."""

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor | None, "LossSums"]:
        """`distillation_loss` with these weights."""
        return distillation_loss(model, batch, self)


@dataclass
class LossSums:
    """Sums over supervised positions and samples; Python floats, so float64. They add up over any split of a batch.

    `ce_*` are those of `objective: sft`; `kl_*`, `hidden`, `teacher_ce` and `student_ce` those of distillation.
    """

    loss: float = 0.0
    kl_vision: float = 0.0
    kl_text: float = 0.0
    ce_vision: float = 0.0
    ce_text: float = 0.0
    hidden: float = 0.0
    teacher_ce: float = 0.0
    student_ce: float = 0.0
    top1: float = 0.0
    tokens_vision: float = 0.0
    tokens_text: float = 0.0
    samples: float = 0.0
    tokens: float = 0.0
    rejected: float = 0.0
    notices: float = 0.0
    cached: float = 0.0
    """Samples whose frozen states came from the teacher cache."""

    @property
    def supervised_tokens(self) -> float:
        return self.tokens_vision + self.tokens_text

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def to_tensor(self) -> Tensor:
        return torch.tensor([getattr(self, f.name) for f in fields(self)], dtype=torch.float64)

    @staticmethod
    def from_tensor(values: Tensor) -> "LossSums":
        return LossSums(*values.tolist())


@dataclass(frozen=True)
class States:
    """Student and teacher at the n supervised positions of a batch, float[n, D] each; the student's with a graph."""

    student: Tensor
    """After the final norm."""
    teacher: Tensor
    student_input: Tensor
    """As it enters the last layer."""
    teacher_input: Tensor
    trunk: Tensor
    """Of all tokens, float[all tokens, D], as they enter layer N."""


def shared_pass(model: Any, batch: Batch) -> States:
    """Teacher and student by one forward."""
    swiftkv = SwiftKVPass(keep=supervised_positions(batch.labels), distill=True)
    teacher = model.base_model(**batch.model_inputs(model.config), use_cache=False, swiftkv=swiftkv).last_hidden_state
    assert swiftkv.student is not None and swiftkv.trunk is not None
    assert swiftkv.student_input is not None and swiftkv.teacher_input is not None
    # SwiftKVPass packs the samples of a batch into one row
    states = (swiftkv.student, teacher, swiftkv.student_input, swiftkv.teacher_input, swiftkv.trunk)
    return States(*(x[0] for x in states))


@torch.no_grad()
def frozen_states(model: Any, batch: Batch, layers: Iterable[int]) -> dict[int, FrozenStates]:
    """What students with any of these N need of the frozen part of the model, by one forward of the teacher alone.

    The teacher is the same for all of them, and what enters its layer N is the trunk of a student with that N. `model`
    may be built with any N up to these: its own student does not run.
    """
    trunks: dict[int, Tensor] = {}
    backbone = swiftkv_backbone(model)

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            trunks[layer] = arguments[0][0]

        return backbone.layers[layer].register_forward_pre_hook(hook)

    handles = [keep(layer) for layer in layers]
    try:
        swiftkv = SwiftKVPass(keep=supervised_positions(batch.labels), distill=True, teacher_alone=True)
        teacher = model.base_model(**batch.model_inputs(model.config), use_cache=False, swiftkv=swiftkv)
    finally:
        for handle in handles:
            handle.remove()
    assert swiftkv.teacher_input is not None
    states = teacher.last_hidden_state[0], swiftkv.teacher_input[0]
    return {layer: FrozenStates(trunk, *states) for layer, trunk in trunks.items()}


def cached_pass(model: Any, batch: Batch) -> States:
    """The same for a batch whose frozen states are known: only the student's layers run, at supervised positions."""
    assert batch.trunk is not None and batch.teacher is not None and batch.teacher_input is not None
    swiftkv = SwiftKVPass(keep=supervised_positions(batch.labels))
    backbone = swiftkv_backbone(model)
    student = backbone.from_trunk(batch.trunk[None], batch.attention_mask.bool(), swiftkv)
    assert swiftkv.student_input is not None
    return States(student[0], batch.teacher, swiftkv.student_input[0], batch.teacher_input, batch.trunk)


@dataclass(frozen=True)
class Softened:
    """A softmax at some temperature of rows of logits, and what the loss needs beside it, by few passes over them: of
    large vocabularies these passes, not the matrix products, are what takes time."""

    scaled: Tensor
    """(logits - their largest) / temperature, float[n, V]."""
    probabilities: Tensor
    """float[n, V]."""
    log_total: Tensor
    """Logarithm of the sum of exp(scaled), float64[n, 1]: what float32 rounds off it would swamp a small KL."""
    likeliest: Tensor
    """The token with the largest logit, int64[n]."""

    def cross_entropy(self, targets: Tensor, temperature: float) -> Tensor:
        """At temperature 1, float[n]: exp(logit) is exp(scaled) to the power of the temperature."""
        if temperature == 2:
            powers = torch.linalg.vector_norm(self.probabilities, dim=-1).square()
        elif temperature == 1:
            powers = self.probabilities.sum(-1)
        else:
            powers = self.probabilities.pow(temperature).sum(-1)
        of_targets = self.scaled.gather(-1, targets[:, None])[:, 0]
        return powers.log() + temperature * (self.log_total[:, 0].to(powers.dtype) - of_targets)


def soften(logits: Tensor, temperature: float) -> Softened:
    """The softmax of float32 or float64[n, V] over `temperature`, which must be the caller's own: it is overwritten."""
    highest, likeliest = highest_of(logits)
    scaled = logits.sub_(highest)
    if temperature != 1:
        scaled = scaled.div_(temperature)
    probabilities = scaled.exp()
    total = probabilities.sum(-1, keepdim=True)
    return Softened(scaled, probabilities.div_(total), total.double().log(), likeliest)


def highest_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of float[n, V], [n, 1], and the first place that it has, int64[n].

    As `logits.max(-1)` does, at an eighth of its time: on CPUs torch looks for the place of a maximum one element after
    another, for a maximum alone at many at once. So it is found by blocks, and its place within one of them.
    """
    blocks = F.pad(logits, (0, -logits.shape[-1] % BLOCK), value=-math.inf).unflatten(-1, (-1, BLOCK))
    highest, block = blocks.amax(-1).max(-1)
    within = blocks[torch.arange(len(blocks), device=block.device), block].argmax(-1)
    return highest[:, None], block * BLOCK + within


def divergence(student: Softened, teacher: Softened) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) of each row, float[n], and q - p, float[n, V], which `student.probabilities` become.

    With p and q the teacher's and the student's probabilities, KL = sum p (log p - log q) is taken as
    sum p (log p - log q) + q - p: the same number, since p and q both add up to 1, but a rounding error common to a
    row's probabilities then cancels, where it would swamp a small KL. A token that the teacher rules out (logit
    -inf) makes nothing infinite; KL is infinite only where the student rules out what the teacher does not.
    """
    log_ratio = teacher.scaled - student.scaled
    log_ratio -= (teacher.log_total - student.log_total).to(log_ratio.dtype)
    kl = torch.linalg.vecdot(teacher.probabilities, log_ratio)
    if kl.isnan().any():  # nothing times infinity: looked for in all rows only where there is one
        kl = torch.linalg.vecdot(teacher.probabilities, log_ratio.masked_fill_(teacher.probabilities == 0, 0))
    difference = student.probabilities.sub_(teacher.probabilities)
    return kl + difference.sum(-1), difference


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) of each row and its gradient by the student's logits, which is (q - p) / temperature.

    Args:
        student_logits, teacher_logits: float32 or float64[n, V], unscaled.

    Returns:
        float[n] and float[n, V].
    """
    student, teacher = (soften(logits.clone(), temperature) for logits in (student_logits, teacher_logits))
    kl, difference = divergence(student, teacher)
    return kl, difference / temperature


class DivergenceAtHead(torch.autograd.Function):
    """`kl_divergence` of the logits of hidden states, in chunks of rows: no more logits than that exist at any time.

    The head is frozen and a row's KL depends on that row alone, so the gradient by the student's hidden states is made
    with the chunk's logits at hand and kept, float[n, D]; backward scales it. Nothing is computed twice. A chunk is
    large for the sake of its matrix products; what goes over its logits element by element goes over few rows at a
    time, which stay in the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, head: nn.Linear, targets: Tensor, temperature: float, rows: int
    ) -> tuple[Tensor, ...]:
        columns: list[tuple[Tensor, ...]] = []
        gradient = torch.empty_like(student)
        few = rows_at_once(head)
        for start in range(0, len(student), rows):
            chunk = slice(start, start + rows)
            student_logits, teacher_logits = (
                F.linear(states[chunk].to(head.weight.dtype), head.weight, head.bias) for states in (student, teacher)
            )
            for q, p, target in zip(
                *(x.split(few) for x in (student_logits, teacher_logits, targets[chunk])), strict=True
            ):
                sides = soften(widen(q), temperature), soften(widen(p), temperature)
                student_ce, teacher_ce = (side.cross_entropy(target, temperature) for side in sides)
                kl, difference = divergence(*sides)
                columns.append((kl, teacher_ce, student_ce, sides[0].likeliest == sides[1].likeliest))
                torch.div(difference, temperature, out=q)  # the logits are not needed any more; their place is
            gradient[chunk] = student_logits @ head.weight
        kl, teacher_ce, student_ce, agrees = (torch.cat(column) for column in zip(*columns, strict=True))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(teacher_ce, student_ce, agrees)
        return kl, teacher_ce, student_ce, agrees

    @staticmethod
    def backward(ctx: Any, by_kl: Tensor, *_: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * by_kl[:, None].to(gradient.dtype), None, None, None, None, None


@torch.no_grad()
def distances_at_head(
    students: Sequence[Tensor], teacher: Tensor, head: nn.Linear, rows: int
) -> list[tuple[Tensor, Tensor]]:
    """How far several students are from one teacher, whose logits are made once; nothing is made for gradients.

    Args:
        students: float[n, D] each, hidden states before the head.
        teacher: float[n, D], likewise.
        head: of all of them.
        rows: of logits that exist at once.

    Returns:
        for each student KL(teacher || student) at temperature 1, float[n], and whether the likeliest token is the
        same, bool[n].
    """
    columns: list[list[tuple[Tensor, Tensor]]] = [[] for _ in students]
    few = rows_at_once(head)
    for start in range(0, len(teacher), rows):
        chunk = slice(start, start + rows)
        ours = [soften(p, 1.0) for p in logits_of(teacher[chunk], head.weight, head.bias).split(few)]
        for student, of_student in zip(students, columns, strict=True):
            for p, q in zip(ours, logits_of(student[chunk], head.weight, head.bias).split(few), strict=True):
                softened = soften(q, 1.0)
                of_student.append((divergence(softened, p)[0], softened.likeliest == p.likeliest))
    return [(torch.cat(kl), torch.cat(agrees)) for kl, agrees in (zip(*parts, strict=True) for parts in columns)]


def rows_at_once(head: nn.Linear) -> int:
    """How many rows of float32 logits are gone over at a time."""
    return max(1, ELEMENTS_IN_CACHE // len(head.weight))


def logits_of(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a head makes of hidden states, [n, V] of float32 at least."""
    return widen(F.linear(hidden_states.to(weight.dtype), weight, bias))


def widen(logits: Tensor) -> Tensor:
    """The same, of float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def rows_per_chunk(vocab_size: int, logits_memory_mib: int, sides: int = 2) -> int:
    """How many rows of float32 logits, teacher's and student's or of one side alone, fit the budget; at least one."""
    return max(1, logits_memory_mib * 2**20 // (sides * 4 * vocab_size))


def distillation_loss(model: Any, batch: Batch, options: DistillationLoss) -> tuple[Tensor | None, LossSums]:
    """The loss of a micro-batch as a sum, to be divided by the number of supervised tokens of the global batch.

    loss = sum over samples of weight(modality) x sum over their supervised positions of
    (temperature^2 x KL(teacher || student) + hidden_loss_weight x mean squared difference entering the last layer).
    A sample's weight depends on whether it has an image itself, never on its batch mates.

    Returns:
        a scalar with a graph, None where nothing is supervised (which then contributes exactly nothing), and the sums.
    """
    sums = LossSums(
        samples=len(batch.sample_ids),
        tokens=float(batch.attention_mask.sum()),
        rejected=len(batch.rejected),
        notices=len(batch.notices),
    )
    keep = supervised_positions(batch.labels)
    if not keep.any():  # every row of it was left out: its workers still need its counts
        return None, sums
    if batch.trunk is None:
        states = shared_pass(model, batch)
        if options.cache is not None:
            options.cache.put_batch(batch, states.trunk, states.teacher, states.teacher_input)
    else:
        states = cached_pass(model, batch)
        sums.cached = sums.samples
    head = model.get_output_embeddings()
    kl, teacher_ce, student_ce, agrees = DivergenceAtHead.apply(
        states.student,
        states.teacher,
        head,
        batch.labels[:, 1:][keep[:, :-1]],
        options.temperature,
        rows_per_chunk(head.weight.shape[0], options.logits_memory_mib),
    )
    vision = batch.has_image[keep.nonzero()[:, 0]]  # bool[n], in the order of the kept rows
    weights = kl.new_tensor([options.text_loss_weight, options.vision_loss_weight])[vision.long()]
    per_token = options.temperature * options.temperature * kl
    if options.hidden_loss_weight:
        hidden = (states.student_input.to(kl.dtype) - states.teacher_input.to(kl.dtype)).square().mean(-1)
        per_token = per_token + options.hidden_loss_weight * hidden
        sums.hidden = hidden.detach().double().sum().item()
    loss = (weights * per_token).double().sum()  # float32 would lose digits over many tokens

    kl = kl.detach().double()
    sums.loss = loss.item()
    sums.kl_vision, sums.kl_text = kl[vision].sum().item(), kl[~vision].sum().item()
    sums.tokens_vision, sums.tokens_text = float(vision.sum()), float((~vision).sum())
    sums.teacher_ce, sums.student_ce = teacher_ce.double().sum().item(), student_ce.double().sum().item()
    sums.top1 = float(agrees.sum())
    return loss, sums
