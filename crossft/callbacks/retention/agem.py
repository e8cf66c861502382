"""A-GEM: gradients that do not raise the loss on a memory of the source (Chaudhry et al. 2019)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch import distributed as dist

from crossft.backbones.batchnorm import set_domains
from crossft.callbacks.base import MethodCallback, method_seed
from crossft.callbacks.retention.chain import leave_memory
from crossft.callbacks.retention.rehearsal import Keep, check_memory, chosen_rows, ids_of_rows, rows_of
from crossft.callbacks.sharding import refuse_sharded
from crossft.data.passes import batch_of, placed
from crossft.errors import ConfigError
from crossft.functional.modes import evaluating
from crossft.functional.projection import project_off
from crossft.tasks import Task
from crossft.types import GradientProjection

__all__ = ["AGEM", "ReferenceGradient"]


class ReferenceGradient(GradientProjection):
    """Projects each step's gradient off the gradient of the task loss on a batch of the memory.

    Args:
        task: whose loss and parameters.
        data: where rows come from.
        rows: dataset rows of the memory by domain id.
        batch_size: rows of the reference batch, over all processes.
        seed: of its draws.
    """

    ids: Tensor
    constants = ("ids",)

    def __init__(self, task: Task, data: Any, rows: Any, batch_size: int, seed: int) -> None:
        super().__init__()
        self._data, self.batch_size, self.seed = [data], batch_size, seed
        self._set(rows)
        self.register_buffer("ids", ids_of_rows(data, rows))
        self._last: dict[str, Tensor] = {}

    def _set(self, rows: Any) -> None:
        self._members = [(number, int(row)) for number, own in sorted(rows.items()) for row in own]

    def get_extra_state(self) -> dict[str, Tensor]:
        """What the last step did: it is logged with the next, which may be the first after a resume."""
        return dict(self._last)

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take it from a checkpoint."""
        self._last = dict(state)

    def restore(self) -> None:
        """Take the memory that a checkpoint has brought."""
        self._set(rows_of(self._data[0], self.ids))

    def drawn(self, step: int) -> list[tuple[int, int]]:
        """Members of the reference batch of an optimizer step: the memory in a new order each time it is through."""
        n = len(self._members)
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        turns = {t: np.random.default_rng([self.seed, t]).permutation(n) for t in np.unique(places // n).tolist()}
        return [self._members[int(turns[place // n][place % n])] for place in places.tolist()]

    def project_(self, model: Any) -> None:
        """Take the part along the reference gradient out of ``.grad`` where the two disagree."""
        parameters = [p for m in (model.backbone, model.heads) for p in m.parameters() if p.requires_grad]
        reference = self._reference(model, parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        dot, _ = project_off([p.grad for p in parameters if p.grad is not None], reference)
        self._last = {"violated": (dot < 0).float(), "agreement": dot.float()}

    def _reference(self, task: Task, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Gradient of the mean task loss over the reference batch, all-reduced."""
        spread = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
        mine = self.drawn(task.trainer.global_step)[rank::world]
        total = [torch.zeros_like(p) for p in parameters]
        with evaluating(task), torch.enable_grad():
            for number in sorted({number for number, _ in mine}):
                batch = batch_of(self._data[0], [row for n, row in mine if n == number], number)
                loss = task.model_step(placed(batch, task.backbone)).per_sample_loss.sum() / self.batch_size
                for t, g in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                    if g is not None:
                        t += g
        set_domains(task.backbone, None)
        if spread:
            for t in total:
                dist.all_reduce(t)
        return total

    def logs(self) -> dict[str, Tensor]:
        """Whether the step's gradient was projected, and g . g_ref before."""
        return self._last


class AGEM(MethodCallback):
    """Averaged gradient episodic memory (Chaudhry et al. 2019, Efficient Lifelong Learning with A-GEM, eq. 10-11).

    Before each optimizer step, the gradient of the task loss on a batch of remembered source rows is computed; where
    the step's gradient points against it, the part along it is taken out, so that to first order the memory's loss does
    not rise. It acts on the gradient of task loss and loss terms, before weight penalties. The remembered rows train
    nothing by themselves. Needs labeled source rows: as many as ``size``. Costs one more forward and backward a step.

    Against the released code the reference gradient is taken in evaluation mode, on unaugmented rows: no dropout,
    running BatchNorm statistics; so modes, buffers and generators are left alone and the guarantee is about the loss
    that evaluation sees.

    Args:
        size: rows kept; null keeps all.
        batch_size: rows of the reference batch, over all processes (256 in the paper, section 5; 10 in later work).
        keep: which rows are kept.

    Raises:
        ConfigError: a setting out of range, no labeled source row, or a strategy that shards weights.
    """

    reads_source = "few"

    def __init__(self, size: int | None = 200, batch_size: int = 64, keep: Keep = "balanced") -> None:
        super().__init__(1.0)
        check_memory(size, keep)
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1: the rows of the reference batch")
        self.size, self.batch_size, self.keep = size, batch_size, keep

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, then choose the memory."""
        if stage == "fit":
            refuse_sharded(trainer, self.name)
        super().setup(trainer, pl_module, stage)

    def build(self, task: Task) -> GradientProjection:
        """Choose the memory at the weights the leg starts from."""
        data: Any = task.trainer.datamodule  # type: ignore[attr-defined]
        rows = chosen_rows(task, data, self.name, self.size, self.keep)
        return ReferenceGradient(task, data, rows, self.batch_size, method_seed(self.name) % 2**32)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the memory that a checkpoint has brought, where one was restored."""
        assert isinstance(pl_module, Task)
        rule = pl_module.attachments.projections[self.name]
        assert isinstance(rule, ReferenceGradient)
        rule.restore()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the memory for the run that starts from this one."""
        assert isinstance(pl_module, Task)
        rule = pl_module.attachments.projections[self.name]
        assert isinstance(rule, ReferenceGradient)
        leave_memory(pl_module, self.name, rule.ids)
