"""Scores that choose a model for a target without its labels: of predictions, and of importance-weighted losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from crossft.functional.classifier_terms import entropy

__all__ = [
    "deep_embedded_validation",
    "importance_weighted_risk",
    "importance_weights",
    "information_maximization",
    "mean_entropy",
    "soft_neighborhood_density",
]

_CHUNK = 1024


def mean_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions in nats (Morerio et al. 2018, section 3.2): lower is taken for better.

    It is lowest, too, for a model that calls everything one class; ``information_maximization`` is not.

    Args:
        logits: [n, k].
    """
    return entropy(logits).mean()


def information_maximization(logits: Tensor) -> Tensor:
    """Mutual information of inputs and predictions, H(mean p) - mean H(p) (Bridle et al. 1992): higher is better.

    The InfoMax validator of Musgrave et al. 2022. At most log k: predictions that are sure and of every class alike.

    Args:
        logits: [n, k].
    """
    marginal = F.softmax(logits, 1).mean(0)
    found: Tensor = torch.special.entr(marginal).sum() - entropy(logits).mean()
    return found


def soft_neighborhood_density(logits: Tensor, temperature: float = 0.05) -> Tensor:
    """Soft neighborhood density (Saito et al. 2021, section 3): higher is better.

    Softmax outputs of unit length; their cosine similarities, without each row's own, become a distribution over the
    other rows by a softmax at a temperature; the score is the mean entropy of these distributions, at most log (n - 1).

    Args:
        logits: [n, k], n >= 2; NaN for fewer rows.
        temperature: 0.05 in the paper.
    """
    n = len(logits)
    if n < 2:
        return logits.new_tensor(float("nan"))
    rows = F.normalize(F.softmax(logits, 1), dim=1)
    total = rows.new_zeros(())
    for start in range(0, n, _CHUNK):
        part = rows[start : start + _CHUNK] @ rows.T / temperature
        own = torch.arange(len(part), device=part.device)
        part[own, start + own] = float("-inf")
        total = total + torch.special.entr(F.softmax(part, 1)).sum()
    return total / n


def importance_weights(p_target: Tensor, sources: int, targets: int) -> Tensor:
    """Density ratio of target to source from a domain classifier (You et al. 2019, section 4.2; Bickel et al. 2007).

    w(x) = n_s / n_t * p(target | x) / p(source | x). Probabilities are held 1e-6 away from 0 and 1.

    Args:
        p_target: [n] probability that a source row is of the target.
        sources, targets: rows of each that the classifier was fitted on.
    """
    p = p_target.clamp(1e-6, 1 - 1e-6)
    return sources / targets * p / (1 - p)


def importance_weighted_risk(losses: Tensor, weights: Tensor) -> Tensor:
    """Importance-weighted validation, mean of w * loss (IWCV of Sugiyama et al. 2007, with one fold): lower is better.

    Args:
        losses, weights: [n] of the source's validation rows.
    """
    return (weights * losses).mean()


def deep_embedded_validation(losses: Tensor, weights: Tensor) -> Tensor:
    """Deep embedded validation: the same risk with a control variate (You et al. 2019, section 4.3): lower is better.

    mean(w l) + eta * mean(w) - eta, eta = -cov(w l, w) / var(w): the weights' mean is known to be 1, so their deviation
    from it corrects the risk. Where all weights are equal there is nothing to correct.

    Args:
        losses, weights: [n] of the source's validation rows, n >= 2; NaN for fewer.
    """
    if len(losses) < 2:
        return losses.new_tensor(float("nan"))
    weighted = weights * losses
    variance = weights.var()
    if variance == 0:
        return weighted.mean()
    covariance = ((weighted - weighted.mean()) * (weights - weights.mean())).sum() / (len(weights) - 1)
    eta = -covariance / variance
    return weighted.mean() + eta * weights.mean() - eta
