"""Classification: binary, multi-class and multi-label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from crossft.backbones import Backbone
from crossft.errors import ConfigError
from crossft.tasks.base import Task
from crossft.types import Domain

__all__ = ["Classification"]


class Classification(Task):
    """Cross-entropy over exclusive labels, binary cross-entropy over independent ones (kind ``multilabel``).

    Args:
        backbone: the pretrained network.
        domains: see :class:`Task`.
        class_weights: loss weight of each class, ``balanced`` for n / (k * n_c) from the labeled training rows of the
            target (King & Zeng 2001), or None. Weights multiply a row's loss; the mean stays over rows.
        label_smoothing: share of probability spread over all classes (Szegedy et al. 2016, section 7).
        **kwargs: optimizer, schedule and the other arguments of :class:`Task`.

    Raises:
        ConfigError: ``label_smoothing`` out of [0, 1), class weights that do not fit, or a regression domain.
    """

    kinds = ("multiclass", "multilabel")

    def __init__(
        self,
        backbone: Backbone,
        domains: list[Domain] | None = None,
        class_weights: list[float] | Literal["balanced"] | None = None,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, domains, **kwargs)
        if not 0.0 <= label_smoothing < 1.0:
            raise ConfigError(f"label_smoothing={label_smoothing} must be in [0, 1)")
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.register_buffer("_weights", None, persistent=False)
        if isinstance(class_weights, list):
            self._set_weights(class_weights)

    def _set_weights(self, weights: Sequence[float]) -> None:
        sizes = {len(d.labels) for d in self.domains if self.head_keys[d.name] in self.trained_heads}
        if sizes != {len(weights)} or min(weights) < 0:
            raise ConfigError(
                f"class_weights={list(weights)} must hold one non-negative number a class; "
                f"the label spaces have {sorted(sizes)} classes"
            )
        self._weights = torch.tensor(weights, dtype=torch.float32, device=self.device)

    def setup(self, stage: str) -> None:
        """Resolve ``class_weights: balanced`` from the labeled training rows."""
        super().setup(stage)
        if stage == "fit" and self.class_weights == "balanced":
            counts = self.trainer.datamodule.class_counts()  # type: ignore[attr-defined]
            total, k = sum(counts), len(counts)
            self._set_weights([total / (k * n) if n else 0.0 for n in counts])

    def per_sample_loss(self, logits: Tensor, targets: Tensor, rows: Tensor, domain: Domain) -> Tensor:
        """Cross-entropy of each row, [b]; for multilabel the mean over labels of the binary cross-entropy."""
        weights = self._weights if self._weights is not None and len(self._weights) == logits.shape[1] else None
        if domain.kind == "multilabel":
            clean = targets.masked_fill(~rows.unsqueeze(1), 0.0)
            smooth = clean * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing
            losses = F.binary_cross_entropy_with_logits(logits, smooth, weight=weights, reduction="none").mean(1)
            return losses.masked_fill(~rows, 0.0)
        clean = targets.masked_fill(~rows, -1)
        losses = F.cross_entropy(logits, clean, reduction="none", ignore_index=-1, label_smoothing=self.label_smoothing)
        return losses if weights is None else losses * weights[clean.clamp(min=0)]

    def predictions(self, logits: Tensor, domain: Domain) -> Tensor:
        """Probabilities [b, k]: of exclusive labels, or of each label by itself (multilabel)."""
        if domain.kind == "multilabel":
            return logits.float().sigmoid()
        return logits.float().softmax(1)  # in bfloat16, probabilities would tie
