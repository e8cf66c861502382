"""What can be said about prepared domains: a fingerprint, a table, class counts."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from crossft.data.prepare import Prepared
from crossft.data.splits import SPLITS
from crossft.errors import ConfigError

__all__ = ["class_counts", "describe", "fingerprint"]


def fingerprint(prepared: Sequence[Prepared]) -> str:
    """Hash (16 hex digits) over names, label spaces, sample ids, splits and labels.

    Of an unlabeled domain no label enters, not even one of the test split.
    """
    state = blake2b(digest_size=8)
    for p in prepared:
        state.update(repr((p.domain.name, p.domain.space, len(p.ids))).encode())
        visible = p.labeled & (not p.unlabeled)
        for array in (p.ids, p.split, visible, p.targets[visible]):
            state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()


def describe(prepared: Sequence[Prepared]) -> list[dict[str, Any]]:
    """One row a domain: name, role, kind, number of classes, rows and labels of each split, and how it was split.

    ``test_seen`` counts test rows whose content stands in the train split of another source or target domain.
    """
    out = []
    for p in prepared:
        row: dict[str, Any] = {"domain": p.domain.name, "role": p.domain.role, "kind": p.domain.kind}
        row["classes"] = len(p.domain.labels)
        for split in SPLITS:
            rows = p.rows(split)
            row[split], row[f"{split}_labels"] = len(rows), int(p.labeled[rows].sum())
        others = [q.ids[q.rows("train")] for q in prepared if q is not p and q.domain.role != "eval"]
        row["test_seen"] = int(np.isin(p.ids[p.rows("test")], np.concatenate(others)).sum()) if others else 0
        out.append({**row, "split": p.note})
    return out


def class_counts(prepared: Sequence[Prepared]) -> list[int]:
    """Labeled training rows of each class, over the domains that share the label space of the first.

    Positives of each label where multilabel.

    Raises:
        ConfigError: the labels are numbers.
    """
    space = prepared[0].domain
    if space.kind == "regression":
        raise ConfigError(f"domain {space.name!r} has kind regression, which has no classes to count")
    values = np.concatenate([p.known("train") for p in prepared if p.domain.space == space.space])
    counts = values.sum(0) if space.kind == "multilabel" else np.bincount(values, minlength=len(space.labels))
    return [int(c) for c in counts]
