from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from crossft.data.sampler import EvalSampler, Key, Order, Pool, StepSampler, quotas
from crossft.errors import ConfigError
from crossft.types import PADDING


def pool(n: int, quota: int, name: str = "p", domain: int = 0, labeled: bool = True, start: int = 0, **more) -> Pool:
    return Pool(name, domain, labeled, np.arange(start, start + n), quota, **more)


def global_rows(order: Order, step: int) -> list[int]:
    """Rows of a whole optimizer step, as its micro-batches hold them; padding left out."""
    slots = [(m, r) for m in range(order.accumulation) for r in range(order.world)]
    return [k.row for m, r in slots for k in order.micro(step, m, r) if k.domain != PADDING]


@pytest.mark.parametrize(
    ("shares", "size", "expected"),
    [
        ([1, 1], 32, [16, 16]),
        ([1, 1], 5, [3, 2]),
        ([0.7, 0.2, 0.1], 10, [7, 2, 1]),
        ([1, 1, 1], 8, [3, 3, 2]),
        ([0.05, 0.95], 8, [0, 8]),
        ([3], 7, [7]),
    ],
)
def test_quotas_are_exact_integers_by_largest_remainder(shares, size, expected):
    assert quotas(shares, size) == expected


@pytest.mark.parametrize(
    ("n", "quota", "world", "accumulation"), [(37, 8, 1, 1), (37, 4, 2, 2), (3, 4, 2, 2), (32, 8, 2, 2)]
)
def test_one_pool_gives_each_row_once_an_epoch(n, quota, world, accumulation):
    order = Order((pool(n, quota),), 1, world, accumulation)
    assert order.steps_per_epoch == -(-n // (quota * world * accumulation))
    seen = []
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        rows = [r for s in steps for r in global_rows(order, s)]
        assert sorted(rows) == list(range(n))
        seen.append(rows)
    assert n < 4 or (seen[0] != seen[1] != seen[2])


def test_a_step_holds_the_same_rows_however_it_is_divided():
    """1x1, 1x4, 2x1, 2x2 at one global batch of 16 + 16 rows: equal rows, equal draws, quotas that divide."""
    grids = [(1, 1, 16), (1, 4, 4), (2, 1, 8), (2, 2, 4), (4, 1, 4)]
    orders = []
    for world, accumulation, quota in grids:
        lengths = np.arange(60) * 7 % 31
        mixed = (pool(60, quota, "a", lengths=lengths), pool(23, quota, "b", 1, labeled=False, start=60))
        orders.append(Order(mixed, 2, world, accumulation, seed=3))
    for step in range(3 * orders[0].steps_per_epoch):
        want = orders[0].step(step)
        for order in orders[1:]:
            got = order.step(step)
            for (r1, d1), (r2, d2) in zip(want, got):
                assert r1.tolist() == r2.tolist()
                assert d1.tolist() == d2.tolist()
            assert sorted(global_rows(order, step)) == sorted(np.concatenate([r for r, _ in want]).tolist())


def test_slots_are_cut_in_the_order_micro_then_rank():
    order = Order((pool(16, 2),), 1, world=2, accumulation=2)
    rows = order.step(0)[0][0].tolist()
    cut = [[k.row for k in order.micro(0, m, r)] for m in (0, 1) for r in (0, 1)]
    assert cut == [rows[0:2], rows[2:4], rows[4:6], rows[6:8]]


def test_ragged_step_states_its_true_quota_and_pads_empty_slots():
    order = Order((pool(9, 2),), 2, world=2, accumulation=2)
    full, last = order.micro(0, 0, 0)[0].info, order.micro(1, 0, 0)[0].info
    assert (full.quota, full.labeled_quota) == ((2.0, 0.0), 2.0)
    assert (last.quota, last.labeled_quota) == ((0.25, 0.0), 0.25)
    batches = [order.micro(1, m, r) for m in (0, 1) for r in (0, 1)]
    real = [k for b in batches for k in b if k.domain != PADDING]
    assert [len(b) for b in batches] == [1, 1, 1, 1]
    assert len(real) == 1
    assert all(k.row == real[0].row for b in batches for k in b)


def test_longest_pool_leads_and_the_others_run_on():
    pools = (pool(20, 2, "a"), pool(7, 6, "b", 1, labeled=False, start=20))
    order = Order(pools, 2)
    assert (order.leader, order.steps_per_epoch) == (0, 10)
    counts = Counter(r for s in range(7) for r in order.step(s)[1][0].tolist())
    assert set(counts.values()) == {6}, "7 steps of 6 rows are exactly 6 passes of 7 rows"
    assert Order(pools, 2, epoch="shortest").steps_per_epoch == 2
    assert Order(pools, 2, epoch=1).leader == 1
    quota = order.micro(0, 0, 0)[0].info
    assert (quota.quota, quota.labeled_quota) == ((2.0, 6.0), 2.0)


def test_every_step_resumes_to_the_same_keys():
    """A sampler started at any step yields exactly what the uninterrupted one yields from there."""
    pools = (pool(21, 4, "a", lengths=np.arange(21) % 5), pool(9, 4, "b", 1, start=21))
    whole = StepSampler(Order(pools, 2, world=2, accumulation=2, length_window=2), rank=1)
    epochs = [list(whole), list(whole)]
    assert [len(e) for e in epochs] == [len(whole)] * 2
    stream = epochs[0] + epochs[1]
    per_epoch = len(whole) // 2
    for step in range(2 * per_epoch):
        again = StepSampler(Order(pools, 2, world=2, accumulation=2, length_window=2), rank=1)
        again.next_step = step
        end = (step // per_epoch + 1) * per_epoch
        assert list(again) == stream[2 * step : 2 * end]
        assert again.next_step == end


def test_a_clock_decides_where_an_iteration_starts():
    clock = [0]
    sampler = StepSampler(Order((pool(10, 2),), 1), clock=lambda: clock[0])
    first = list(sampler)
    assert list(sampler) == first, "an iterator that was thrown away changes nothing"
    clock[0] = 3
    assert list(sampler) == first[3:]
    clock[0] = 5
    assert next(iter(sampler))[0].info.step == 5


def test_order_depends_on_seed_and_pool_name():
    def rows(**kw) -> list[int]:
        return Order((pool(50, 50, kw.pop("name", "p")),), 1, **kw).step(0)[0][0].tolist()

    assert rows() == rows()
    assert rows() != rows(seed=1)
    assert rows() != rows(name="q")


def test_class_balanced_draws_are_even_and_cover_every_row():
    classes = np.array([0] * 30 + [1] * 6)
    order = Order((pool(36, 4, classes=classes),), 1)
    drawn = np.concatenate([order.step(s)[0][0] for s in range(order.steps_per_epoch)])
    assert len(drawn) == 36
    assert np.bincount(classes[drawn]).tolist() == [18, 18]
    assert np.bincount(drawn[classes[drawn] == 1] - 30).tolist() == [3] * 6
    later = np.concatenate([order.step(s)[0][0] for s in range(5 * order.steps_per_epoch)])
    assert set(later.tolist()) == set(range(36))
    keys = [(r, d) for s in range(40) for r, d in zip(*(a.tolist() for a in order.step(s)[0]))]
    assert len(set(keys)) == len(keys), "a repeated row has another draw number, so another augmentation"


def test_texts_of_similar_length_share_a_step_and_steps_stay_shuffled():
    lengths = np.random.default_rng(0).integers(5, 100, 333)
    plain, windowed = Order((pool(333, 8),), 1), Order((pool(333, 8, lengths=lengths),), 1, length_window=16)

    def padded(order: Order) -> int:
        steps = [order.step(s)[0][0] for s in range(order.steps_per_epoch)]
        return sum(int(lengths[s].max()) * len(s) for s in steps)

    assert padded(windowed) < 0.75 * padded(plain)
    assert padded(windowed) >= int(lengths.sum())
    means = [lengths[windowed.step(s)[0][0]].mean() for s in range(16)]
    assert means != sorted(means)
    every = sorted(r for s in range(windowed.steps_per_epoch) for r in windowed.step(s)[0][0].tolist())
    assert every == list(range(333))
    last = windowed.step(windowed.steps_per_epoch - 1)[0][0]
    assert sorted(last.tolist()) == sorted(plain.step(plain.steps_per_epoch - 1)[0][0].tolist()), (
        "the ragged tail stays"
    )


@pytest.mark.parametrize(("n", "world", "size"), [(10, 1, 4), (10, 3, 2), (1, 4, 8), (16, 4, 2)])
def test_evaluation_reads_each_row_once_with_equal_batches(n, world, size):
    samplers = [EvalSampler(np.arange(100, 100 + n), 1, size, rank, world) for rank in range(world)]
    assert len({len(s) for s in samplers}) == 1
    keys = [k for s in samplers for batch in s for k in batch]
    assert sorted(k.row for k in keys if k.domain == 1) == list(range(100, 100 + n))
    assert all(isinstance(k, Key) and k.info.step == -1 for k in keys)
    assert len({tuple(len(b) for b in s) for s in samplers}) == 1


def test_empty_pools_and_zero_quotas_are_refused():
    for bad in ((), (pool(3, 0),), (pool(0, 2),)):
        with pytest.raises(ConfigError, match="quota of at least one row"):
            Order(bad, 1)
