"""Means over seeds, and paired differences to a baseline, with what can and cannot be said from few seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from scipy import special

__all__ = [
    "Comparison",
    "Interval",
    "compare_paired",
    "hedges_correction",
    "holm",
    "interval",
    "permutation_p",
    "smallest_p",
]

_EXACT = 12
_DRAWS = 20_000
_RESOLUTION = 1e-6


class Interval(NamedTuple):
    """A mean over seeds: standard deviation (n - 1), half of its 95 % t-interval, and number of seeds.

    ``sd`` and ``half`` are NaN for one seed, all but ``n`` for none.
    """

    mean: float
    sd: float
    half: float
    n: int


class Comparison(NamedTuple):
    """An arm against the baseline over the seeds that both have.

    Attributes:
        difference: mean of arm - baseline, with its interval.
        p: two-sided, of the paired permutation test.
        d_z: Cohen's d for paired differences, mean / standard deviation of the differences.
        g: ``d_z`` with Hedges' correction for few seeds.
    """

    difference: Interval
    p: float
    d_z: float
    g: float


def interval(values: Sequence[float]) -> Interval:
    """Mean, standard deviation and half 95 % t-interval of the values that are not NaN."""
    kept = np.array([v for v in values if v is not None and math.isfinite(v)], dtype=np.float64)
    n = len(kept)
    nan = float("nan")
    if n < 2:
        return Interval(float(kept[0]) if n else nan, nan, nan, n)
    sd = float(kept.std(ddof=1))
    return Interval(float(kept.mean()), sd, float(special.stdtrit(n - 1, 0.975)) * sd / math.sqrt(n), n)


def permutation_p(differences: Sequence[float], noise: float = 0.0) -> float:
    """Two-sided p of paired differences under random signs (Fisher's test); NaN for none.

    Exact over all 2^n signs up to 12 pairs; above, over 20,000 signs drawn from a fixed seed, the observed one
    included (Phipson & Smyth 2010).

    Args:
        differences: one a pair.
        noise: sums that lie no further apart count as equal.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if not n:
        return float("nan")
    observed = abs(values.sum())
    tolerance = max(1e-9 * float(np.abs(values).sum()), noise)
    extreme = np.abs(_signs(n) @ values) >= observed - tolerance
    return float(extreme.mean()) if n <= _EXACT else float((extreme.sum() + 1) / (_DRAWS + 1))


@cache
def _signs(n: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """All signs of n pairs, [2^n, n], or as many as are drawn for more pairs than 12."""
    if n <= _EXACT:
        return np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    return np.random.default_rng(0).choice((1.0, -1.0), size=(_DRAWS, n))


def smallest_p(pairs: int) -> float:
    """The smallest two-sided p that the permutation test can give: 2 / 2^n. Three seeds cannot go below 0.25."""
    return 2.0 ** (1 - pairs) if pairs else 1.0


def hedges_correction(degrees: int) -> float:
    """Hedges' exact factor against the bias of Cohen's d (Hedges 1981, eq. 6e), for ``degrees`` of freedom."""
    if degrees < 2:
        return float("nan")
    log = special.gammaln(degrees / 2) - special.gammaln((degrees - 1) / 2) - 0.5 * math.log(degrees / 2)
    return float(math.exp(log))


def compare_paired(arm: Mapping[Any, float], baseline: Mapping[Any, float]) -> Comparison | None:
    """Compare an arm with the baseline, paired by seed; None where nothing is in both.

    Args:
        arm: value by seed; ``baseline`` the same. NaN counts as missing. Metrics are computed in
            32 bits, so differences below 1e-6 of the values count as none, and effect sizes over such are NaN.
    """
    pairs = [(arm[s], baseline[s]) for s in arm if s in baseline]
    pairs = [(a, b) for a, b in pairs if math.isfinite(a - b)]
    if not pairs:
        return None
    differences = [a - b for a, b in pairs]
    noise = _RESOLUTION * max(abs(value) for pair in pairs for value in pair)
    found = interval(differences)
    d_z = found.mean / found.sd if found.n > 1 and found.sd > noise else float("nan")
    return Comparison(found, permutation_p(differences, len(pairs) * noise), d_z, d_z * hedges_correction(found.n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values for their number (Holm 1979); NaN stays NaN and does not count."""
    p = np.asarray(p_values, dtype=np.float64)
    order = [i for i in np.argsort(p, kind="stable") if not math.isnan(p[i])]
    adjusted = np.full(len(p), np.nan)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, float(p[i]) * (len(order) - rank)))
        adjusted[i] = highest
    return [float(v) for v in adjusted]
