"""Splits and label budgets: functions of the split seed and of content, never of paths or order."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from crossft.errors import ConfigError, SplitError

__all__ = [
    "SPLITS",
    "assign",
    "content_overlap",
    "digest",
    "given",
    "pick_fraction",
    "pick_shots",
    "sample_ids",
    "units",
]

SPLITS = ("train", "val", "test")
MASK = (1 << 63) - 1


def digest(*parts: object) -> int:
    """63-bit hash of the parts' text; stable over processes and machines."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big") & MASK


def sample_ids(content: Sequence[int], order: Sequence[Hashable] | None = None) -> NDArray[np.int64]:
    """Sample ids [n]: the content hash for its first row, and a hash of content and occurrence number for repeats.

    Args:
        content: 63-bit content hash of each row.
        order: what decides which of several equal rows comes first (their position where it is None or equal).
    """
    rows = sorted(range(len(content)), key=lambda i: (content[i], str(order[i]) if order else "", i))
    ids = np.zeros(len(content), np.int64)
    before, count = -1, 0
    for i in rows:
        count = count + 1 if content[i] == before else 0
        before = content[i]
        ids[i] = content[i] if count == 0 else digest("repeat", content[i], count)
    return ids


def units(content: Sequence[int], groups: Sequence[Hashable] | None = None) -> NDArray[np.int64]:
    """Unit of each row [n]: rows of equal content, or (transitively) of one group, are in one unit and stay together.

    A unit is named by the smallest content hash in it.
    """
    parent: dict[object, object] = {}

    def root(key: object) -> object:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    if groups is not None:
        for c, g in zip(content, groups):
            parent[root(("content", c))] = root(("group", g))
    names: dict[object, int] = {}
    roots = [root(("content", c)) for c in content]
    for r, c in zip(roots, content):
        names[r] = min(names.get(r, c), c)
    return np.array([names[r] for r in roots], np.int64)


def assign(
    unit: Sequence[int], fractions: Sequence[float], seed: int, strata: Sequence[str] | None = None
) -> NDArray[np.int8]:
    """Split index [n] of each row: units, stratum by stratum in an order drawn by ``seed``, go where most is missing.

    Each run of units is therefore split in the given fractions to within about one unit, within every stratum and
    over all of them.

    Args:
        unit: rows of one unit stay together (`units`).
        fractions: share of each split; they add up to 1.
        seed: the split seed.
        strata: the stratum of each row (a unit takes its smallest); None for a plain draw.
    """
    rows: dict[int, list[int]] = defaultdict(list)
    for i, u in enumerate(unit):
        rows[int(u)].append(i)
    stratum = {u: min(strata[i] for i in r) if strata is not None else "" for u, r in rows.items()}
    have, total = [0.0] * len(fractions), 0
    out = np.zeros(len(unit), np.int8)
    for u in sorted(rows, key=lambda u: (stratum[u], digest(seed, "split", u), u)):
        total += len(rows[u])
        missing = [f * total - h if f > 0 else -math.inf for f, h in zip(fractions, have)]
        best = int(np.argmax(missing))
        have[best] += len(rows[u])
        out[rows[u]] = best
    return out


def given(splits: Sequence[str], name: str, train: bool = True) -> NDArray[np.int8]:
    """Given splits of domain ``name`` as indices [n].

    Raises:
        SplitError: none is train while ``train`` is needed.
    """
    out = np.array([SPLITS.index(s) for s in splits], np.int8)
    if train and not (out == 0).any():
        raise SplitError(f"domain {name!r}: its given splits have no train; rename one, or set data.split=stratified")
    return out


def content_overlap(content: NDArray[np.int64], split: NDArray[np.int8]) -> list[tuple[int, int]]:
    """(row to drop, row it repeats) for every row whose content is also in a later split (train < val < test)."""
    last: dict[int, int] = {}
    for i in np.argsort(split, kind="stable"):
        last[int(content[i])] = int(i)
    return [(i, last[int(u)]) for i, u in enumerate(content) if split[last[int(u)]] != split[i]]


def pick_shots(
    names: Sequence[tuple[str, ...]], ids: NDArray[np.int64], k: int, seed: int, what: str,
    classes: Sequence[str], listed: bool = False,
) -> list[int]:  # fmt: skip
    """Positions of ``k`` rows a class, drawn by ``seed`` and sample id; a larger k keeps those of a smaller one.

    Args:
        names: label names of each row (several where multilabel: a row then counts for each).
        ids: sample ids [n].
        k: rows a class.
        seed: the split seed.
        what: what the rows are, for messages.
        classes: the label names; each must have its rows.
        listed: whether ``data.labels`` names them, for messages.

    Raises:
        ConfigError: a class has fewer than ``k`` rows, or none.
    """
    order = sorted(range(len(ids)), key=lambda i: digest(seed, "shots", ids[i]))
    by_class: dict[str, list[int]] = {name: [] for name in classes}
    for i in order:
        for name in names[i]:
            by_class[name].append(i)
    name = min(by_class, key=lambda n: (len(by_class[n]), n))
    if len(by_class[name]) < k:
        found = len(by_class[name])
        raise ConfigError(
            f"data.shots={k} asks for more labels than {what} has of class {name!r} ({found})"
            f"{', which data.labels names' if listed else ''}; "
            f"{f'lower it to {found} or less' if found else 'add rows of it, or leave data.shots out'}"
        )
    return sorted({i for rows in by_class.values() for i in rows[:k]})


def pick_fraction(names: Sequence[tuple[str, ...]], ids: NDArray[np.int64], share: float, seed: int) -> list[int]:
    """Positions of ``share`` of the rows of every class (at least one each), drawn by ``seed`` and sample id."""
    order = sorted(range(len(ids)), key=lambda i: digest(seed, "shots", ids[i]))
    strata: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i in order:
        strata[names[i]].append(i)
    return sorted(i for rows in strata.values() for i in rows[: max(1, round(share * len(rows)))])
