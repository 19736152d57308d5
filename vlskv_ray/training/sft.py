"""Supervised fine-tuning, `objective: sft`: cross-entropy over the answers, of a plain model or parts of it to make a
teacher, or of a student's SwiftKV weights.

Shapes: B samples, T tokens, D hidden, V vocabulary, n supervised positions of the micro-batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlskv_ray.data.collate import Batch, supervised_positions
from vlskv_ray.model.swiftkv import SwiftKVPass, has_swiftkv
from vlskv_ray.training.distill import ELEMENTS_IN_CACHE, LossSums, logits_of, rows_per_chunk


@dataclass(frozen=True)
class CrossEntropyLoss:
    """What the loss of a run needs beside model and micro-batch."""

    logits_memory_mib: int = 256

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor | None, LossSums]:
        """`cross_entropy_loss` within this memory."""
        return cross_entropy_loss(model, batch, self.logits_memory_mib)


class CrossEntropyAtHead(torch.autograd.Function):
    """The sum of the cross-entropies of hidden states through a head, in chunks of rows: no more logits than that exist
    at any time, see `DivergenceAtHead`. Gradients are made with a chunk's logits at hand, that of the head too where it
    trains; what is frozen gets none.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int
    ) -> tuple[Tensor, ...]:
        gradients = [
            torch.zeros_like(x) if x is not None and needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        by_hidden, by_weight, by_bias = gradients
        columns: list[tuple[Tensor, Tensor]] = []
        few = max(1, ELEMENTS_IN_CACHE // len(weight))
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            logits = logits_of(hidden[chunk], weight, bias)
            for of_few, target in zip(logits.split(few), targets[chunk].split(few), strict=True):
                log_q = F.log_softmax(of_few, dim=-1)
                columns.append((F.nll_loss(log_q, target, reduction="none"), of_few.argmax(-1) == target))
                of_few.copy_(log_q.exp_())  # the logits are not needed any more; their place is, for what is by them:
                of_few.scatter_add_(1, target[:, None], -torch.ones_like(of_few[:, :1]))
            by_logits = logits.to(weight.dtype)
            if by_hidden is not None:
                by_hidden[chunk] = by_logits @ weight
            if by_weight is not None:
                by_weight += by_logits.T @ hidden[chunk].to(weight.dtype)
            if by_bias is not None:
                by_bias += by_logits.sum(0)
        per_token, is_right = (torch.cat(column) for column in zip(*columns, strict=True))
        ctx.gradients = gradients
        ctx.mark_non_differentiable(per_token, is_right)
        return per_token.double().sum(), per_token, is_right  # float32 would lose digits over many tokens

    @staticmethod
    def backward(ctx: Any, by_sum: Tensor, *_: Any) -> Any:
        scaled = (None if x is None else x * by_sum.to(x.dtype) for x in ctx.gradients)
        return *scaled, None, None


def cross_entropy_loss(model: Any, batch: Batch, logits_memory_mib: int = 256) -> tuple[Tensor | None, LossSums]:
    """The cross-entropy of a micro-batch's labels as a sum, to be divided by the supervised tokens of the global batch.

    Returns:
        a scalar with a graph, None where nothing is supervised or no weight that trains has a part in it, as none of
        the projector has in a text, and the sums.
    """
    sums = LossSums(
        samples=len(batch.sample_ids),
        tokens=float(batch.attention_mask.sum()),
        rejected=len(batch.rejected),
        notices=len(batch.notices),
    )
    keep = supervised_positions(batch.labels)  # bool[B, T]
    if not keep.any():
        return None, sums
    head = model.get_output_embeddings()
    loss, per_token, is_right = CrossEntropyAtHead.apply(
        supervised_states(model, batch, keep),
        head.weight,
        head.bias,
        batch.labels[:, 1:][keep[:, :-1]],
        rows_per_chunk(len(head.weight), logits_memory_mib, sides=1),
    )
    vision, per_token = batch.has_image[keep.nonzero()[:, 0]], per_token.double()
    sums.loss = loss.item()
    sums.ce_vision, sums.ce_text = per_token[vision].sum().item(), per_token[~vision].sum().item()
    sums.tokens_vision, sums.tokens_text = float(vision.sum()), float((~vision).sum())
    sums.top1 = float(is_right.sum())
    return loss if loss.requires_grad else None, sums


def supervised_states(model: Any, batch: Batch, keep: Tensor) -> Tensor:
    """float[n, D]: a model's final hidden states at the positions that bool[B, T] marks; a student's layers from N on
    run there only."""
    inputs = batch.model_inputs(model.config)
    if not has_swiftkv(model.config):
        states: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state[keep]
    else:
        states = model.base_model(**inputs, use_cache=False, swiftkv=SwiftKVPass(keep=keep)).last_hidden_state[0]
    return states
