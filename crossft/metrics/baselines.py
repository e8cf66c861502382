"""Classifiers without fine-tuning that a fine-tuned model must beat, by scikit-learn.

A regression domain gets ridge regression, a multilabel one a logistic regression a label. Training labels alone choose
anything; scikit-learn is imported when a baseline is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossft.types import Domain

__all__ = ["Labeled", "frozen_features", "tfidf"]

Array = NDArray[Any]
Labeled = tuple[Any, Array]
"""Inputs of n rows, and their n targets."""

STRENGTHS = (0.01, 0.1, 1.0)


def tfidf(train: Labeled, tests: Sequence[Sequence[str]], domain: Domain) -> list[Array]:
    """TF-IDF of words and pairs of words, and a logistic regression.

    Words and pairs that occur in two training texts or more, 1 + log(count), C = 10: on amazon4-airline this gives the
    accuracies that are known for it, on all its 20 pairs (books to kitchen .794, kitchen to books .718).

    Args:
        train: texts and targets of the labeled training rows.
        tests: texts to predict.
        domain: its label space.

    Returns:
        For each of ``tests`` probabilities [n, k], or values [n] for regression.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = _classifier(domain, 10.0).fit(vectorizer.fit_transform(train[0]), train[1])
    return [_predicted(model, vectorizer.transform(texts), domain) for texts in tests]


def frozen_features(
    train: Labeled, tests: Sequence[Array], domain: Domain, validation: Labeled | None = None
) -> list[Array]:
    """A logistic regression on standardized features of the pretrained backbone: a linear probe.

    Args:
        train: features [n, d] and targets of the labeled training rows.
        tests: features to predict.
        domain: its label space.
        validation: of the same domains; chooses C among 0.01, 0.1 and 1. None, or regression: 0.1.

    Returns:
        As `tfidf`.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train[0])
    x = scaler.transform(train[0])
    choose = validation is not None and len(validation[1]) and domain.kind == "multiclass"
    models = [_classifier(domain, C).fit(x, train[1]) for C in (STRENGTHS if choose else (0.1,))]
    if choose:
        assert validation is not None
        held = scaler.transform(validation[0])
        models.sort(key=lambda m: -m.score(held, validation[1]))  # the first of equals, so the simplest
    return [_predicted(models[0], scaler.transform(features), domain) for features in tests]


def _classifier(domain: Domain, C: float) -> Any:
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    if domain.kind == "regression":
        return Ridge(alpha=1.0 / C)
    classifier = LogisticRegression(C=C, max_iter=1000)
    return OneVsRestClassifier(classifier) if domain.kind == "multilabel" else classifier


def _predicted(model: Any, x: Any, domain: Domain) -> Array:
    if domain.kind == "regression":
        return np.asarray(model.predict(x), np.float32)
    found = np.asarray(model.predict_proba(x), np.float32)
    if domain.kind == "multilabel":
        return found
    out = np.zeros((len(found), len(domain.labels)), np.float32)  # a class without a training row has probability 0
    out[:, model.classes_.astype(int)] = found
    return out
