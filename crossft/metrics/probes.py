"""Small classifiers on frozen features, by scikit-learn: how far domains are apart, and what features are good for.

Features come in as [n, d] arrays; a probe standardizes them. Nothing is drawn: the same rows in the same order give the
same number. scikit-learn is imported when a probe runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossft.errors import ConfigError

__all__ = ["FOLDS", "domain_probabilities", "proxy_a_distance", "reverse_validation"]

Array = NDArray[Any]
FOLDS = 5
"""Folds of a cross-fitted probe, and so the fewest rows of a domain that it takes."""


def _classifier(C: float = 1.0) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=200, tol=1e-3))


def domain_probabilities(source: Array, target: Array, folds: int = FOLDS) -> tuple[Array, Array]:
    """Probability that each row is of the target, by a logistic regression that has not seen the row.

    Cross-fitted: fold i holds rows i, i + folds, ... of each domain. Where You et al. 2019 fit on training features and
    weight validation rows, this fits on the other folds of the rows at hand, which costs no pass over training data.

    Args:
        source: [m, d] features of the source, in an order that says nothing.
        target: [n, d] of the target.
        folds: number of folds.

    Returns:
        [m] and [n] probabilities.

    Raises:
        ConfigError: a domain has fewer rows than there are folds.
    """
    if min(len(source), len(target)) < folds:
        raise ConfigError(
            f"a domain classifier over {folds} folds needs as many rows of each domain; there are {len(source)} and "
            f"{len(target)}: raise the shares in data.splits"
        )
    x = np.concatenate([source, target]).astype(np.float64)
    y = np.repeat([0, 1], [len(source), len(target)])
    fold = np.concatenate([np.arange(len(source)), np.arange(len(target))]) % folds
    out = np.empty(len(x))
    for i in range(folds):
        held = fold == i
        out[held] = _classifier().fit(x[~held], y[~held]).predict_proba(x[held])[:, 1]
    return out[: len(source)], out[len(source) :]


def proxy_a_distance(source: Array, target: Array, folds: int = FOLDS) -> float:
    """Proxy A-distance 2 (1 - 2 error) of a linear domain classifier (Ben-David et al. 2007).

    The error is cross-fitted, and each domain counts half of it. 0: not to be told apart; 2: always.

    Args:
        source, target, folds: as for `domain_probabilities`.

    Raises:
        ConfigError: as there.
    """
    p_source, p_target = domain_probabilities(source, target, folds)
    error = 0.5 * float((p_source >= 0.5).mean() + (p_target < 0.5).mean())
    return max(0.0, 2.0 * (1.0 - 2.0 * error))


def reverse_validation(target: Array, predicted: Array, source: Array, labels: Array) -> float:
    """Reverse validation on features (Zhong et al. 2010; Ganin et al. 2016, section 5.1.2): higher is better.

    A classifier is fitted to the target's features with the model's own predictions as labels, and its accuracy on
    labeled source rows is the score. The papers train a whole reverse *network* with adaptation; this trains a logistic
    regression on the features there are, so it says whether the adapted features carry the same classes both ways.

    Args:
        target: [n, d] features of the target.
        predicted: [n] classes the model predicts there.
        source: [m, d] features of labeled source rows.
        labels: [m] their classes.

    Returns:
        Accuracy on the source; that of a constant where a single class is predicted.
    """
    classes = np.unique(predicted)
    if len(classes) == 1:
        return float((labels == classes[0]).mean())
    reverse = _classifier().fit(target.astype(np.float64), predicted)
    return float((reverse.predict(source.astype(np.float64)) == labels).mean())
