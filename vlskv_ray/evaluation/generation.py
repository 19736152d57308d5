"""What a model writes after prompts, many at once.

Shapes: B prompts, T tokens of the longest, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import LogitsProcessorList

from vlskv_ray.data.collate import IGNORE_INDEX, Encoded, collate


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens with which an answer of the model ends."""
    ends = model.generation_config.eos_token_id
    return [tokenizer.eos_token_id] if ends is None else [ends] if isinstance(ends, int) else list(ends)


@torch.inference_mode()
def generate_answers(
    model: Any,
    prompts: Sequence[Encoded],
    tokenizer: Any,
    max_new_tokens: int,
    logits_processor: LogitsProcessorList | None = None,
) -> list[list[int]]:
    """The likeliest token after each prompt, again and again: ids up to the one that ends the answer, it included.

    Args:
        model: answers with its own cache, by SwiftKV where that is on.
        prompts: padded on the left to the longest.
        tokenizer: the model's.
        max_new_tokens: where an answer is cut at the latest.
        logits_processor: changes what is likely.
    """
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    length = max(len(prompt.input_ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), pad)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        start = length - len(prompt.input_ids)
        input_ids[row, start:] = torch.from_numpy(prompt.input_ids)
        attention_mask[row, start:] = 1
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    batch = replace(collate(prompts, pad), input_ids=input_ids, attention_mask=attention_mask, labels=labels)
    generated = model.generate(
        **batch.to(model.device).model_inputs(model.config),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        eos_token_id=ends,
        pad_token_id=pad,
        logits_processor=logits_processor,
    )
    answers = []
    for ids in generated[:, length:].tolist():
        stop = next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))
        answers.append(ids[:stop])
    return answers


def as_text(processor: Any, ids: Sequence[int]) -> str:
    """An answer as a reader sees it; two answers are the same if these are."""
    return str(processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()
