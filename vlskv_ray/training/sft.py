"""Supervised fine-tuning, `objective: sft`: cross-entropy over the answers, to make a teacher; all weights train."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vlskv_ray.data.collate import Batch, supervised_positions
from vlskv_ray.training.distill import LossSums


def cross_entropy_loss(model: Any, batch: Batch) -> tuple[Tensor | None, LossSums]:
    """The cross-entropy of a micro-batch's labels as a sum, to be divided by the supervised tokens of the global batch.

    Returns:
        a scalar with a graph, None where nothing is supervised, and the sums.
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
    hidden_states = model.base_model(**batch.model_inputs(model.config), use_cache=False).last_hidden_state[
        keep
    ]  # [n, D]
    logits = model.get_output_embeddings()(hidden_states).float()
    targets = batch.labels[:, 1:][keep[:, :-1]]
    per_token = F.cross_entropy(logits, targets, reduction="none").double()
    loss = per_token.sum()

    vision = batch.has_image[keep.nonzero()[:, 0]]
    sums.loss = loss.item()
    sums.ce_vision, sums.ce_text = per_token[vision].sum().item(), per_token[~vision].sum().item()
    sums.tokens_vision, sums.tokens_text = float(vision.sum()), float((~vision).sum())
    sums.top1 = float((logits.argmax(-1) == targets).sum())
    return loss, sums
