"""What methods on the predictions of target rows share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from crossft.callbacks.adaptation.pairs import members, whole_batch
from crossft.callbacks.adaptation.roles import Ids
from crossft.functional import full_precision
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["TargetBatchLoss"]


class TargetBatchLoss(LossTerm):
    """A loss of the matrix of the target rows' logits, over the rows of all processes.

    Such a loss is not a mean over rows, so under gradient accumulation every micro-batch is a batch of its own.

    Args:
        targets: ids of the target domains.
        head: key of their head.
        loss: from logits [b, k] to a scalar.
    """

    def __init__(self, targets: Ids, head: str, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.targets, self.head, self.loss = targets, head, loss

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """The loss, a scalar; 0 where there is no target row."""
        domains, logits = whole_batch(step, step.logits[self.head])
        rows = logits[members(domains, self.targets)]
        with full_precision(rows):
            return self.loss(rows) if len(rows) else logits.sum() * 0.0
