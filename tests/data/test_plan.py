"""The plan: every sample once an epoch, the same from the same seed, similar lengths together."""

from typing import Any

import numpy as np
import pytest

from vlskv_ray.data.plan import NO_SAMPLE, WINDOW_STEPS, Plan, Table, Tokens, first_of_mixture


def table(rows: int, weight: float = 1.0, seed: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    return Table(rng.integers(0, 3, rows).astype(np.int32), rng.integers(1, 500, rows), weight)


def plan(*tables: Table, size: int = 4, per_step: int = 2, seed: int = 0, **options: Any) -> Plan:
    return Plan(tables, seed=seed, micro_batch_size=size, micro_batches_per_step=per_step, **options)


def dealt(of: Plan, epoch: int) -> np.ndarray:
    steps = range(epoch * of.steps_per_epoch, (epoch + 1) * of.steps_per_epoch)
    return np.concatenate([of.micro_batches(step).ravel() for step in steps])


@pytest.mark.parametrize("rows", [(1,), (7, 1), (8,), (64, 3), (1000, 77)])
@pytest.mark.parametrize(("size", "per_step"), [(1, 1), (4, 2), (3, 5)])
@pytest.mark.parametrize("group_by_length", [False, True])
def test_an_epoch_deals_every_sample_once(
    rows: tuple[int, ...], size: int, per_step: int, group_by_length: bool
) -> None:
    tables = [table(n, seed=i) for i, n in enumerate(rows)]
    of = plan(*tables, size=size, per_step=per_step, group_by_length=group_by_length)
    for epoch in range(3):
        samples = dealt(of, epoch)
        assert sorted(samples[samples != NO_SAMPLE]) == list(range(sum(rows)))
        assert len(samples) == of.steps_per_epoch * size * per_step
    assert of.steps_per_epoch == -(-sum(rows) // (size * per_step))


def test_the_same_seed_gives_the_same_plan_and_another_another() -> None:
    first, again, other = plan(table(100)), plan(table(100)), plan(table(100), seed=1)
    assert np.array_equal(dealt(first, 1), dealt(again, 1))
    assert not np.array_equal(dealt(first, 1), dealt(other, 1))
    assert not np.array_equal(dealt(first, 0), dealt(first, 1))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert first.fingerprint() != plan(table(100, seed=9)).fingerprint()
    assert first.fingerprint() != plan(table(100), shares_per_step=2).fingerprint()


def test_rows_from_any_step_are_a_slice_of_all_rows() -> None:
    of = plan(table(90))
    everything = list(of.rows(0, 2 * of.steps_per_epoch))
    assert [(row["step"], row["micro_batch"]) for row in everything[:3]] == [(0, 0), (0, 1), (1, 0)]
    for start in range(0, 2 * of.steps_per_epoch, 5):
        assert list(plan(table(90)).rows(start, 2 * of.steps_per_epoch)) == everything[2 * start :]


def test_similar_lengths_stand_together() -> None:
    """Padding is far below that of a random deal, and steps are not sorted by length."""

    def padding(of: Plan) -> float:
        batches = dealt(of, 0).reshape(-1, 4)
        lengths = of.tables[0].num_images[batches] * 1000 + of.tables[0].text_bytes[batches]
        return float((lengths.max(1, keepdims=True) - lengths).sum())

    grouped, random = plan(table(4000), group_by_length=True), plan(table(4000))
    assert padding(grouped) < 0.05 * padding(random)
    images = grouped.tables[0].num_images[dealt(grouped, 0)].reshape(-1, 8).mean(1)
    assert abs(np.corrcoef(images, np.arange(len(images)))[0, 1]) < 0.15


@pytest.mark.parametrize(("size", "per_step", "workers"), [(2, 2, 2), (4, 2, 2), (1, 8, 2), (2, 8, 4), (3, 4, 4)])
def test_workers_have_about_as_much_to_do_in_a_step(size: int, per_step: int, workers: int) -> None:
    """Micro-batches are dealt to them in turn; and steps are no less alike than if they were drawn at random."""
    tokens = Tokens(per_image=600, per_byte=0.5)
    of = plan(table(4000), size=size, per_step=per_step, shares_per_step=workers, tokens=tokens)
    lengths = 600 * of.tables[0].num_images + 0.5 * of.tables[0].text_bytes
    steps = np.stack([of.micro_batches(step) for step in range(of.steps_per_epoch - WINDOW_STEPS)])
    lengths = lengths[steps]  # of all but the last window, which may not be full
    of_workers = lengths.sum(2).reshape(len(steps), -1, workers).sum(1)
    assert (of_workers.max(1) / of_workers.mean(1)).mean() < 1.01
    images = of.tables[0].num_images[steps].reshape(len(steps), -1).mean(1)
    assert np.std(images) < 1.2 * of.tables[0].num_images.std() / (size * per_step) ** 0.5
    assert abs(np.corrcoef(images, np.arange(len(images)))[0, 1]) < 0.15


def test_single_samples_are_dealt_at_random() -> None:
    of = plan(table(4000), size=1, per_step=4, shares_per_step=4, tokens=Tokens(600, 0.5))
    steps = np.stack([of.micro_batches(step) for step in range(of.steps_per_epoch)])
    images = of.tables[0].num_images[steps].reshape(len(steps), -1).mean(1)
    assert np.std(images) == pytest.approx(of.tables[0].num_images.std() / 2, rel=0.1)


def test_tokens_are_estimated_from_samples() -> None:
    assert Tokens.fitted([1, 0, 2], [100, 40, 60], [665, 26, 1239]) == Tokens(600, 0.65)
    assert Tokens.fitted([0, 0], [100, 40], [50, 20]) == Tokens(0, 0.5)  # no image among them
    assert Tokens.fitted([1], [0], [300]).per_byte > 0  # no text among them: still, longer is more


def test_weights_say_how_often_an_epoch_sees_a_row() -> None:
    """0.5: two epochs see every row once; 2.5: two epochs see every row five times."""
    of = plan(table(10, 0.5), table(6, 2.5))
    assert of.samples_per_epoch == 5 + 15
    samples = np.concatenate([dealt(of, 0), dealt(of, 1)])
    counts = np.bincount(samples[samples != NO_SAMPLE], minlength=16)
    assert (counts[:10] == 1).all() and (counts[10:] == 5).all()


def test_the_first_samples_of_the_mixture_keep_its_proportions() -> None:
    assert [len(t) for t in first_of_mixture([table(1000), table(100), table(3, 100.0)], 140)] == [124, 13, 3]
    assert [len(t) for t in first_of_mixture([table(5), table(3)], 100)] == [5, 3]
    assert [len(t) for t in first_of_mixture([table(900), table(100)], 10)] == [9, 1]
    assert sum(len(t) for t in first_of_mixture([table(900), table(100)], 1)) == 1


def test_samples_are_found_in_their_tables() -> None:
    of = plan(table(3), table(0), table(4))
    assert [of.locate(i) for i in range(7)] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2), (2, 3)]


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="there is no row in any of them"):
        plan(table(0))
