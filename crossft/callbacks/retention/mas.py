"""MAS: memory aware synapses (Aljundi et al. 2018)."""

from __future__ import annotations

from typing import Any

from crossft.callbacks.retention.importance import Importance, Measure
from crossft.callbacks.retention.quadratic import QuadraticMethod
from crossft.tasks import Task

__all__ = ["MAS"]


class MAS(QuadraticMethod):
    """Memory aware synapses (Aljundi et al. 2018, eq. 3 and 5): weights that move the outputs stay.

    Importance is the mean over source rows of |d ||f(x)||^2 / dw|, f the logits of the source's head, gradients per
    row; no label is read. Over a chain of legs the importance of earlier ones is added, as in the paper; the anchor is
    where the leg starts. The penalty is weight/2 * sum of importance * (w - w0)^2 (the paper has no 1/2).

    Args:
        weight: twice the paper's lambda (1 there, section 5).
        samples: source rows read; null reads all.
        chunk: rows at a time; bounds the memory.
    """

    reads_source = "unlabeled"

    def __init__(self, weight: float = 2.0, samples: int | None = 1000, chunk: int = 16) -> None:
        super().__init__(weight)
        self.measure = Measure("mas", samples=samples, chunk=chunk)

    def importance_for(self, task: Task, data: Any) -> Importance:
        """Measure it on the sources that earlier legs have not, and add what those have left ."""
        before = self.before(task)
        if before is None:
            return self.measure.run(task, data)
        known = [str(n) for n in before.provenance.get("domains", [])]
        if all(d.name in known for d in task.domains if d.role == "source"):
            return Importance(before.values, before.provenance)
        found = self.measure.run(task, data, known)
        if not found.values:
            return Importance(before.values, before.provenance)
        provenance = {**found.provenance, "domains": [*known, *found.provenance["domains"]]}
        return Importance({n: v + before.values[n] for n, v in found.values.items()}, provenance)
