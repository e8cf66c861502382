"""Items become a `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossft.data.dataset import Item
from crossft.data.text import Tokens, pad
from crossft.types import Batch

__all__ = ["Collate"]


@dataclass(eq=False)
class Collate:
    """Stack items into a batch; texts are padded to the longest of the batch, postponed inputs are left out.

    Args:
        tokens: where padding is defined; None for images.
        keyed: whether batches carry the keys of their rows.
    """

    tokens: Tokens | None = None
    keyed: bool = True

    def __call__(self, items: Sequence[Item]) -> Batch:
        """One batch of these rows, in their order; targets of unlabeled and padding rows are blank."""
        info = items[0].key.info
        return Batch(
            inputs={} if items[0].value is None else self.inputs([item.value for item in items]),
            targets=_targets(items),
            labeled=torch.tensor([item.labeled for item in items]),
            domains=torch.tensor([item.key.domain for item in items]),
            sample_ids=torch.tensor([item.sample_id for item in items]),
            quota=info.quota,
            labeled_quota=info.labeled_quota,
            step=info.step,
            keys=tuple(item.key for item in items) if self.keyed else (),
        )

    def inputs(self, values: Sequence[Any]) -> dict[str, Tensor]:
        """What the backbone takes, of these rows."""
        if self.tokens is None:
            return {"pixel_values": torch.stack(list(values))}
        return pad(values, self.tokens)


def _targets(items: Sequence[Item]) -> Tensor:
    targets = torch.from_numpy(np.stack([item.target for item in items]))
    blank = torch.tensor([not item.labeled for item in items])
    targets[blank] = float("nan") if targets.is_floating_point() else -1
    return targets
