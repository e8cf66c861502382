"""What may run a backbone in the task's place."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

from crossft.backbones import Backbone
from crossft.types import Batch, Encoded

if TYPE_CHECKING:
    from crossft.tasks.base import Task

__all__ = ["Prefix"]


class Prefix(Protocol):
    """What may run a backbone, with the same result: it reads what was computed before."""

    def encode(self, task: Task, batch: Batch, capture: Collection[str]) -> Encoded:
        """Run the task's own backbone on the batch; ``capture`` names the stages whose outputs are wanted."""
        ...

    def encode_constant(self, task: Task, network: Backbone, batch: Batch, capture: Collection[str]) -> Encoded:
        """Run a network that never changes (a teacher) on the batch, without a gradient."""
        ...
