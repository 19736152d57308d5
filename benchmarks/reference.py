"""The reference recipe, plainly: two whole passes with all logits, and the divergence masked to what is supervised.

As published (arXiv 2410.03960, section 3; Snowflake's ArcticTraining): the teacher is the model with SwiftKV off.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlskv_ray.data.collate import IGNORE_INDEX, Batch


def reference_loss(model: Any, batch: Batch, temperature: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean over supervised tokens of temperature^2 x KL(teacher || student), with its graph.

    `dtype` is that of the divergence; in float32 its rounding errors are a millionth of the logits, not of the KL.
    """
    switch = model.config.text_config
    switch.swiftkv = False
    with torch.no_grad():
        teacher_logits = model(**batch.model_inputs(model.config), use_cache=False).logits
    switch.swiftkv = True
    student_logits = model(**batch.model_inputs(model.config), use_cache=False).logits

    log_p = F.log_softmax(teacher_logits[:, :-1] / temperature, dim=-1, dtype=dtype)
    log_q = F.log_softmax(student_logits[:, :-1] / temperature, dim=-1, dtype=dtype)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    counts = batch.labels[:, 1:] != IGNORE_INDEX
    return temperature**2 * (kl * counts).sum() / counts.sum()
