"""Probes on features: cross-fitting against scikit-learn's own, known distances, and what leaks without it."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from crossft.errors import ConfigError
from crossft.metrics.probes import domain_probabilities, proxy_a_distance, reverse_validation

RNG = np.random.default_rng(0)


def test_each_row_is_judged_by_a_classifier_that_has_not_seen_it() -> None:
    source, target = RNG.normal(size=(23, 3)), RNG.normal(size=(31, 3)) + 0.7
    fold = [*(np.arange(23) % 5), *(np.arange(31) % 5)]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, tol=1e-3))
    y = [0] * 23 + [1] * 31
    x = np.concatenate([source, target])
    expected = cross_val_predict(model, x, y, cv=PredefinedSplit(fold), method="predict_proba")[:, 1]
    assert np.allclose(np.concatenate(domain_probabilities(source, target)), expected)


def test_distance_of_equal_and_of_separate_domains() -> None:
    source = RNG.normal(size=(200, 4))
    assert proxy_a_distance(source, RNG.normal(size=(150, 4))) < 0.3
    assert proxy_a_distance(source, RNG.normal(size=(150, 4)) + 20) == 2.0


def test_more_features_than_rows_do_not_look_separate() -> None:
    """A classifier judged on its own rows would tell these apart without an error."""
    source, target = RNG.normal(size=(40, 300)), RNG.normal(size=(40, 300))
    x = np.concatenate([source, target])
    y = [0] * 40 + [1] * 40
    assert make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y).score(x, y) == 1.0
    assert proxy_a_distance(source, target) < 0.7


def test_too_few_rows_are_named() -> None:
    with pytest.raises(ConfigError, match="there are 4 and 9"):
        domain_probabilities(np.zeros((4, 2)), np.zeros((9, 2)))


def test_reverse_validation_knows_swapped_and_collapsed_predictions() -> None:
    labels = np.array([0, 1] * 20)
    source = np.stack([labels * 6.0, RNG.normal(size=40)], 1)
    target = source + RNG.normal(size=source.shape) * 0.1
    assert reverse_validation(target, labels, source, labels) == 1.0
    assert reverse_validation(target, 1 - labels, source, labels) == 0.0
    assert reverse_validation(target, np.zeros(40, int), source, labels) == 0.5
