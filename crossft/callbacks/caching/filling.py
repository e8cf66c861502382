"""Values of a batch of which a part is stored and a part was just computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossft.callbacks.caching.cuts import Value
from crossft.callbacks.caching.store import Store
from crossft.types import Batch

__all__ = ["completed", "joined", "real_rows"]


def completed(store: Store, batch: Batch, known: Any, fresh: Value | None) -> Value:
    """The value of a batch: rows that are ``known`` as stored, the others from ``fresh``, rounded as if stored.

    Args:
        store: holds the values of the known rows.
        batch: the rows.
        known: [b] bool.
        fresh: value of the rows that are not known, in their order; None where there are none.
    """
    assert store.form is not None
    device = batch.domains.device
    mask = batch.inputs["attention_mask"].bool() if store.form.tokens else None
    there = np.flatnonzero(known)
    if fresh is None:
        return Value(store.read(batch.keys, there).to(device, non_blocking=True), mask)
    new = store.rounded(fresh.flat)
    if not len(there):
        return Value(new, mask)
    stored = store.read(batch.keys, there).to(device)
    rows = torch.from_numpy(known).to(device)
    if mask is not None:
        rows = torch.repeat_interleave(rows, mask.sum(1))
    out = new.new_empty(len(rows), *new.shape[1:])
    out[rows], out[~rows] = stored, new
    return Value(out, mask)


def joined(store: Store, batch: Batch, parts: Sequence[Value]) -> Value:
    """The value of a batch whose rows were computed in parts, rounded as if stored."""
    mask = batch.inputs["attention_mask"].bool() if parts[0].mask is not None else None
    return Value(store.rounded(torch.cat([part.flat for part in parts])), mask)


def real_rows(batch: Batch, positions: Any, value: Value) -> tuple[Any, Tensor]:
    """The positions that are no padding, and their values: padding rows may have been normalized differently."""
    real = np.array([batch.keys[i].domain >= 0 for i in positions])
    if real.all():
        return positions, value.flat
    units = torch.from_numpy(real).to(value.flat.device)
    if value.mask is not None:
        units = torch.repeat_interleave(units, value.mask.sum(1))
    return positions[real], value.flat[units]
