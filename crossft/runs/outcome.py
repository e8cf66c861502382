"""What a run gains and keeps, from a metric before and after."""

from __future__ import annotations

import math

__all__ = ["gain", "higher_is_better", "retention"]

_ERRORS = frozenset({"mse", "mae", "calibration_error", "loss", "entropy", "dev", "iwcv", "regret", "forgetting"})


def higher_is_better(name: str) -> bool:
    """Whether a larger value of the metric is a better one; ``name`` may be a full key (``target/test/mse``)."""
    parts = [part for part in name.split("/") if part != "before"]
    return not parts or (parts[-1] not in _ERRORS and "regret" not in parts)


def retention(before: float | None, after: float | None, higher_is_better: bool = True) -> float | None:
    """Share of a metric that is kept: after / before, or before / after for an error.

    None where the ratio makes no sense: a value is missing; before is zero or less, or after is negative, as
    correlations and R2 can be; or an error is zero on either side. The difference (``gain``) always stands beside it.

    Example:
        >>> retention(0.8, 0.6)
        0.75
        >>> retention(2.0, 4.0, higher_is_better=False)
        0.5
    """
    if _missing(before) or _missing(after):
        return None
    assert before is not None
    assert after is not None
    if higher_is_better:
        return after / before if before > 0 and after >= 0 else None
    return before / after if before > 0 and after > 0 else None


def gain(before: float | None, after: float | None, higher_is_better: bool = True) -> float | None:
    """Improvement of a metric: after - before, and before - after for an error, so that more is always better.

    None where a value is missing.

    Example:
        >>> gain(0.5, 0.75)
        0.25
    """
    if _missing(before) or _missing(after):
        return None
    assert before is not None
    assert after is not None
    return after - before if higher_is_better else before - after


def _missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)
