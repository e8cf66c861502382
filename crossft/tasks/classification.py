"""Classification: binary, multi-class and multi-label."""

from __future__ import annotations

import math
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
        class_weights: loss weight of each class of the first target (of the first domain where there is none), for
            rows of that label space; ``balanced`` for n / (k * n_c) from the labeled training rows of the mix (King &
            Zeng 2001), each label space by itself; or None. Weights multiply a row's loss; the mean stays over rows.
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
        if isinstance(class_weights, list):
            own = next(d for d in self.domains if d.name == self.default_domain)
            if len(class_weights) != len(own.labels) or not all(0.0 <= w < math.inf for w in class_weights):
                raise ConfigError(
                    f"class_weights={class_weights} must hold one non-negative number for each of the "
                    f"{len(own.labels)} classes of domain {own.name!r}, in their order: {', '.join(own.labels)}; for a "
                    "source leg with other classes set source_leg.model.init_args.class_weights"
                )
            self._set_weights(self.head_keys[own.name], class_weights)

    def _set_weights(self, key: str, weights: Sequence[float]) -> None:
        values = torch.tensor(weights, dtype=torch.float32, device=self.device)
        self.register_buffer(f"_weights_{key}", values, persistent=False)

    def setup(self, stage: str) -> None:
        """Resolve ``class_weights: balanced`` from the labeled training rows of each label space.

        Raises:
            ConfigError: weights are listed for classes that do not train.
        """
        super().setup(stage)
        if stage != "fit":
            return
        if isinstance(self.class_weights, list) and self.head_keys[self.default_domain] not in self.trained_heads:
            raise ConfigError(
                f"class_weights={self.class_weights} are for the classes of domain {self.default_domain!r}, whose "
                "labels do not train; leave class_weights out, set it to balanced, or change data.train_on"
            )
        if self.class_weights != "balanced":
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        names: dict[str, list[str]] = {}
        for name in data.training_domains:
            names.setdefault(self.head_keys[name], []).append(name)
        for key, sharing in names.items():
            counts = [sum(of_class) for of_class in zip(*(data.class_counts(name) for name in sharing))]
            self._set_weights(key, [sum(counts) / (len(counts) * n) if n else 0.0 for n in counts])

    def per_sample_loss(self, logits: Tensor, targets: Tensor, rows: Tensor, domain: Domain) -> Tensor:
        """Cross-entropy of each row, [b]; for multilabel the mean over labels of the binary cross-entropy."""
        weights = self._buffers.get(f"_weights_{self.head_keys[domain.name]}")
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
