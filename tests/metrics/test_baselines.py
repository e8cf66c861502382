"""Baselines: known accuracies on real reviews, a class without a row, other kinds of labels."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from crossft.metrics.baselines import frozen_features, tfidf
from crossft.types import Domain

DATA = Path(os.environ.get("CROSSFT_DATA", "../shared/data")) / "amazon4-airline"
RNG = np.random.default_rng(0)


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="needs amazon4-airline in CROSSFT_DATA")
def test_known_accuracies_on_reviews() -> None:
    """1,700 source rows, all 2,000 rows of the target."""
    expected = {"books": {"dvd": .807, "electronics": .757, "kitchen": .794, "airline": .700},
                "kitchen": {"books": .718, "dvd": .744, "electronics": .848, "airline": .680}}  # fmt: skip
    rows = {p.stem: [json.loads(line) for line in p.open()] for p in DATA.glob("*.jsonl")}
    names = sorted({r["label"] for r in rows["books"]})
    domain = Domain("books", "source", labels=tuple(map(str, names)))
    for source, targets in expected.items():
        train = [r for r in rows[source] if r["split"] == "train"]
        y = np.array([names.index(r["label"]) for r in train])
        found = tfidf(([r["text"] for r in train], y), [[r["text"] for r in rows[t]] for t in targets], domain)
        for (target, value), p in zip(targets.items(), found, strict=True):
            right = p.argmax(1) == [names.index(r["label"]) for r in rows[target]]
            assert right.mean() == pytest.approx(value, abs=0.0011), (source, target)


def test_a_probe_chooses_its_strength_on_validation_rows_and_keeps_absent_classes() -> None:
    domain = Domain("a", "source", labels=("x", "y", "z"))
    y = np.array([0, 2] * 30)
    x = RNG.normal(size=(60, 5)) + y[:, None]
    (p,) = frozen_features((x, y), [x], domain, (x, y))
    assert p.shape == (60, 3)
    assert (p[:, 1] == 0).all()
    assert np.allclose(p.sum(1), 1)
    assert (p.argmax(1) == y).mean() > 0.9
    plain = frozen_features((x, y), [x], domain)[0]
    assert not np.allclose(p, plain), "validation rows that are training rows choose the weakest penalty"


def test_other_kinds_of_labels() -> None:
    x = RNG.normal(size=(80, 4))
    both = (x[:, :2] > 0).astype(np.float32)
    (p,) = frozen_features((x, both), [x], Domain("a", "source", "multilabel", ("x", "y")))
    assert ((p > 0.5) == both).mean() > 0.9
    (values,) = frozen_features((x, x @ [1.0, 2.0, 0.0, -1.0]), [x], Domain("a", "source", "regression", ("v",)))
    assert np.corrcoef(values, x @ [1.0, 2.0, 0.0, -1.0])[0, 1] > 0.99
