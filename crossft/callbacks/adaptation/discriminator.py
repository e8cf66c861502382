"""Domain discriminators, and the loss that adversarial methods share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossft.callbacks.adaptation.roles import Ids, ids_of
from crossft.errors import ConfigError
from crossft.functional import upcast
from crossft.tasks import Task
from crossft.types import StepOutput

__all__ = ["check_hidden", "discriminator", "discriminator_classes", "domain_loss"]

_IGNORED = -100
"""The label whose rows ``F.cross_entropy`` gives loss and gradient 0."""


def check_hidden(hidden: int) -> None:
    """Refuse a width below 1.

    Raises:
        ConfigError: it is.
    """
    if hidden < 1:
        raise ConfigError(f"hidden={hidden} must be at least 1: the width of the hidden layers")


def discriminator(num_features: int, hidden: int, classes: int) -> nn.Sequential:
    """Two hidden layers with ReLU: [..., num_features] -> [..., classes]."""
    return nn.Sequential(
        nn.Linear(num_features, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def discriminator_classes(task: Task, multi: bool) -> list[Ids]:
    """Domain ids of each class: source and target, or with ``multi`` every source and target domain on its own."""
    roles = [ids_of(task, "source"), ids_of(task, "target")]
    return [(i,) for ids in roles for i in ids] if multi else roles


def domain_loss(
    step: StepOutput,
    logits: Tensor,
    classes: list[Ids],
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Callable[[], dict[str, Tensor]]]:
    """Cross-entropy of the discriminator, and how it fares; each class counts the same, whatever its rows.

    Args:
        step: the step.
        logits: [b, k], or [b, n, k] where every token is judged: a row's value is then the mean over its tokens.
        classes: domain ids of each of the k classes.
        weights: [b] factors on the rows' losses, or None.
        mask: [b, n] real tokens, or None.

    Returns:
        The mean over classes of the mean cross-entropy of their rows; and what computes, for a step that is logged,
        ``accuracy`` by the same mean, ``above_chance`` (accuracy - 1/k) and ``loss_share``: the cross-entropy without
        weights over log k, 1 where it cannot tell the classes apart.
    """
    logits = upcast(logits)
    tables = _tables(step.batch.quota, tuple(classes), logits.dtype, logits.device)
    labels, shares = (table[step.batch.domains] for table in tables)
    if logits.ndim == 3:
        each = labels[:, None].expand(logits.shape[:-1])
        losses = F.cross_entropy(logits.flatten(0, 1), each.flatten(), reduction="none").view(each.shape)
        losses = _over_tokens(losses, mask)
    else:
        each, losses = labels, F.cross_entropy(logits, labels, reduction="none")
    seen, plainly = logits.detach(), losses.detach()

    def state() -> dict[str, Tensor]:
        hits = (seen.argmax(-1) == each).to(seen.dtype)
        right, k = (_over_tokens(hits, mask) if hits.ndim == 2 else hits) @ shares, max(2, len(classes))
        return {"accuracy": right, "above_chance": right - 1 / k, "loss_share": plainly @ shares / math.log(k)}

    return (losses if weights is None else weights * losses) @ shares, state


@lru_cache(maxsize=64)
def _tables(
    quota: tuple[float, ...], classes: tuple[Ids, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """By domain id: its class, and a row's part of the mean over classes of the means of rows.

    Rows of no class, and padding rows (id -1, the last entry), have the label that cross-entropy ignores, and part 0.
    """
    labels, shares = [_IGNORED] * (len(quota) + 1), [0.0] * (len(quota) + 1)
    for index, ids in enumerate(classes):
        share = 1.0 / (len(classes) * max(sum(quota[i] for i in ids), 1e-12))
        for i in ids:
            labels[i], shares[i] = index, share
    return torch.tensor(labels, device=device), torch.tensor(shares, dtype=dtype, device=device)


def _over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """[b, n] to [b], the mean over real tokens."""
    if mask is None:
        return values.mean(1)
    kept = torch.where(mask, values, torch.zeros_like(values))
    return kept.sum(1) / mask.sum(1).clamp(min=1)
