"""The plan: every sample once an epoch, the same from the same seed, similar lengths together."""

import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlskv_ray.data.plan import (
    LONGEST,
    NO_SAMPLE,
    WINDOW_SAMPLES,
    WINDOW_STEPS,
    Plan,
    Table,
    Tokens,
    first_of_mixture,
    key_of,
    permuted,
)


def lengths_of(*tables: Table, seed: int = 0) -> np.ndarray:
    """Of samples with up to two images of 600 tokens, and some text."""
    rng = np.random.default_rng(seed)
    rows = sum(table.rows for table in tables)
    return (600 * rng.integers(0, 3, rows) + rng.integers(1, 250, rows)).astype(np.uint16)


def plan(*tables: Table, size: int = 4, per_step: int = 2, seed: int = 0, **options: Any) -> Plan:
    options = {"seed": seed, "micro_batch_size": size, "micro_batches_per_step": per_step, **options}
    lengths = options.pop("lengths") if "lengths" in options else lengths_of(*tables)
    return Plan(tables, lengths, **options)


def dealt(of: Plan, epoch: int) -> np.ndarray:
    steps = range(epoch * of.steps_per_epoch, (epoch + 1) * of.steps_per_epoch)
    return np.concatenate([of.micro_batches(step).ravel() for step in steps])


@pytest.mark.parametrize("rows", [(1,), (7, 1), (8,), (64, 3), (1000, 77)])
@pytest.mark.parametrize(("size", "per_step"), [(1, 1), (4, 2), (3, 5)])
@pytest.mark.parametrize("group_by_length", [False, True])
def test_an_epoch_deals_every_sample_once(
    rows: tuple[int, ...], size: int, per_step: int, group_by_length: bool
) -> None:
    tables = [Table(n) for n in rows]
    of = plan(*tables, size=size, per_step=per_step, group_by_length=group_by_length)
    for epoch in range(3):
        samples = dealt(of, epoch)
        assert sorted(samples[samples != NO_SAMPLE]) == list(range(sum(rows)))
        assert len(samples) == of.steps_per_epoch * size * per_step
    assert of.steps_per_epoch == -(-sum(rows) // (size * per_step))


def test_the_same_seed_gives_the_same_plan_and_another_another() -> None:
    first, again, other = plan(Table(100)), plan(Table(100)), plan(Table(100), seed=1)
    assert np.array_equal(dealt(first, 1), dealt(again, 1))
    assert not np.array_equal(dealt(first, 1), dealt(other, 1))
    assert not np.array_equal(dealt(first, 0), dealt(first, 1))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert first.fingerprint() != plan(Table(100), lengths=lengths_of(Table(100), seed=9)).fingerprint()
    assert first.fingerprint() != plan(Table(100), shares_per_step=2).fingerprint()


def test_rows_from_any_step_are_a_slice_of_all_rows() -> None:
    of = plan(Table(90))
    everything = list(of.rows(0, 2 * of.steps_per_epoch))
    assert [(row["step"], row["micro_batch"]) for row in everything[:3]] == [(0, 0), (0, 1), (1, 0)]
    for start in range(0, 2 * of.steps_per_epoch, 5):
        assert list(plan(Table(90)).rows(start, 2 * of.steps_per_epoch)) == everything[2 * start :]


def test_similar_lengths_stand_together() -> None:
    """Padding is far below that of a random deal, and steps are not sorted by length."""

    def padding(of: Plan) -> float:
        batches = dealt(of, 0).reshape(-1, 4)
        lengths = of.lengths[batches].astype(float)
        return float((lengths.max(1, keepdims=True) - lengths).sum())

    grouped, random = plan(Table(4000), group_by_length=True), plan(Table(4000))
    assert padding(grouped) < 0.05 * padding(random)
    of_steps = grouped.lengths[dealt(grouped, 0)].reshape(-1, 8).mean(1)
    assert abs(np.corrcoef(of_steps, np.arange(len(of_steps)))[0, 1]) < 0.15


@pytest.mark.parametrize(("size", "per_step", "workers"), [(2, 2, 2), (4, 2, 2), (1, 8, 2), (2, 8, 4), (3, 4, 4)])
def test_workers_have_about_as_much_to_do_in_a_step(size: int, per_step: int, workers: int) -> None:
    """Micro-batches are dealt to them in turn; and steps are no less alike than if they were drawn at random."""
    of = plan(Table(40_000), size=size, per_step=per_step, shares_per_step=workers)
    steps = np.stack([of.micro_batches(step) for step in range(of.steps_per_epoch // WINDOW_STEPS * WINDOW_STEPS)])
    lengths = of.lengths[steps].astype(float)  # of whole windows
    of_workers = lengths.sum(2).reshape(len(steps), -1, workers).sum(1)
    assert (of_workers.max(1) / of_workers.mean(1)).mean() < 1.01
    of_steps = lengths.reshape(len(steps), -1).mean(1)
    assert np.std(of_steps) < 1.2 * of.lengths.std() / (size * per_step) ** 0.5
    of_windows = of_steps.reshape(-1, of._window_steps).mean(1)  # within one, steps are alike
    assert abs(np.corrcoef(of_windows, np.arange(len(of_windows)))[0, 1]) < 3 / len(of_windows) ** 0.5


def test_single_samples_are_dealt_at_random() -> None:
    of = plan(Table(4000), size=1, per_step=4, shares_per_step=4)
    of_steps = of.lengths[dealt(of, 0)].reshape(-1, 4).mean(1)
    assert np.std(of_steps) == pytest.approx(of.lengths.std() / 2, rel=0.1)


def test_tokens_are_estimated_from_samples() -> None:
    assert Tokens.fitted([1, 0, 2], [100, 40, 60], [665, 26, 1239]) == Tokens(600, 0.65)
    assert Tokens.fitted([0, 0], [100, 40], [50, 20]) == Tokens(0, 0.5)  # no image among them
    assert Tokens.fitted([1], [0], [300]).per_byte > 0  # no text among them: still, longer is more


def test_weights_say_how_often_an_epoch_sees_a_row() -> None:
    """0.5: two epochs see every row once; 2.5: two epochs see every row five times."""
    of = plan(Table(10, 0.5), Table(6, 2.5))
    assert of.samples_per_epoch == 5 + 15
    samples = np.concatenate([dealt(of, 0), dealt(of, 1)])
    counts = np.bincount(samples[samples != NO_SAMPLE], minlength=16)
    assert (counts[:10] == 1).all() and (counts[10:] == 5).all()


def test_the_first_samples_of_the_mixture_keep_its_proportions() -> None:
    assert [t.rows for t in first_of_mixture([Table(1000), Table(100), Table(3, 100.0)], 140)] == [124, 13, 3]
    assert [t.rows for t in first_of_mixture([Table(5), Table(3)], 100)] == [5, 3]
    assert [t.rows for t in first_of_mixture([Table(900), Table(100)], 10)] == [9, 1]
    assert sum(t.rows for t in first_of_mixture([Table(900), Table(100)], 1)) == 1


def test_samples_are_found_in_their_tables() -> None:
    of = plan(Table(3), Table(0), Table(4))
    assert [of.locate(i) for i in range(7)] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2), (2, 3)]


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="there is no row in any of them"):
        plan(Table(0))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 65537])
def test_a_permutation_has_everything_once(size: int) -> None:
    everything = permuted(np.arange(size), size, key_of(1, 2))
    assert sorted(everything) == list(range(size))
    some = np.arange(0, size, 3)
    assert np.array_equal(permuted(some, size, key_of(1, 2)), everything[some])


def test_permutations_are_as_good_as_random() -> None:
    """Over many keys every element comes to every place equally often, neighbours part, and places tell nothing."""
    size, keys = 64, 20_000
    of_key = key_of(5, np.arange(keys))
    many = np.stack([permuted(np.full(keys, place), size, of_key) for place in range(size)], axis=1)
    for place in range(size):
        counts = np.bincount(many[:, place], minlength=size)
        assert (np.abs(counts - keys / size) < 5 * (keys / size) ** 0.5).all()
    follows = np.bincount((np.diff(many) % size).ravel(), minlength=size)[1:]  # 0 cannot be
    assert (np.abs(follows - follows.mean()) < 6 * follows.mean() ** 0.5).all()
    long = permuted(np.arange(100_000), 100_000, key_of(6))
    for apart in (1, 2, 317, 1000):  # 317 columns
        assert abs(np.corrcoef(long[:-apart], long[apart:])[0, 1]) < 0.02
    assert abs(np.corrcoef(long, np.arange(len(long)))[0, 1]) < 0.02


def test_any_step_of_100_million_samples_is_made_by_itself(tmp_path: Path) -> None:
    """No epoch is laid out: a step is a step of its window alone, and what grows with the samples lies in a file."""
    rows = 100_000_000
    lengths = np.lib.format.open_memmap(tmp_path / "lengths.npy", "w+", np.uint16, (rows,))
    tables = [Table(60_000_000), Table(40_000_000, weight=1.5)]
    tracemalloc.start()
    try:
        of = plan(*tables, lengths=lengths, size=8, per_step=512, shares_per_step=512)
        steps = [of.micro_batches(step) for step in (0, 1, of.steps_per_epoch - 1, 3 * of.steps_per_epoch + 777)]
        again = pickle.loads(pickle.dumps(of))
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    assert of.steps_per_epoch == -(-120_000_000 // (8 * 512))
    assert all(step.shape == (512, 8) for step in steps)
    assert len(pickle.dumps(of)) < 10_000 and np.array_equal(again.micro_batches(1), steps[1])


def test_a_step_draws_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its window, however large the global batch."""
    drawn = []
    draw = Plan._drawn
    monkeypatch.setattr(Plan, "_drawn", lambda self, e, a, b: drawn.append(b - a) or draw(self, e, a, b))
    for size, per_step in [(1, 1), (4, 8), (8, 64), (8, 512), (1, 5000)]:
        of = plan(Table(200_000), size=size, per_step=per_step)
        for step in range(of.steps_per_epoch - 3, of.steps_per_epoch):
            of.micro_batches(step)
        assert max(drawn) <= max(WINDOW_SAMPLES, size * per_step) and max(drawn) <= 64 * size * per_step
        drawn.clear()


def test_lengths_may_lie_in_a_file(tmp_path: Path) -> None:
    of = plan(Table(1000), shares_per_step=2)
    mapped = of.with_lengths_in(tmp_path / "lengths.npy")
    for other in (mapped, pickle.loads(pickle.dumps(mapped)), pickle.loads(pickle.dumps(of))):
        assert np.array_equal(dealt(other, 1), dealt(of, 1)) and other.fingerprint() == of.fingerprint()
    assert isinstance(mapped.lengths, np.memmap) and isinstance(pickle.loads(pickle.dumps(mapped)).lengths, np.memmap)


def test_tokens_of_many_rows() -> None:
    """As many as the estimate says, up to the most that is told apart."""
    images, text = np.array([0, 1, 200], dtype=np.int32), np.array([10, 100, 0])
    assert Tokens(600, 0.5).of(images, text).tolist() == [5, 650, LONGEST]
