"""Averages of whole models, as state dicts: interpolation, soups, running means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from crossft.errors import CheckpointError, ConfigError

__all__ = ["average", "blended", "greedy_soup", "interpolate", "warmed_decay"]

State = Mapping[str, Tensor]


def blended(state: State) -> list[str]:
    """Names of the entries that an average may blend: floating-point ones. Counters, indices and masks are not."""
    return [name for name, tensor in state.items() if tensor.is_floating_point()]


def _check(states: Sequence[State]) -> None:
    first = states[0]
    for other in states[1:]:
        if other.keys() != first.keys():
            odd = sorted(set(first) ^ set(other))[0]
            raise CheckpointError(f"the models differ: {odd!r} is in one of them only; average runs of one backbone")
        for name, tensor in first.items():
            if tensor.shape != other[name].shape or tensor.dtype != other[name].dtype:
                raise CheckpointError(
                    f"the models differ: {name!r} is {tuple(tensor.shape)} {tensor.dtype} in one, "
                    f"{tuple(other[name].shape)} {other[name].dtype} in another; average runs of one backbone"
                )


def interpolate(start: State, end: State, alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) start + alpha end (Wortsman et al. 2022, WiSE-FT, eq. 2), exactly the one or the other at 0 and 1.

    Entries that are not floating-point are never blended: they are the end's, or the start's at 0. BatchNorm's running
    statistics are floating-point, so they are blended; the statistics of a blend are not the blend of statistics, so
    re-estimate them where the two differ (``crossft.backbones.batchnorm.reestimate_``).

    Args:
        start: a state dict.
        end: one with the same names, shapes and types.
        alpha: any number; outside [0, 1] it extrapolates.

    Raises:
        CheckpointError: the two do not fit.

    Example:
        >>> a, b = {"w": torch.tensor([0.0]), "n": torch.tensor(1)}, {"w": torch.tensor([4.0]), "n": torch.tensor(9)}
        >>> interpolate(a, b, 0.25)
        {'w': tensor([1.]), 'n': tensor(9)}
    """
    _check([start, end])
    if alpha in (0.0, 1.0):
        return {name: tensor.clone() for name, tensor in (start if alpha == 0.0 else end).items()}
    names = set(blended(start))
    return {
        name: torch.lerp(start[name].float(), tensor.float(), alpha).to(tensor.dtype)
        if name in names and tensor.dtype != torch.float64
        else torch.lerp(start[name], tensor, alpha)
        if name in names
        else tensor.clone()
        for name, tensor in end.items()
    }


def average(states: Sequence[State], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Weighted mean of models (Wortsman et al. 2022, Model Soups, section 2); what is not floating-point is the last's.

    Args:
        states: state dicts with the same names, shapes and types.
        weights: one a model, not negative, scaled to add up to 1. Default: all equal, a uniform soup.

    Raises:
        ConfigError: no model, or weights that do not fit.
        CheckpointError: the models do not fit.
    """
    if not states:
        raise ConfigError("no model to average: give at least one checkpoint")
    shares = [1.0] * len(states) if weights is None else list(weights)
    if len(shares) != len(states) or min(shares) < 0.0 or sum(shares) <= 0.0:
        raise ConfigError(f"weights={shares} must be {len(states)} numbers >= 0 that do not add up to 0, one a model")
    _check(states)
    total, last = sum(shares), states[-1]
    names = set(blended(last))
    out: dict[str, Tensor] = {}
    for name, tensor in last.items():
        if name in names:
            parts = [s[name].double() * (w / total) for s, w in zip(states, shares, strict=True)]
            out[name] = torch.stack(parts).sum(0).to(tensor.dtype)
        else:
            out[name] = tensor.clone()
    return out


def greedy_soup(states: Sequence[State], score: Callable[[State], float]) -> tuple[dict[str, Tensor], list[int]]:
    """The greedy soup (Wortsman et al. 2022, Model Soups, recipe 1).

    Models are sorted by their own score; each is added to the soup if the soup's score does not fall.

    Args:
        states: state dicts that fit.
        score: of a model, higher is better; called once a model and once an attempt. Measure it on validation data.

    Returns:
        The soup, and the positions of its ingredients in the order they were added.
    """
    if not states:
        raise ConfigError("no model to average: give at least one checkpoint")
    own = [score(state) for state in states]
    order = sorted(range(len(states)), key=lambda i: -own[i])
    chosen, best = [order[0]], own[order[0]]
    for i in order[1:]:
        attempt = score(average([states[j] for j in [*chosen, i]]))
        if attempt >= best:
            chosen, best = [*chosen, i], attempt
    return average([states[i] for i in chosen]), chosen


def warmed_decay(decay: float, updates: int) -> float:
    """min(decay, (1 + t) / (10 + t)) at the t-th update, counted from 0: so the start does not weigh for long.

    The rule of TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``, and of timm's with warm-up.
    """
    return min(decay, (1.0 + updates) / (10.0 + updates))
