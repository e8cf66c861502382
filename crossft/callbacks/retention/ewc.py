"""EWC and online EWC: weights that matter to the source stay (Kirkpatrick et al. 2017; Schwarz et al. 2018)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from crossft.callbacks.retention.importance import Importance, Measure, hash_of
from crossft.callbacks.retention.quadratic import QuadraticMethod
from crossft.errors import ConfigError
from crossft.functional.importance import FisherLabels
from crossft.tasks import Task

__all__ = ["EWC", "OnlineEWC"]


class EWC(QuadraticMethod):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, Overcoming catastrophic forgetting, eq. 3).

    The penalty is weight/2 * sum of F_i (w_i - w_i^0)^2 over the backbone: w^0 the weights the leg starts from, F the
    diagonal of the Fisher information there, the mean over source training rows of squared per-sample gradients under
    the source's own head. It does not depend on a batch size; peers that square the gradient of a batch's mean find
    an F about b times smaller, so their weights are not comparable. The heads are not held.

    Over a chain of legs every earlier penalty goes on, each with its own F and its own w^0, as in the paper: what the
    run before held by under this method's name is added to that of the sources it did not know (the sum of quadratics
    is one quadratic, so memory does not grow).

    Needs the training rows of the sources that no leg before has measured (their labels for ``labels: empirical``
    alone), once, before training.

    Args:
        weight: lambda. No published default carries over between networks; sweep it over powers of ten.
        labels: whose labels F reads (``exact``: the definition, a backward pass a class but one; ``sampled``: one).
        samples: source rows read; null reads all.
        draws: labels drawn a row by ``sampled``.
        chunk: rows at a time; bounds the memory.
        importance: a file to take F from instead: ``anchors/NAME.safetensors`` of a run that began at the same weights.

    Raises:
        ConfigError: no source, a setting out of range, or an importance that was measured at other weights.
    """

    def __init__(
        self,
        weight: float = 1000.0,
        labels: FisherLabels = "exact",
        samples: int | None = 1000,
        draws: int = 1,
        chunk: int = 16,
        importance: str | None = None,
    ) -> None:
        super().__init__(weight)
        self.measure = Measure("fisher", labels, draws, samples, chunk)
        self.importance = importance
        self.reads_source = "none" if importance else "all" if labels == "empirical" else "unlabeled"

    def importance_for(self, task: Task, data: Any) -> Importance:
        """Read it from the file, or measure it on the source."""
        if self.importance is None:
            return self._measured(task, data)
        found = Importance.load(self.importance)
        here = hash_of(task.backbone)
        if found.provenance.get("weights") not in (None, here):
            raise ConfigError(
                f"methods.{self.name}.importance={self.importance} was measured at other weights "
                f"({found.provenance['weights']}) than this leg starts from ({here}); set it to null to measure it here"
            )
        return found

    def _measured(self, task: Task, data: Any) -> Importance:
        """The source's, and the penalties of earlier legs: their sum is one quadratic, centred between the anchors."""
        before = self.before(task)
        if before is None:
            return self.measure.run(task, data)
        known = before.provenance.get("domains", [])
        if not _others(task, known):
            return before
        found, named = self.measure.run(task, data, known), self.penalty(task).named
        if not found.values:
            return before
        values = {n: before.values[n] + f for n, f in found.values.items()}
        anchors = {}
        for n, total in values.items():
            here = named[n].detach()
            old = before.anchors.get(n, here)
            share = torch.where(total > 0, before.values[n] / total, torch.zeros_like(total))
            anchors[n] = torch.lerp(here.float(), old.float(), share)
        return Importance(values, {**_together(found, before), "anchors": "centre of the legs' penalties"}, anchors)


def _others(task: Task, known: Collection[str]) -> list[str]:
    """Source domains that are not among the known."""
    return [d.name for d in task.domains if d.role == "source" and d.name not in known]


def _together(found: Importance, before: Importance) -> dict[str, Any]:
    """Provenance of importance that earlier legs had a part in."""
    known = [str(n) for n in before.provenance.get("domains", [])]
    domains = list(dict.fromkeys([*known, *found.provenance["domains"]]))
    return {**found.provenance, "domains": domains, "before": before.provenance}


class OnlineEWC(EWC):
    """Online EWC over a chain of legs (Schwarz et al. 2018, Progress & Compress, section 3 and eq. 9).

    One running importance, F = decay * F_before + F_source, where F_before is what the run before left under this
    method's name and F_source that of the sources it did not know (of all, where it knew all), and one anchor: the
    weights the leg starts from. The paper's penalty multiplies this F by gamma once more: a factor on ``weight``.

    Args:
        weight: lambda.
        decay: gamma in [0, 1] on the importance of earlier legs (0.95: their section 5.2 tries 0.9 to 1).
        labels: as in :class:`EWC`.
        samples: as in :class:`EWC`.
        draws: as in :class:`EWC`.
        chunk: as in :class:`EWC`.

    Raises:
        ConfigError: as :class:`EWC`, or ``decay`` outside [0, 1].
    """

    def __init__(
        self,
        weight: float = 1000.0,
        decay: float = 0.95,
        labels: FisherLabels = "exact",
        samples: int | None = 1000,
        draws: int = 1,
        chunk: int = 16,
    ) -> None:
        super().__init__(weight, labels, samples, draws, chunk)
        if not 0.0 <= decay <= 1.0:
            raise ConfigError(f"decay={decay} must be in [0, 1]; 1 keeps the importance of earlier legs whole")
        self.decay = decay

    def importance_for(self, task: Task, data: Any) -> Importance:
        """Measure the sources that earlier legs have not, and add what the run before has left, if it left any."""
        before = self.before(task)
        if before is None:
            return self.measure.run(task, data)
        found = self.measure.run(task, data, before.provenance.get("domains", []))
        if not found.values:
            return Importance(before.values, before.provenance)
        merged = {n: f + self.decay * before.values[n] for n, f in found.values.items()}
        return Importance(merged, {**_together(found, before), "decay": self.decay})
