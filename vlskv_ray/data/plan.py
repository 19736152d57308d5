"""The plan: which samples make up which micro-batch of which step, as a pure function of sources, seed and epoch.

A global step is a fixed list of `micro_batches_per_step` micro-batches, dealt to the workers in turn. What a plan is
made of is fixed when a run starts, so a resume is a slice of it, and another worker count deals the same cards
differently.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_SAMPLE = -1
WINDOW_STEPS = 64
"""Samples are put together by length among those of so many steps: near enough to random, far enough to fit well."""


@dataclass(frozen=True)
class Tokens:
    """About how many tokens a sample has: `per_image` for each image, and `per_byte` of its text."""

    per_image: float = 0.0
    per_byte: float = 1.0

    @staticmethod
    def fitted(images: Sequence[int], text_bytes: Sequence[int], tokens: Sequence[int]) -> "Tokens":
        """The estimate that fits some samples best; rounded, so that it is the same on every machine."""
        columns = np.array([images, text_bytes], dtype=np.float64).T
        per_image, per_byte = np.linalg.lstsq(columns, np.array(tokens, dtype=np.float64))[0]
        return Tokens(max(0.0, float(round(per_image))), max(0.01, round(float(per_byte), 2)))


def _back_and_forth(cards: NDArray[np.int64], hands: int) -> NDArray[np.int64]:
    """int64[hands, cards of a hand]: dealt in turn, every second round in the other direction."""
    rounds = cards.reshape(-1, hands)
    rounds[1::2] = rounds[1::2, ::-1].copy()
    return rounds.T


@dataclass(frozen=True)
class Table:
    """What the plan knows of a source: how long its rows are, roughly, and how often an epoch sees each."""

    num_images: NDArray[np.int32]  # [rows]
    text_bytes: NDArray[np.int64]  # [rows]
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.num_images)

    @property
    def rows_per_epoch(self) -> int:
        return max(1, round(self.weight * len(self))) if len(self) else 0

    def first(self, count: int) -> "Table":
        return Table(self.num_images[:count], self.text_bytes[:count], self.weight)


def first_of_mixture(tables: Sequence[Table], num_samples: int) -> list[Table]:
    """The tables cut to `num_samples` rows in all, each source in proportion to what an epoch takes of it."""
    shares = np.array([table.rows_per_epoch for table in tables], dtype=np.float64)
    wanted = min(num_samples, int(sum(len(table) for table in tables)))
    counts = np.zeros(len(tables), dtype=np.int64)
    sizes = np.array([len(table) for table in tables])
    while (left := wanted - counts.sum()) > 0:  # a source may be too short for its share: the others fill up
        open_shares = np.where(counts < sizes, shares, 0)
        quota = left * open_shares / open_shares.sum()
        counts = np.minimum(counts + np.floor(quota).astype(np.int64), sizes)
        if (left := wanted - counts.sum()) > 0:
            order = np.argsort(np.where(counts < sizes, -(quota - np.floor(quota)), np.inf), kind="stable")
            counts[order[: min(left, int((counts < sizes).sum()))]] += 1
    return [table.first(int(count)) for table, count in zip(tables, counts, strict=True)]


class Plan:
    """Samples are numbered through all tables; `locate` tells a number's table and row.

    Args:
        tables: one a source, in the order of the config.
        seed: the same seed gives the same plan.
        micro_batch_size: samples of a micro-batch; the last ones of an epoch may hold fewer, even none.
        micro_batches_per_step: of all workers together.
        group_by_length: put samples of similar length (number of images, then length of text) into one micro-batch, for
            a model that pads it. Otherwise samples are put together so that all shares of a step have about as many
            tokens, and no worker waits long for another.
        shares_per_step: into how many the micro-batches of a step are dealt: as many as the run has workers.
        tokens: of a sample, about.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        *,
        seed: int,
        micro_batch_size: int,
        micro_batches_per_step: int,
        group_by_length: bool = False,
        shares_per_step: int = 1,
        tokens: Tokens = Tokens(),  # noqa: B008 - cannot be changed
    ) -> None:
        if not any(len(table) for table in tables):
            raise ValueError("data.sources: there is no row in any of them")
        self.tables, self.seed = list(tables), seed
        self.micro_batch_size, self.micro_batches_per_step = micro_batch_size, micro_batches_per_step
        self.group_by_length, self.shares_per_step, self.tokens = group_by_length, shares_per_step, tokens
        self._num_images = np.concatenate([table.num_images for table in self.tables])
        self._text_bytes = np.concatenate([table.text_bytes for table in self.tables])
        self.first_number = np.cumsum([0, *map(len, self.tables)])
        self.samples_per_epoch = sum(table.rows_per_epoch for table in self.tables)
        self.steps_per_epoch = -(-self.samples_per_epoch // (micro_batch_size * micro_batches_per_step))
        self._latest_epoch: tuple[int, NDArray[np.int64]] | None = None

    def locate(self, sample: int) -> tuple[int, int]:
        """The table of a sample, and its row there."""
        table = int(np.searchsorted(self.first_number, sample, side="right")) - 1
        return table, sample - int(self.first_number[table])

    def micro_batches(self, step: int) -> NDArray[np.int64]:
        """int64[micro_batches_per_step, micro_batch_size] sample numbers of a step; NO_SAMPLE where there is none."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._latest_epoch is None or self._latest_epoch[0] != epoch:
            self._latest_epoch = (epoch, self._deal(epoch))
        return self._latest_epoch[1][within]

    def rows(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The micro-batches of steps [start, stop) in order: what the data workers are asked for."""
        for step in range(start, stop):
            for j, samples in enumerate(self.micro_batches(step)):
                yield {"step": step, "micro_batch": j, "samples": samples[samples != NO_SAMPLE].tolist()}

    def fingerprint(self) -> str:
        """Tells whether two plans deal the same samples the same way."""
        digest = hashlib.sha256()
        about: list[float] = [self.seed, self.micro_batch_size, self.micro_batches_per_step, self.group_by_length]
        about += [WINDOW_STEPS]
        if not self.group_by_length:
            about += [self.shares_per_step, self.tokens.per_image, self.tokens.per_byte]
        digest.update(json.dumps(about).encode())
        for table in self.tables:
            digest.update(json.dumps([len(table), table.weight]).encode())
            digest.update(table.num_images.tobytes() + table.text_bytes.tobytes())
        return digest.hexdigest()

    def _deal(self, epoch: int) -> NDArray[np.int64]:
        """int64[steps, micro_batches_per_step, micro_batch_size] of an epoch."""
        rng = np.random.default_rng([self.seed, 1, epoch])
        samples = rng.permutation(np.concatenate([self._drawn(k, epoch) for k in range(len(self.tables))]))
        per_step = self.micro_batch_size * self.micro_batches_per_step
        deal = self._deal_alike if self.group_by_length else self._deal_balanced
        windows = [
            deal(samples[at : at + WINDOW_STEPS * per_step], rng)
            for at in range(0, len(samples), WINDOW_STEPS * per_step)
        ]
        return np.concatenate(windows).reshape(-1, self.micro_batches_per_step, self.micro_batch_size)

    def _drawn(self, k: int, epoch: int) -> NDArray[np.int64]:
        """The samples that an epoch takes of a table: the next ones of an endless row of its permutations.

        With weight 1 that is every row once; with 0.5 two epochs see every row once, with 2 each epoch does so twice.
        """
        rows, count = len(self.tables[k]), self.tables[k].rows_per_epoch
        if not rows:
            return np.empty(0, dtype=np.int64)
        begin, end = epoch * count, (epoch + 1) * count
        first, last = begin // rows, (end - 1) // rows
        rounds = [np.random.default_rng([self.seed, 0, k, r]).permutation(rows) for r in range(first, last + 1)]
        return self.first_number[k] + np.concatenate(rounds)[begin - first * rows : end - first * rows]

    def _deal_balanced(self, samples: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """int64[steps, micro_batches_per_step, micro_batch_size].

        Long samples go with short ones, so that all shares are alike, and the shares most alike make a step.
        """
        size, shares = self.micro_batch_size, self.shares_per_step
        per_step = size * self.micro_batches_per_step
        steps = -(-len(samples) // per_step)
        samples = np.pad(samples, (0, steps * per_step - len(samples)), constant_values=NO_SAMPLE)
        tokens = self.tokens.per_image * self._num_images[samples] + self.tokens.per_byte * self._text_bytes[samples]
        tokens[samples == NO_SAMPLE] = 0
        order = _back_and_forth(np.argsort(-tokens, kind="stable"), steps * shares)
        if order.shape[1] > 1:
            order = order[np.argsort(-tokens[order].sum(1), kind="stable")]
        else:  # of single samples, those alike would make steps of one kind
            order = rng.permutation(order)
        dealt = np.stack([_back_and_forth(share, per_step // size // shares) for share in order])  # [shares, a, size]
        by_step = dealt.reshape(steps, shares, -1, size).swapaxes(1, 2)  # each worker's turn comes again and again
        return samples[rng.permutation(by_step)]

    def _deal_alike(self, samples: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """int64[micro-batches, micro_batch_size] in whole steps, samples of a micro-batch of similar length."""
        images, text = self._num_images[samples], self._text_bytes[samples]
        order = np.lexsort((text, images))
        samples, images, text = samples[order], images[order], text[order]
        size, per_step = self.micro_batch_size, self.micro_batches_per_step
        batches = [slice(at, at + size) for at in range(0, len(samples), size)]
        shuffled = [batches[i] for i in rng.permutation(len(batches))]
        dealt = np.full((-(-len(batches) // per_step) * per_step, size), NO_SAMPLE, dtype=np.int64)
        for step in range(0, len(shuffled), per_step):
            # longest first: dealt in turn, workers get micro-batches of like length and wait little for each other
            of_step = shuffled[step : step + per_step]
            of_step.sort(key=lambda s: (-int(images[s].sum()), -int(text[s].sum())))
            for j, batch in enumerate(of_step):
                dealt[step + j, : len(samples[batch])] = samples[batch]
        return dealt
