"""TRL's loss step on the same student class and completions: `DistillationTrainer`, which takes pictures, unlike GKD's.

That trainer is on-policy: it generates completions, then computes its loss on them. Here it gets the completions of the
data, so that only the loss step is measured.
"""

import tempfile
from typing import Any

import torch
from torch import Tensor

from vlskv_ray.data.collate import IGNORE_INDEX, Batch
from vlskv_ray.model.wrappers import llava_next

VERSION = "1.16.0"
SET_UP = f"python3 -m venv .venv-trl && .venv-trl/bin/pip install -e . trl=={VERSION}"


def available() -> bool:
    try:
        import trl
    except ImportError:
        return False
    return bool(trl.__version__ == VERSION)


def trainer(student: Any, teacher: Any, processor: Any, temperature: float) -> Any:
    """A trainer of one process; `teacher` is a model of its own, as TRL wants it."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    options = DistillationConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        temperature=temperature,
        beta=0.0,  # forward KL
        report_to=[],
        per_device_train_batch_size=1,
    )
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=options,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "?"}]}]),
        processing_class=processor,
    )


def trainer_inputs(batch: Batch, config: Any, pad_token_id: int) -> dict[str, Any]:
    """A micro-batch as TRL has it after generating: prompts padded on the left, completions on the right."""
    prompts, completions = [], []
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        supervised = (labels != IGNORE_INDEX).nonzero()[:, 0]
        prompts.append(ids[: supervised[0]])
        completions.append(ids[supervised[0] : supervised[-1] + 1])
    prompt_ids, prompt_mask = _padded(prompts, pad_token_id, left=True)
    completion_ids, completion_mask = _padded(completions, pad_token_id, left=False)
    inputs: dict[str, Any] = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "num_items_in_batch": completion_mask.sum().float(),
    }
    return inputs | llava_next.model_inputs(config, batch)


def _padded(rows: list[Tensor], pad_token_id: int, left: bool) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_token_id)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask
