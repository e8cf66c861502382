"""Policy ``reestimated`` within a fit: what is evaluated and saved has other BatchNorm statistics than what trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from crossft.backbones.batchnorm import BatchNormPolicy, batch_norms, reestimate_
from crossft.data import DomainData
from crossft.data.passes import one_pass, placed, training_rows
from crossft.errors import ConfigError
from crossft.types import Role

if TYPE_CHECKING:
    from crossft.tasks.base import Task

__all__ = ["Reestimation"]

_KEY = "training_statistics"


class Reestimation:
    """Replaces the statistics for an evaluation, and puts those that train back for the next step.

    Args:
        policy: of the task; ``reestimated`` computes them on the targets' training inputs, ``reestimated_source`` on
            the sources', any other never.

    Attributes:
        held: the statistics that train, by name in the backbone's state dict, while others stand in for them.
    """

    def __init__(self, policy: BatchNormPolicy) -> None:
        roles: dict[str, Role] = {"reestimated": "target", "reestimated_source": "source"}
        self.policy, self.role = policy, roles.get(policy)
        self.held: dict[str, Tensor] = {}

    def begin(self, task: Task) -> None:
        """Refuse a fit that could not end as it should; what an earlier fit held is forgotten.

        Raises:
            ConfigError: the backbone has no BatchNorm layer, or the run no training rows of that role.
        """
        self.held = {}
        if self.role is None:
            return
        if not batch_norms(task.backbone):
            raise ConfigError(f"model.batchnorm={self.policy} on a backbone without BatchNorm layers; leave it out")
        if getattr(task.trainer, "datamodule", None) is not None:
            training_rows(self._data(task), self.role)

    def replace_(self, task: Task) -> None:
        """Compute all statistics anew (Li et al. 2016, algorithm 1) within a fit, once after each optimizer step."""
        trainer = task.trainer
        if self.role is None or self.held or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        with torch.inference_mode(False), torch.no_grad():
            state = task.backbone.state_dict()
            names = [n for n, m in task.backbone.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
            self.held = {key: state[key].clone() for n in names for key in (f"{n}.running_mean", f"{n}.running_var")}
            reestimate_(task.backbone, self._inputs(task, self.role))

    @torch.no_grad()
    def put_back_(self, task: Task) -> None:
        """Go on training with the statistics that train."""
        if self.held:
            state = task.backbone.state_dict()
            for name, kept in self.held.items():
                state[name].copy_(kept)
            self.held = {}

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Keep the statistics that train beside those that stand in for them."""
        if self.held:
            checkpoint[_KEY] = dict(self.held)

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Train on with those that train."""
        self.held = dict(checkpoint.get(_KEY, {}))

    def _inputs(self, task: Task, role: Role) -> Iterator[dict[str, Tensor]]:
        """Training inputs as evaluation sees them; a batch of one row, which may have no variance, is left out."""
        data = self._data(task)
        for batch in one_pass(data, training_rows(data, role)):
            moved = placed(batch, task.backbone)
            real = moved.domains >= 0
            if int(real.sum()) > 1:
                yield {key: value[real] for key, value in moved.inputs.items()}

    def _data(self, task: Task) -> DomainData:
        data = getattr(task.trainer, "datamodule", None)
        if not isinstance(data, DomainData):
            raise ConfigError(f"model.batchnorm={self.policy} reads training rows: fit with a crossft.data.DomainData")
        return data
