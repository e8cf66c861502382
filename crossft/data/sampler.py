"""The order of training rows: a pure function of seed, optimizer step, micro-batch and rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crossft.data.splits import digest
from crossft.errors import ConfigError
from crossft.types import PADDING

__all__ = ["EVALUATION", "EvalSampler", "Key", "Order", "Pool", "StepInfo", "StepSampler", "quotas"]

Ints = NDArray[np.int64]


class StepInfo(NamedTuple):
    """What all rows of one optimizer step share: the step, and rows per micro-batch by domain and labeled."""

    step: int
    quota: tuple[float, ...]
    labeled_quota: float


EVALUATION = StepInfo(-1, (), 0.0)


class Key(NamedTuple):
    """One row of a batch: dataset row, times drawn before, domain id (or padding), step, whether its label is read."""

    row: int
    draw: int
    domain: int
    info: StepInfo
    labeled: bool = True


@dataclass(frozen=True, eq=False)
class Pool:
    """Rows of one domain that are drawn together: its labeled or its unlabeled training rows.

    Attributes:
        name: stable name; seeds the pool's permutations.
        domain: domain id.
        labeled: whether the rows carry labels.
        rows: [n] dataset rows, ordered by sample id.
        quota: rows of each micro-batch of each process.
        classes: [n] class index, for class-balanced draws; None for plain permutations.
        lengths: [n] token counts, to bring texts of similar length together; None for no such order.
        leads: whether a pass over it may make an epoch; a memory's never does.
    """

    name: str
    domain: int
    labeled: bool
    rows: Ints
    quota: int
    classes: Ints | None = None
    lengths: Ints | None = None
    leads: bool = True

    def __len__(self) -> int:
        return len(self.rows)


def quotas(shares: Sequence[float], batch_size: int) -> list[int]:
    """Integers that add up to ``batch_size``, in proportion to ``shares``, by largest remainder (first wins ties)."""
    total = sum(shares)
    exact = [batch_size * s / total for s in shares]
    out = [math.floor(e + 1e-9) for e in exact]
    by_remainder = sorted(range(len(out)), key=lambda i: (round(out[i] - exact[i], 9), i))
    for i in by_remainder[: batch_size - sum(out)]:
        out[i] += 1
    return out


def _rng(*parts: object) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(digest(*parts)))


@dataclass
class Order:
    """Which rows each optimizer step holds, and which of them each micro-batch of each process.

    Every pool is an endless stream of passes, each a permutation of its rows seeded by (seed, pool, pass). An epoch is
    one pass of the leading pool, ragged in its last step; the other streams run on, in full steps. A step's rows of a
    pool are cut contiguously and evenly over ``world * accumulation`` slots, slot = micro * world + rank; so the rows
    of a step do not depend on how the slots are divided into processes and micro-batches.

    Args:
        pools: what is mixed.
        domains: number of domains of the run.
        world: processes.
        accumulation: micro-batches of an optimizer step.
        seed: of the order.
        length_window: steps whose texts are sorted by length together.
        epoch: which pool leads: the one that needs ``longest`` or ``shortest``, or a domain id.
    """

    pools: tuple[Pool, ...]
    domains: int
    world: int = 1
    accumulation: int = 1
    seed: int = 0
    length_window: int = 32
    epoch: str | int = "longest"
    _cache: dict[tuple[object, ...], tuple[Ints, Ints]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.pools or any(p.quota < 1 or not len(p) for p in self.pools):
            raise ConfigError("every pool of the training mix needs rows, and a quota of at least one row")
        steps = [math.ceil(len(p) / (p.quota * self.slots)) for p in self.pools]
        if isinstance(self.epoch, int):
            own = [i for i, p in enumerate(self.pools) if p.domain == self.epoch and p.leads]
            if not own:
                raise ConfigError(f"data.epoch names domain {self.epoch}, which is not in the training mix")
            self.leader = max(own, key=lambda i: steps[i])
        else:
            leading = [s for s, p in zip(steps, self.pools) if p.leads]
            best = max(leading) if self.epoch == "longest" else min(leading)
            self.leader = next(i for i, p in enumerate(self.pools) if p.leads and steps[i] == best)
        self.steps_per_epoch = steps[self.leader]

    @property
    def slots(self) -> int:
        """Micro-batches of one optimizer step over all processes."""
        return self.world * self.accumulation

    def step(self, step: int) -> list[tuple[Ints, Ints]]:
        """Rows and draw numbers of each pool in global optimizer step ``step`` (counted over the whole fit)."""
        return [
            self._leading(p, step) if i == self.leader else self._endless(p, step) for i, p in enumerate(self.pools)
        ]

    def micro(self, step: int, micro: int, rank: int) -> list[Key]:
        """The rows of one micro-batch of one process; one padding row where it would have none."""
        slot, s = micro * self.world + rank, self.slots
        drawn = self.step(step)
        info = self._info(step, drawn)
        keys = []
        for pool, (rows, draws) in zip(self.pools, drawn):
            part = slice(len(rows) * slot // s, len(rows) * (slot + 1) // s)
            keys += [Key(int(r), int(d), pool.domain, info, pool.labeled) for r, d in zip(rows[part], draws[part])]
        if not keys:
            rows, draws = drawn[self.leader]
            keys = [Key(int(rows[0]), int(draws[0]), PADDING, info, False)]
        return keys

    def _info(self, step: int, drawn: list[tuple[Ints, Ints]]) -> StepInfo:
        quota, labeled = [0.0] * self.domains, 0
        for pool, (rows, _) in zip(self.pools, drawn):
            quota[pool.domain] += len(rows) / self.slots
            labeled += len(rows) * pool.labeled
        return StepInfo(step, tuple(quota), labeled / self.slots)

    def _leading(self, pool: Pool, step: int) -> tuple[Ints, Ints]:
        size, n = pool.quota * self.slots, len(pool)
        number, local = divmod(step, self.steps_per_epoch)
        full = n // size
        if pool.lengths is None or local >= full:
            return self._take(pool, number * n + local * size, min(size, n - local * size))
        window = local // self.length_window
        first = window * self.length_window
        return self._sorted(pool, number * n + first * size, min(self.length_window, full - first), local - first)

    def _endless(self, pool: Pool, step: int) -> tuple[Ints, Ints]:
        size = pool.quota * self.slots
        if pool.lengths is None:
            return self._take(pool, step * size, size)
        first = step // self.length_window * self.length_window
        return self._sorted(pool, first * size, self.length_window, step - first)

    def _take(self, pool: Pool, start: int, count: int) -> tuple[Ints, Ints]:
        """Positions start .. start + count of the pool's endless stream: dataset rows, draw numbers."""
        n, stop, parts = len(pool), start + count, []
        while start < stop:
            number, offset = divmod(start, n)
            end = min(n, offset + stop - start)
            rows, draws = self._pass(pool, number)
            parts.append((rows[offset:end], draws[offset:end]))
            start += end - offset
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _sorted(self, pool: Pool, base: int, steps: int, local: int) -> tuple[Ints, Ints]:
        """Step ``local`` of a window of ``steps`` steps from ``base``: sorted by length, cut, the steps shuffled."""

        def make() -> tuple[Ints, Ints]:
            size = pool.quota * self.slots
            rows, draws = self._take(pool, base, steps * size)
            assert pool.lengths is not None
            by_length = np.argsort(pool.lengths[np.searchsorted(pool.rows, rows)], kind="stable").reshape(steps, size)
            order = by_length[_rng(self.seed, pool.name, "window", base).permutation(steps)].reshape(-1)
            return rows[order], draws[order]

        size = pool.quota * self.slots
        rows, draws = self._cached((pool.name, "window", base), make)
        return rows[local * size : (local + 1) * size], draws[local * size : (local + 1) * size]

    def _pass(self, pool: Pool, number: int) -> tuple[Ints, Ints]:
        def make() -> tuple[Ints, Ints]:
            n = len(pool)
            if pool.classes is not None:
                return self._balanced(pool, number)
            order = _rng(self.seed, pool.name, "pass", number).permutation(n)
            return pool.rows[order], np.full(n, number, np.int64)

        return self._cached((pool.name, "pass", number), make)

    def _balanced(self, pool: Pool, number: int) -> tuple[Ints, Ints]:
        """One pass of class-balanced draws: classes in turn, each an endless stream of its own permutations."""
        assert pool.classes is not None
        n = len(pool)
        members = [pool.rows[pool.classes == c] for c in np.unique(pool.classes)]
        turn, index = np.divmod(np.arange(number * n, (number + 1) * n), len(members))
        rows, draws = np.empty(n, np.int64), np.empty(n, np.int64)
        for c, own in enumerate(members):
            mine = index == c
            passes, within = np.divmod(turn[mine], len(own))
            picked = np.empty(len(within), np.int64)
            for p in np.unique(passes):
                order = own[_rng(self.seed, pool.name, "class", c, p).permutation(len(own))]
                picked[passes == p] = order[within[passes == p]]
            rows[mine], draws[mine] = picked, passes
        return rows, draws

    def _cached(self, key: tuple[object, ...], make: Callable[[], tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
        if key not in self._cache:
            while len(self._cache) >= 4 * len(self.pools):
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = make()
        return self._cache[key]


class StepSampler:
    """Batch sampler of one process: micro-batches from the next optimizer step to the end of its epoch.

    Args:
        order: the order of the rows.
        rank: of this process.
        clock: returns the next optimizer step (the trainer's); None lets the sampler count by itself.
    """

    def __init__(self, order: Order, rank: int = 0, clock: Callable[[], int] | None = None) -> None:
        self.order, self.rank, self.clock = order, rank, clock
        self.next_step = 0

    def __len__(self) -> int:
        return self.order.steps_per_epoch * self.order.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        start = self.next_step if self.clock is None else self.clock()
        end = (start // self.order.steps_per_epoch + 1) * self.order.steps_per_epoch
        for step in range(start, end):
            for micro in range(self.order.accumulation):
                yield self.order.micro(step, micro, self.rank)
        self.next_step = end


class EvalSampler:
    """Batch sampler of one domain's evaluation: sequential, cut over processes, as many batches on each.

    Rank r reads rows r, r + world, ...; where there are too few, a padding row stands in.

    Args:
        rows: [n] dataset rows in order.
        domain: domain id.
        batch_size: rows of a batch.
        rank, world: this process and how many there are.
    """

    def __init__(self, rows: Ints, domain: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        share = math.ceil(len(rows) / world)
        mine = [Key(int(r), 0, domain, EVALUATION) for r in rows[rank::world]]
        mine += [Key(int(rows[0]), 0, PADDING, EVALUATION, False)] * (share - len(mine))
        self.batches = [mine[i : i + batch_size] for i in range(0, share, batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)
