"""The shared data sets, where they exist: real photographs, sketches and reviews."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from crossft.data import DomainData, TableFile
from crossft.errors import SplitError

pytestmark = pytest.mark.data


def test_photo_and_sketch(shared_data, image_spec):
    data = DomainData(
        shared_data / "pacs-96",
        "photo",
        "sketch",
        train_on=["source", "target"],
        shots=10,
        image_size=32,
        batch_size=16,
    )
    data.bind(image_spec)
    photo, sketch = data.describe()
    assert data.domains[0].labels == data.domains[1].labels
    assert (photo["classes"], photo["train"] + photo["val"] + photo["test"]) == (7, 1670)
    assert (sketch["train_labels"], sketch["train"] + sketch["val"] + sketch["test"]) == (70, 3929)
    assert (photo["train"], photo["val"], photo["test"]) == (1169, 167, 334)
    counts = Counter()
    batches = [b for b, _ in zip(data.train_dataloader(), range(8))]
    for batch in batches:
        assert batch.inputs["pixel_values"].shape == (16, 3, 32, 32)
        assert torch.isfinite(batch.inputs["pixel_values"]).all()
        counts.update(batch.domains.tolist())
    assert counts == {0: 64, 1: 64}
    assert data.steps_per_epoch == -(-1169 // 8)


def test_reviews(shared_data, text_spec):
    strict = DomainData(shared_data / "amazon4-airline", target="books")
    with pytest.raises(SplitError, match=r"row \d+ \(train\) has the content of .*books\.jsonl: row \d+ \(val\)"):
        strict.prepare()
    data = DomainData(
        shared_data / "amazon4-airline", "books", "kitchen", target_labels="none", train_on=["source", "target"],
        on_error="quarantine", max_length=16,
    )  # fmt: skip
    data.bind(text_spec)
    books, kitchen = data.describe()
    assert books["split"] == "given; test carved from train"
    assert (books["val"], kitchen["val"], kitchen["train_labels"], kitchen["val_labels"]) == (300, 300, 0, 0)
    assert books["train"] + books["val"] + books["test"] + sum(r["domain"] == "books" for r in data.quarantined) == 2000
    assert kitchen["test_labels"] == kitchen["test"] == pytest.approx(400, abs=10)
    batch = next(iter(data.train_dataloader()))
    assert batch.labeled.sum() == batch.labeled_quota == 16
    content = [{p.inputs[i] for i in p.rows(s)} for p in data.prepared for s in ("train", "val", "test")]
    assert not any(content[k] & content[m] for k, m in ((0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)))


def test_layouts_by_options(shared_data):
    uci = TableFile("_labelled.txt", "\t", ["text", "label"], quoting=False)
    yelp = DomainData(shared_data / "uci-sentences", target="yelp", reader=uci)
    assert yelp.domains[0].labels == ("0", "1")
    assert sum(len(yelp.prepared[0].rows(s)) for s in ("train", "val", "test")) == 1000
    vader = TableFile("_GroundTruth.txt", "\t", ["id", "mean", "text"], quoting=False)
    data = DomainData(shared_data / "vader", target="tweets", reader=vader, label_column="mean", id_column="id")
    assert data.domains[0].kind == "regression"
    mean, deviation = data.label_moments()
    assert -1 < mean < 1.5
    assert 0.5 < deviation < 3
