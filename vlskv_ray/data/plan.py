"""The plan: which samples make up which micro-batch of which step, as a pure function of sources, seed and epoch.

A global step is a fixed list of `micro_batches_per_step` micro-batches, dealt to the workers in turn. What a plan is
made of is fixed when a run starts, so a resume is a slice of it, and another number of workers shares out the same
micro-batches differently. No epoch is ever laid out: the order of samples is a permutation whose every place can be
computed by itself, so that any step of any epoch takes the same short time, whatever the number of samples.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_SAMPLE = -1
WINDOW_STEPS, WINDOW_SAMPLES = 64, 2048
"""Samples are put together by length among those of at most so many steps, and of no more than so many samples where a
step has fewer: near enough to random, far enough to fit well, and quickly made."""
LONGEST = 2**16 - 1
"""Tokens of a sample that are told apart."""
ROWS_IN_MEMORY = 2**22
"""Of more rows the lengths are better kept in a file, see `Plan.with_lengths_in`."""


ROUNDS = 4
"""Of the Feistel network, each on both halves: with three, neighbours in a small table do not part."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROUND_KEYS = np.arange(2 * ROUNDS, dtype=np.uint64) * GOLDEN


# ------------------------------------------------------------------------------------------------- the order of samples
def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of 64 bits (the finalizer of SplitMix64, Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """A key for each combination of some numbers, which may be arrays of the same length."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mixed(key + GOLDEN + np.asarray(part).astype(np.uint64))
    return key


def permuted(places: NDArray[np.int64], size: int | NDArray[np.int64], key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """What stands at some places of a random permutation of range(size), without the others.

    A Feistel network over the numbers left * columns + right, each half moved by a hash of the other: the generalized
    one of Black and Rogaway (Ciphers with Arbitrary Finite Domains, 2002), followed until it stays below `size`.

    Args:
        places: int64[n], each in range(size).
        size: at most 2**48; one for all places, or int64[n].
        key: uint64[1] or [n]: chooses the permutation.
    """
    sizes = np.broadcast_to(np.asarray(size, dtype=np.uint64), places.shape)
    key = np.broadcast_to(key, places.shape)
    columns: NDArray[np.uint64] = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)
    rows: NDArray[np.uint64] = (sizes + columns - np.uint64(1)) // columns
    found = _permuted_once(places.astype(np.uint64), rows, columns, key)
    while len(beyond := np.flatnonzero(found >= sizes)):  # few: rows x columns is hardly more than `size`
        found[beyond] = _permuted_once(found[beyond], rows[beyond], columns[beyond], key[beyond])
    numbers: NDArray[np.int64] = found.astype(np.int64)
    return numbers


def _permuted_once(
    x: NDArray[np.uint64], rows: NDArray[np.uint64], columns: NDArray[np.uint64], key: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """One pass through the network, a permutation of range(rows * columns)."""
    left = x // columns
    right = x - left * columns
    for i in range(ROUNDS):
        left = _moved(left, rows, right + key + ROUND_KEYS[2 * i])
        right = _moved(right, columns, left + key + ROUND_KEYS[2 * i + 1])
    return left * columns + right


def _moved(half: NDArray[np.uint64], size: NDArray[np.uint64], by: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`half`, in range(size), moved on by a hash of `by`, around the end."""
    half = half + (((_mixed(by) >> np.uint64(32)) * size) >> np.uint64(32))  # in range(size), without dividing
    return np.where(half >= size, half - size, half)


# --------------------------------------------------------------------------------------------------------- their length
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

    def of(self, num_images: NDArray[np.int32], text_bytes: NDArray[np.int64]) -> NDArray[np.uint16]:
        """uint16[rows]: about as many tokens as each has, up to LONGEST."""
        tokens = np.empty(len(num_images), dtype=np.uint16)
        for at in range(0, len(tokens), 2**20):  # in pieces: of 100 million rows each array of floats takes a GB
            piece = slice(at, at + 2**20)
            tokens[piece] = np.minimum(self.per_image * num_images[piece] + self.per_byte * text_bytes[piece], LONGEST)
        return tokens


@dataclass(frozen=True)
class Table:
    """A source as the plan sees it: how many rows, and how often an epoch sees each."""

    rows: int
    weight: float = 1.0

    @property
    def rows_per_epoch(self) -> int:
        return max(1, round(self.weight * self.rows)) if self.rows else 0


def first_of_mixture(tables: Sequence[Table], num_samples: int) -> list[Table]:
    """The tables cut to `num_samples` rows in all, each source in proportion to what an epoch takes of it."""
    shares = np.array([table.rows_per_epoch for table in tables], dtype=np.float64)
    sizes = np.array([table.rows for table in tables])
    wanted = min(num_samples, int(sizes.sum()))
    counts = np.zeros(len(tables), dtype=np.int64)
    while (left := wanted - counts.sum()) > 0:  # a source may be too short for its share: the others fill up
        open_shares = np.where(counts < sizes, shares, 0)
        quota = left * open_shares / open_shares.sum()
        counts = np.minimum(counts + np.floor(quota).astype(np.int64), sizes)
        if (left := wanted - counts.sum()) > 0:
            order = np.argsort(np.where(counts < sizes, -(quota - np.floor(quota)), np.inf), kind="stable")
            counts[order[: min(left, int((counts < sizes).sum()))]] += 1
    return [Table(int(count), table.weight) for table, count in zip(tables, counts, strict=True)]


# ------------------------------------------------------------------------------------------------------------- the plan
def _back_and_forth(samples: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
    """int64[groups, samples of a group]: dealt in turn, every second round in the other direction."""
    rounds = samples.reshape(-1, groups)
    rounds[1::2] = rounds[1::2, ::-1].copy()
    return rounds.T


class Plan:
    """Samples are numbered through all tables; `locate` tells a number's table and row.

    Args:
        tables: one a source, in the order of the config.
        lengths: uint16[rows of all tables], about how many tokens each has. It decides how samples are put together.
        seed: the same seed gives the same plan.
        micro_batch_size: samples of a micro-batch; the last ones of an epoch may hold fewer, even none.
        micro_batches_per_step: of all workers together.
        group_by_length: put samples of similar length into one micro-batch, for a model that pads it. Otherwise samples
            are put together so that all shares of a step have about as many tokens, and no worker waits long for
            another.
        shares_per_step: into how many the micro-batches of a step are dealt: as many as the run has workers.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        lengths: NDArray[np.uint16],
        *,
        seed: int,
        micro_batch_size: int,
        micro_batches_per_step: int,
        group_by_length: bool = False,
        shares_per_step: int = 1,
    ) -> None:
        self.tables, self.lengths, self.seed = list(tables), lengths, seed
        self.micro_batch_size, self.micro_batches_per_step = micro_batch_size, micro_batches_per_step
        self.group_by_length, self.shares_per_step = group_by_length, shares_per_step
        self._rows = np.array([table.rows for table in tables], dtype=np.int64)
        self._per_epoch = np.array([table.rows_per_epoch for table in tables], dtype=np.int64)
        self.first_number = np.cumsum([0, *self._rows])
        if not self._rows.any():
            raise ValueError("data.sources: there is no row in any of them")
        assert len(lengths) == self.first_number[-1]
        self.samples_per_epoch = int(self._per_epoch.sum())
        self.samples_per_step = micro_batch_size * micro_batches_per_step
        self.steps_per_epoch = -(-self.samples_per_epoch // self.samples_per_step)
        self._window_steps = max(1, min(WINDOW_STEPS, WINDOW_SAMPLES // self.samples_per_step))
        self._latest_window: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def locate(self, sample: int) -> tuple[int, int]:
        """The table of a sample, and its row there."""
        table = int(np.searchsorted(self.first_number, sample, side="right")) - 1
        return table, sample - int(self.first_number[table])

    def micro_batches(self, step: int) -> NDArray[np.int64]:
        """int64[micro_batches_per_step, micro_batch_size] sample numbers of a step; NO_SAMPLE where there is none."""
        epoch, within = divmod(step, self.steps_per_epoch)
        window, at = divmod(within, self._window_steps)
        if self._latest_window is None or self._latest_window[0] != (epoch, window):
            self._latest_window = ((epoch, window), self._deal(epoch, window))
        return self._latest_window[1][at]

    def row(self, step: int, micro_batch: int) -> dict[str, Any]:
        """One micro-batch of a step: what a data worker is asked for."""
        samples = self.micro_batches(step)[micro_batch]
        return {"step": step, "micro_batch": micro_batch, "samples": samples[samples != NO_SAMPLE].tolist()}

    def rows(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The micro-batches of steps [start, stop) in order."""
        for step in range(start, stop):
            yield from (self.row(step, j) for j in range(self.micro_batches_per_step))

    def fingerprint(self) -> str:
        """Tells whether two plans deal the same samples the same way."""
        digest = hashlib.sha256()
        about: list[Any] = [self.seed, self.micro_batch_size, self.micro_batches_per_step, self.group_by_length]
        about += [self.shares_per_step, WINDOW_STEPS, WINDOW_SAMPLES, ROUNDS]
        about += [(table.rows, table.weight) for table in self.tables]
        digest.update(json.dumps(about).encode())
        digest.update(np.ascontiguousarray(self.lengths).data)
        return digest.hexdigest()

    def with_lengths_in(self, path: Path) -> "Plan":
        """The same plan with its lengths in a file, which every process maps instead of being sent and holding them."""
        np.save(path, self.lengths)
        state = self.__dict__ | {"lengths": path}
        plan = Plan.__new__(Plan)
        plan.__setstate__(state)
        return plan

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_latest_window": None}
        if isinstance(self.lengths, np.memmap):
            state["lengths"] = Path(str(self.lengths.filename))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.lengths, Path):
            self.lengths = np.load(self.lengths, mmap_mode="r")

    def _deal(self, epoch: int, window: int) -> NDArray[np.int64]:
        """int64[steps, micro_batches_per_step, micro_batch_size] of a window of an epoch."""
        width = self._window_steps * self.samples_per_step
        samples = self._drawn(epoch, window * width, min((window + 1) * width, self.samples_per_epoch))
        rng = np.random.default_rng([self.seed, epoch, window])
        deal = self._deal_alike if self.group_by_length else self._deal_balanced
        return deal(samples, rng).reshape(-1, self.micro_batches_per_step, self.micro_batch_size)

    def _drawn(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """The samples at places [start, stop) of an epoch, all tables mixed.

        Of each table an epoch takes the next ones of an endless row of its permutations: with weight 1 that is every
        row once; with 0.5 two epochs see every row once, with 2 each epoch does so twice.
        """
        places = permuted(np.arange(start, stop), self.samples_per_epoch, key_of(self.seed, 0, epoch))
        ends = np.cumsum(self._per_epoch)
        table = np.searchsorted(ends, places, side="right")
        number = epoch * self._per_epoch[table] + places - (ends - self._per_epoch)[table]
        nth_time, place = np.divmod(number, self._rows[table])
        return self.first_number[table] + permuted(place, self._rows[table], key_of(self.seed, 1, table, nth_time))

    def _deal_balanced(self, samples: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """int64[steps, micro_batches_per_step, micro_batch_size].

        Long samples go with short ones, so that all shares are alike, and the shares most alike make a step.
        """
        size, shares = self.micro_batch_size, self.shares_per_step
        steps = -(-len(samples) // self.samples_per_step)
        samples = np.pad(samples, (0, steps * self.samples_per_step - len(samples)), constant_values=NO_SAMPLE)
        tokens = np.where(samples == NO_SAMPLE, np.uint16(0), self.lengths[samples])
        longest_first = np.argsort(np.uint16(LONGEST) - tokens, kind="stable")  # 16 bits: in as many steps as samples
        order = _back_and_forth(longest_first, steps * shares)
        if order.shape[1] > 1:
            order = order[np.argsort(-tokens[order].sum(1, dtype=np.int64), kind="stable")]
        else:  # of single samples, those alike would make steps of one kind
            order = rng.permutation(order)
        of_a_share = self.samples_per_step // size // shares
        dealt = order.reshape(len(order), size, of_a_share).copy()  # of each share in turn, back and forth
        dealt[:, 1::2] = dealt[:, 1::2, ::-1].copy()
        dealt = dealt.swapaxes(1, 2)
        by_step = dealt.reshape(steps, shares, -1, size).swapaxes(1, 2)  # each worker's turn comes again and again
        return samples[rng.permutation(by_step)]

    def _deal_alike(self, samples: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """int64[micro-batches, micro_batch_size] in whole steps, samples of a micro-batch of similar length."""
        samples = samples[np.argsort(self.lengths[samples], kind="stable")]
        size, per_step = self.micro_batch_size, self.micro_batches_per_step
        batches = [samples[at : at + size] for at in range(0, len(samples), size)]
        shuffled = [batches[i] for i in rng.permutation(len(batches))]
        dealt = np.full((-(-len(batches) // per_step) * per_step, size), NO_SAMPLE, dtype=np.int64)
        for step in range(0, len(shuffled), per_step):
            # longest first: dealt in turn, workers get micro-batches of like length and wait little for each other
            of_step = shuffled[step : step + per_step]
            of_step.sort(key=lambda batch: -int(self.lengths[batch].sum()))
            for j, batch in enumerate(of_step):
                dealt[step + j, : len(batch)] = batch
        return dealt
