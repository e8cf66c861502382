"""Metrics of every domain during one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from crossft.metrics import confusion, domain_metrics
from crossft.metrics.states import Calibration
from crossft.types import Domain, StepOutput

__all__ = ["Evaluation", "display_names"]


def display_names(domains: Sequence[Domain]) -> dict[str, str]:
    """Names used in metric keys: the role where one domain has it, else the domain's own name.

    Example:
        >>> display_names([Domain("photo", "source"), Domain("sketch", "target")])
        {'photo': 'source', 'sketch': 'target'}
    """
    roles = [d.role for d in domains]
    return {d.name: d.role if d.role != "eval" and roles.count(d.role) == 1 else d.name for d in domains}


class Evaluation(nn.Module):
    """One torchmetrics collection a domain, a mean loss, and of the last evaluation confusions and calibration bins."""

    def __init__(self, domains: Sequence[Domain]) -> None:
        super().__init__()
        self.domains = {d.name: d for d in domains}
        self.names = display_names(domains)
        self.metrics = nn.ModuleList([domain_metrics(d) for d in domains])
        self._index = {d.name: i for i, d in enumerate(domains)}
        classes = [d for d in domains if d.kind != "regression"]
        self.confusions = nn.ModuleList([confusion(d) for d in classes])
        self._confusion_index = {d.name: i for i, d in enumerate(classes)}
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(len(self.domains), 2, dtype=torch.float64), persistent=False)
        self.confusion_matrices: dict[str, Tensor] = {}
        self.calibration_bins: dict[str, Tensor] = {}

    def _metric(self, index: int) -> MetricCollection:
        return cast(MetricCollection, self.metrics[index])

    def _confusion(self, name: str) -> Metric:
        return cast(Metric, self.confusions[self._confusion_index[name]])

    def _bins(self, index: int) -> Tensor:
        """The calibration bins [3, n_bins] of all processes: rows, sums of confidences and of outcomes."""
        calibration = cast(Calibration, self._metric(index)["calibration_error"])
        with calibration.sync_context(dist_sync_fn=calibration.dist_sync_fn):
            return calibration.bins.detach().cpu().clone()

    def reset(self) -> None:
        """Forget what was seen."""
        for metric in cast("list[Metric]", [*self.metrics, *self.confusions]):
            metric.reset()
        self.seen.zero_()

    def update(self, name: str, predictions: Tensor, step: StepOutput) -> None:
        """Add the labeled rows of one batch of domain ``name``; padding and unlabeled rows count nowhere."""
        batch, index = step.batch, self._index[name]
        keep = batch.labeled & (batch.domains >= 0)
        self.seen[index, 0] += keep.sum()
        self.seen[index, 1] += step.per_sample_loss.detach().sum()
        predictions, targets = predictions[keep], batch.targets[keep]
        if self.domains[name].kind == "multilabel":
            targets = targets.long()
        self._metric(index).update(predictions, targets)
        if name in self._confusion_index:
            self._confusion(name).update(predictions, targets)

    def compute(self, split: str, add_up: Callable[[Tensor], Any]) -> dict[str, Any]:
        """``DOMAIN/split/METRIC`` of every domain of which any process has seen a labeled row."""
        total = add_up(self.seen.clone())
        logs: dict[str, Any] = {}
        for name, index in self._index.items():
            if total[index, 0] > 0:
                prefix = f"{self.names[name]}/{split}"
                logs[f"{prefix}/loss"] = (total[index, 1] / total[index, 0]).float()
                for key, value in self._metric(index).compute().items():
                    logs[f"{prefix}/{key}"] = value.float()
                if name in self._confusion_index:
                    matrix = self._confusion(name).compute()
                    self.confusion_matrices[name] = matrix.cpu()
                    self.calibration_bins[name] = self._bins(index)
        return logs
