"""Diagonal importance of weights: which gradients, per row, its square (Fisher) or absolute value (MAS) sums.

The Fisher information of a model p(y|x, w) at its own weights is F_i = E_x E_y [(d log p(y|x, w) / d w_i)^2], with y
drawn from the *model* (Amari 1998; Kirkpatrick et al. 2017, section 2.1). Every variant is one contraction: the rows of
a matrix C(z) [r, k] are pulled back through the network, and the squares of what arrives are summed,

    F_i = mean over rows of sum over r of (sum over k of C_rk dz_k / dw_i)^2.

For a softmax over k classes, C_r = sqrt(p_r) (e_r - p) gives the expectation over y exactly. The sum of squares
depends on C^T C = diag(p) - p p^T alone, which has rank k - 1, so C is its Cholesky factor instead: k - 1 rows, one
backward pass less (for two classes half of them). Independent Bernoulli labels (multilabel) give
C_j = sqrt(p_j (1 - p_j)) e_j; a Gaussian of unit variance (regression, in standard units) C = 1.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from crossft.errors import ConfigError
from crossft.types import Kind

__all__ = ["FisherLabels", "check_labels", "fisher_cotangents", "mas_cotangents"]

FisherLabels = Literal["exact", "sampled", "empirical", "argmax"]
"""Whose labels the Fisher reads: the model's in expectation (``exact``: k - 1 backward passes), the model's drawn
at random (``sampled``: unbiased), the data's (``empirical``: not the Fisher; small where the model fits), or its most
likely one (``argmax``: biased; Kunstner et al. 2019 and van de Ven 2025 compare them)."""


def check_labels(labels: str, kind: Kind) -> None:
    """Check that a label mode is known and defined for a kind of label space.

    Raises:
        ConfigError: it is not.
    """
    if labels not in get_args(FisherLabels):
        raise ConfigError(f"labels={labels!r} is unknown; allowed: {', '.join(get_args(FisherLabels))}")
    if kind == "regression" and labels in ("empirical", "argmax"):
        raise ConfigError(
            f"labels={labels!r} is not defined for regression; use exact (one backward pass, no draw) or sampled"
        )


def fisher_cotangents(
    logits: Tensor,
    kind: Kind = "multiclass",
    labels: FisherLabels = "exact",
    targets: Tensor | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """What to pull back through the network: gradients of the log-likelihood by the logits, per row and draw.

    Args:
        logits: [b, k]; values [b, 1] for regression.
        kind: ``multiclass`` (softmax), ``multilabel`` (sigmoids) or ``regression`` (unit variance).
        labels: see ``FisherLabels``.
        targets: [b] classes or [b, k] labels; read by ``empirical`` only.
        uniform: [draws, b, k] in (0, 1); read by ``sampled`` only. Only [..., 0] counts for classes.

    Returns:
        [r, b, k] float32, detached: ``exact`` has r = k - 1 (multilabel k, regression 1), ``sampled`` draws, else 1.

    Raises:
        ConfigError: the label mode is unknown or undefined for the kind.
    """
    check_labels(labels, kind)
    z = logits.detach().float()
    if labels == "sampled" and uniform is None:
        raise ConfigError("labels='sampled' needs uniform numbers [draws, b, k], one set a row")
    if labels == "empirical" and targets is None:
        raise ConfigError("labels='empirical' needs the rows' targets")
    if kind == "regression":
        if uniform is None or labels == "exact":
            return torch.ones_like(z).unsqueeze(0)
        normal = math.sqrt(2.0) * torch.erfinv(2.0 * uniform.to(z) - 1.0)
        return normal / math.sqrt(len(uniform))
    if kind == "multilabel":
        return _bernoulli(z.sigmoid(), labels, targets, uniform)
    return _categorical(z.softmax(1), labels, targets, uniform)


def _categorical(p: Tensor, labels: FisherLabels, targets: Tensor | None, uniform: Tensor | None) -> Tensor:
    classes = torch.arange(p.shape[1], device=p.device)
    if labels == "exact":
        return _cholesky(p)
    if labels == "sampled":
        assert uniform is not None
        drawn = (p.cumsum(1) < uniform[..., :1].to(p)).sum(2).clamp(max=p.shape[1] - 1)
        return ((drawn.unsqueeze(2) == classes).to(p) - p) / math.sqrt(len(uniform))
    chosen = p.argmax(1) if labels == "argmax" else targets
    assert chosen is not None
    return ((chosen.unsqueeze(1) == classes).to(p) - p).unsqueeze(0)


def _cholesky(p: Tensor) -> Tensor:
    """[k - 1, b, k] with C^T C = diag(p) - p p^T for each row of p [b, k] (Tanabe & Sagae 1992, theorem 1).

    With the tails q_i = p_{i+1} + ... + p_k: C_ii = sqrt(p_i q_i / q_{i-1}), C_ij = -p_j sqrt(p_i / (q_{i-1} q_i)) for
    j > i. A class whose tail is 0 has no row.
    """
    k = p.shape[1]
    if k == 1:
        return torch.zeros_like(p).unsqueeze(0)
    tails = p.flip(1).cumsum(1).flip(1)  # q_{i-1}; summed from the end, so that a small tail keeps its digits
    before, after = tails[:, :-1], tails[:, 1:]
    share = (p[:, :-1] / before.clamp(min=torch.finfo(p.dtype).tiny)).sqrt()
    off = -p.unsqueeze(1) / after.sqrt().clamp(min=1e-30).unsqueeze(2)  # [b, i, j]
    rows = torch.diag_embed(after.sqrt(), dim1=1, dim2=2)
    diagonal = torch.nn.functional.pad(rows, (0, 1))
    upper = torch.ones(k - 1, k, dtype=torch.bool, device=p.device).triu(1)
    c = share.unsqueeze(2) * torch.where(upper, off, diagonal)
    return c.transpose(0, 1)


def _bernoulli(p: Tensor, labels: FisherLabels, targets: Tensor | None, uniform: Tensor | None) -> Tensor:
    if labels == "exact":
        return torch.eye(p.shape[1], device=p.device).unsqueeze(1) * (p * (1.0 - p)).sqrt()
    if labels == "sampled":
        assert uniform is not None
        return ((uniform.to(p) < p).to(p) - p) / math.sqrt(len(uniform))
    chosen = p > 0.5 if labels == "argmax" else targets
    assert chosen is not None
    return (chosen.to(p) - p).unsqueeze(0)


def mas_cotangents(outputs: Tensor) -> Tensor:
    """Gradient of the squared length of the outputs, 2 f(x), [1, b, k] (Aljundi et al. 2018, eq. 3 with the l2 norm).

    MAS takes the mean absolute value of what arrives at the weights, so it is used with ``power=1``; it needs no label.

    Args:
        outputs: [b, k] logits, or features where there is no head.
    """
    return 2.0 * outputs.detach().float().unsqueeze(0)
