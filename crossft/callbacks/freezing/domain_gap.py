"""The gap between source and target features, measured at every validation without any label."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from crossft.data import DomainData
from crossft.data.passes import one_pass, placed, training_rows
from crossft.errors import ConfigError
from crossft.functional.gather import gather_rows
from crossft.functional.kernels import gaussian_kernel, mmd_unbiased
from crossft.tasks import Task
from crossft.types import Role

__all__ = ["DomainGap"]

KEY = "gap/val/mmd"
ROLES: tuple[Role, ...] = ("source", "target")


class DomainGap(Callback):
    """Measure the discrepancy of source and target features, for ``GradualUnfreezing`` to follow (Gretton et al. 2012).

    After every validation within a fit, the unbiased squared maximum mean discrepancy (eq. 3) between the pooled
    features of some training rows of both roles is logged as ``gap/val/mmd``. The rows are the same at every
    measurement, seen as in evaluation; their labels are not read. It may be slightly negative where there is no gap.
    With ``monitor: gap/val/mmd`` and ``mode: min`` a phase of ``patience`` ends when its stages close the gap no
    further.

    Args:
        rows: training rows of each role that are compared (all, where there are fewer).
        kernel: ``gaussian``: five bandwidths around the mean squared distance (Long et al. 2015, section 3), so the
            value does not depend on the features' scale. ``linear``: the squared distance of the two means, divided by
            the mean squared distance of all rows, for the same reason.

    Raises:
        ConfigError: a setting out of range, or a run without training rows of both roles.
    """

    def __init__(self, rows: int = 256, kernel: Literal["gaussian", "linear"] = "gaussian") -> None:
        if rows < 2:
            raise ConfigError(f"rows={rows} must be at least 2: rows of each role that are compared")
        if kernel not in ("gaussian", "linear"):
            raise ConfigError(f"kernel={kernel!r} is unknown; allowed: gaussian, linear")
        self.rows, self.kernel = rows, kernel
        self.name = "gap"

    @property
    def state_key(self) -> str:
        """Key of the callback's state."""
        return f"DomainGap[{self.name}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run that has not both roles."""
        if stage == "fit":
            data = getattr(trainer, "datamodule", None)
            if not isinstance(pl_module, Task) or not isinstance(data, DomainData):
                raise ConfigError(f"methods.{self.name} needs a crossft task on crossft.data.DomainData")
            for role in ROLES:
                training_rows(data, role)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log; the value is the same on every process."""
        data = getattr(trainer, "datamodule", None)
        if trainer.state.fn == "fit" and not trainer.sanity_checking and isinstance(data, DomainData):
            assert isinstance(pl_module, Task)
            pl_module.log(KEY, self.measure(pl_module, data), batch_size=1)

    @torch.no_grad()
    def measure(self, task: Task, data: DomainData) -> Tensor:
        """The discrepancy now, a scalar; the task is in evaluation mode."""
        source, target = (self._features(task, data, role) for role in ROLES)
        both = torch.cat([source, target]).float()
        if self.kernel == "gaussian":
            return mmd_unbiased(gaussian_kernel(both), len(source))
        centred = both - both.mean(0)
        spread = 2 * centred.square().sum(1).mean()
        return mmd_unbiased(centred @ centred.T, len(source)) / spread.clamp(min=torch.finfo(spread.dtype).tiny)

    def _features(self, task: Task, data: DomainData, role: Role) -> Tensor:
        """[n, d] features of the role's rows, from all processes."""
        found: list[Tensor] = []
        for batch in one_pass(data, training_rows(data, role, limit=self.rows)):
            here = placed(batch, task)
            with task.trainer.precision_plugin.val_step_context():
                found.append(task.model_step(here).features[here.domains >= 0])
        return gather_rows(torch.cat(found))[0]
