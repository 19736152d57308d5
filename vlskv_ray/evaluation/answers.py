"""A teacher's answers to prompts, greedy or sampled, batch by batch: what is learnt from where there are no answers.

What is answered to a prompt depends on the prompt, its place in the data and the seed, not on the prompts beside it,
on who computes it or on what was answered before.

Shapes: B prompts, V vocabulary.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from vlskv_ray.data.chat import Limits, encode_prompt
from vlskv_ray.data.collate import Encoded
from vlskv_ray.data.prompts import Prompts
from vlskv_ray.data.sample import Rejected, left_out
from vlskv_ray.evaluation.generation import as_text, end_tokens, generate_answers
from vlskv_ray.words import plural

WINDOW_BATCHES = 4
"""Batches at most whose prompts are put together by length: what is given to a worker at a time, and held prepared."""
FEW_WINDOWS = 8
"""As many windows at least where there are batches for them, so that few prompts keep several workers busy too."""
FEW = 1024
"""Tokens among which those that come to `top_p` are looked for first."""
CUT_CHARACTER = "\ufffd"
"""What a tokenizer writes for a part of a character."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen among all that a model might say."""

    max_new_tokens: int = 256
    """Where it is cut at the latest, if not by the model's positions."""
    temperature: float = 0.0
    """Of the distribution that tokens are drawn from; 0: always the likeliest."""
    top_p: float = 1.0
    """Only the likeliest tokens that come to so much together."""
    top_k: int | None = None
    """Only so many of the likeliest tokens."""
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What a model answered to one row."""

    row: int
    """Its number among the `Prompts`."""
    text: str
    finish_reason: str
    """`stop`, or `length` where it was cut."""
    num_tokens: int
    """Those that were generated, the one that ends the turn included."""

    def turn(self) -> dict[str, Any]:
        """As a row has it."""
        about = {"finish_reason": self.finish_reason, "num_tokens": self.num_tokens}
        return {"role": "assistant", "content": self.text, **about}


@dataclass(frozen=True)
class Part:
    """What became of one batch; the first one of a window tells of the window's other rows too."""

    window: int
    batch: int
    num_batches: int
    """Of the window."""
    answers: list[Answer]
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """Rows that cannot be used, see `left_out` of data/sample.py, with their number as `row`."""
    num_kept: int = 0
    """Rows that stay as they are."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(told: dict[str, Any]) -> "Part":
        """The inverse of `to_json`."""
        return Part(**told | {"answers": [Answer(**answer) for answer in told["answers"]]})


def rows_of_window(num_rows: int, batch_size: int) -> int:
    """How many rows a window has; it depends on the prompts alone, so that others may go on with what is answered."""
    num_batches = -(-num_rows // batch_size)
    return batch_size * min(WINDOW_BATCHES, max(1, num_batches // FEW_WINDOWS))


class FiniteLogits(LogitsProcessor):
    """Looks at what the next tokens are chosen by: of what is no number, the likeliest is a token like any other."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` float[B, V] as they are. ValueError where one is no number."""
        if scores.isnan().any():
            raise ValueError(
                "its logits are no numbers (nan): weights of it are damaged, or too large for their type; compare its "
                "files with the original"
            )
        return scores


class SeededSampling(LogitsProcessor):
    """Draws the next token of each prompt and leaves it as the only one that can be.

    One random number decides, from a generator for each prompt, once a token, whatever the others in the batch do: the
    token is the one at which the probabilities of those that may be drawn add up to more than that share of their sum.
    """

    def __init__(self, sampling: Sampling, keys: Sequence[str]) -> None:
        """`keys`: a name for each prompt, the same whenever it is asked."""
        self.sampling = sampling
        self.generators = [torch.Generator().manual_seed(seed_of(sampling.seed, key)) for key in keys]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """float[B, V] of `scores` float[B, V]: 0 for the token that was drawn, else -inf."""
        probabilities, tokens = self.candidates((scores.float() / self.sampling.temperature).softmax(-1))
        cumulative = probabilities.double().cumsum(-1)
        shares = torch.stack([torch.rand(1, dtype=torch.float64, generator=g) for g in self.generators])
        drawn = torch.searchsorted(cumulative, shares.to(scores.device) * cumulative[:, -1:], right=True)
        last = (probabilities > 0).sum(-1, keepdim=True) - 1 if tokens is not None else scores.shape[1] - 1
        drawn = drawn.clamp(max=last)  # a share may be rounded up to the whole
        if tokens is not None:
            drawn = tokens.gather(1, drawn)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0)

    def candidates(self, probabilities: Tensor) -> tuple[Tensor, Tensor | None]:
        """The probabilities of those tokens that may be drawn, the likeliest first, and the tokens, [B, some] each; of
        others among them 0. Where all may be drawn, all in order of their ids, and None.

        A whole vocabulary is sorted only where the likeliest `FEW` do not come to `top_p`: it takes ten times as long.
        """
        top_k, top_p, size = self.sampling.top_k, self.sampling.top_p, probabilities.shape[1]
        if top_k is None and top_p == 1:
            return probabilities, None
        found, tokens = probabilities.topk(min(top_k or FEW, size))
        if top_k is not None:
            found = found / found.sum(-1, keepdim=True)
        elif (found.sum(-1) < top_p).any():
            found, tokens = probabilities.sort(-1, descending=True)
        before = found.double().cumsum(-1) - found
        return torch.where(before < top_p, found, 0), tokens


def seed_of(seed: int, key: str) -> int:
    """A seed for each prompt."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:8]) >> 1


class Answerer:
    """A model that answers prompts."""

    def __init__(
        self, model: Any, processor: Any, prompts: Prompts, sampling: Sampling, batch_size: int, limits: Limits
    ) -> None:
        """
        Args:
            model: as teacher. What its generation_config.json says but for the tokens that end an answer is not used.
            processor: the model's own.
            prompts: that are to be answered.
            sampling: how.
            batch_size: prompts at once.
            limits: what a prompt may be at most; one token is left for an answer.
        """
        self.model, self.processor, self.prompts, self.sampling = model, processor, prompts, sampling
        self.batch_size, self.limits = batch_size, limits
        self.window_size = rows_of_window(prompts.num_rows, batch_size)
        # else padding would count for penalties of repetition, and an answer would depend on the others of its batch
        model.generation_config = GenerationConfig(eos_token_id=end_tokens(model, processor.tokenizer))

    def parts(self, window: int, done: Collection[int] = ()) -> Iterator[Part]:
        """The batches of a window of rows, prompts of like length together; always the same ones.

        Args:
            window: its number.
            done: batches that are not wanted any more.
        """
        size = self.window_size
        asked: list[tuple[int, Encoded]] = []
        rejected: list[dict[str, Any]] = []
        num_kept = 0
        for number in range(window * size, min((window + 1) * size, self.prompts.num_rows)):
            try:
                sample, is_asked = self.prompts.read(number)
                if is_asked:
                    asked.append((number, encode_prompt(sample, self.processor, self.model.config, self.limits)))
                else:
                    num_kept += 1
            except Rejected as reason:
                rejected.append({"row": number} | left_out(self.prompts.uid(number), reason))
        asked.sort(key=lambda prompt: (len(prompt[1].images), len(prompt[1].input_ids), prompt[0]))
        batches = [asked[at : at + self.batch_size] for at in range(0, len(asked), self.batch_size)] or [[]]
        for i, of_batch in enumerate(batches):
            if i not in done:
                answers, without = self._answers(of_batch) if of_batch else ([], [])
                of_window = (rejected + without, num_kept) if i == 0 else (without, 0)
                yield Part(window, i, len(batches), answers, *of_window)

    def _answers(self, of_batch: Sequence[tuple[int, Encoded]]) -> tuple[list[Answer], list[dict[str, Any]]]:
        """The answers to prompts, and those of them that got none."""
        prompts = [prompt for _, prompt in of_batch]
        # the last token of an answer is not fed back, so it needs no position
        room = [self.limits.max_length + 1 - len(prompt.input_ids) for prompt in prompts]
        most = [min(self.sampling.max_new_tokens, tokens) for tokens in room]
        choice = LogitsProcessorList([FiniteLogits()])
        if self.sampling.temperature:
            choice.append(SeededSampling(self.sampling, [prompt.uid for prompt in prompts]))
        generated = generate_answers(self.model, prompts, self.processor.tokenizer, max(most), choice)
        ends = end_tokens(self.model, self.processor.tokenizer)
        answers, without = [], []
        for (number, prompt), ids, at_most in zip(of_batch, generated, most, strict=True):
            ids = ids[:at_most]
            is_cut = ids[-1] not in ends
            text = as_text(self.processor, ids)
            text = text.rstrip(CUT_CHARACTER).rstrip() if is_cut else text
            if text:
                answers.append(Answer(number, text, "length" if is_cut else "stop", len(ids)))
            else:
                reason = Rejected("answer_empty", f"the model's answer of {plural(len(ids), 'token')} has no text")
                without.append({"row": number} | left_out(prompt.uid, reason))
        return answers, without
