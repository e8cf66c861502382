"""Tent: entropy minimization at test time (Wang et al. 2021)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from crossft.backbones.batchnorm import without_statistics
from crossft.callbacks.sharding import refuse_sharded
from crossft.errors import ConfigError
from crossft.functional import entropy, upcast
from crossft.tasks import Task
from crossft.types import Batch

__all__ = ["Tent"]

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


class Tent(Callback):
    """Tent (Wang et al. 2021, Fully Test-Time Adaptation by Entropy Minimization, section 3.1), online.

    While a domain is tested, its rows are normalized with the statistics of their batch, and after each batch's
    prediction the scales and shifts of the norm layers take a step that lowers the mean entropy of the batch. It reads
    test inputs and no label. Every domain starts from the trained model, which is put back at the end. It acts in
    ``test`` alone: training and validation are as without it.

    A batch of one row is normalized with the trained statistics.

    The paper adapts BatchNorm layers; LayerNorm and GroupNorm are adapted here too, whose statistics are of one row
    anyway. The result depends on the evaluation batch size, on the order of rows and, through the statistics of a
    batch, on the number of processes; gradients are averaged over processes.

    Args:
        lr: learning rate of Adam (0.001 in the paper, for batches of 200; on ImageNet it takes SGD).
        domains: names of the domains to adapt on. Default: the targets.

    Raises:
        ConfigError: ``lr`` not positive, a name that is no domain of the run, no norm layer with a scale, labels that
            are not exclusive classes, per-domain BatchNorm statistics, or a strategy that shards weights.
    """

    acts_at_test = True

    def __init__(self, lr: float = 1e-3, domains: list[str] | None = None) -> None:
        if lr <= 0:
            raise ConfigError(f"lr={lr} must be positive: the learning rate of the scales and shifts")
        self.lr, self.domains = lr, domains
        self.name = "tent"
        self._stack = ExitStack()
        self._start: list[tuple[nn.Parameter, Tensor]] = []
        self._optimizer: torch.optim.Adam | None = None
        self._domain: str | None = None

    @property
    def state_key(self) -> str:
        """Key of the callback's state."""
        return f"Tent[{self.name}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies in which a process holds slices of the scales and shifts, before anything is trained."""
        refuse_sharded(trainer, self.name, "takes gradients of whole scales and shifts")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the scales and shifts as trained."""
        task = self._checked(pl_module)
        layers = [m for m in task.backbone.modules() if isinstance(m, NORMS)]
        affine = [p for m in layers for p in (m.weight, m.bias) if p is not None]
        if not affine:
            raise ConfigError(f"methods.{self.name} moves scales and shifts of norm layers; the backbone has none")
        self._start = [(p, p.detach().clone()) for p in affine]

    def _checked(self, module: LightningModule) -> Task:
        if not isinstance(module, Task) or module.batchnorm == "per_domain":
            raise ConfigError(f"methods.{self.name} needs a crossft task whose model.batchnorm is not per_domain")
        names = [d.name for d in module.domains]
        self._adapted = self.domains or [d.name for d in module.domains if d.role == "target"]
        for name in self._adapted:
            if name not in names:
                raise ConfigError(f"domains={self._adapted}: {name!r} is not one of {', '.join(names)}")
            if module.domains[names.index(name)].kind != "multiclass":
                raise ConfigError(f"methods.{self.name} reads class probabilities; {name!r} has none")
        return module

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start each domain afresh, and normalize its rows with their own statistics."""
        names: list[str] = trainer.datamodule.eval_domains("test")  # type: ignore[attr-defined]
        if names[dataloader_idx] != self._domain:
            self._restore()
            self._domain = names[dataloader_idx]
            self._optimizer = torch.optim.Adam([p for p, _ in self._start], lr=self.lr)
        if self._domain in self._adapted:
            backbone = pl_module.backbone
            assert isinstance(backbone, nn.Module)
            self._stack.enter_context(without_statistics([backbone]))
            for layer in backbone.modules():
                if isinstance(layer, _BatchNorm) and len(batch) > 1:  # one row may have no variance
                    self._stack.callback(layer.train, layer.training)
                    layer.train()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the step that the next batch is predicted with."""
        if self._domain in self._adapted:
            assert isinstance(pl_module, Task)
            with torch.inference_mode(False), torch.enable_grad():
                self._adapt(pl_module, batch, str(self._domain))
        self._stack.close()

    def _adapt(self, task: Task, batch: Batch, domain: str) -> None:
        """One step of Adam on the mean entropy over the rows of all processes."""
        assert self._optimizer is not None
        parameters = [p for p, _ in self._start]
        trainable = [p.requires_grad for p in parameters]
        for p in parameters:
            p.requires_grad_(True)
        inputs = {key: value.clone() for key, value in batch.inputs.items()}
        real = (batch.domains >= 0).clone()
        logits = task.heads[task.head_keys[domain]](task.backbone(inputs).features)
        values = entropy(upcast(logits))
        total = torch.where(real, values, torch.zeros_like(values)).sum()
        grads = list(torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True))
        rows = real.sum().to(total.dtype)
        if dist.is_available() and dist.is_initialized():
            for value in (*grads, rows):
                dist.all_reduce(value)
        for p, g, flag in zip(parameters, grads, trainable, strict=True):
            p.grad = g / rows.clamp(min=1)
            p.requires_grad_(flag)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the trained scales and shifts back."""
        self._restore()
        self._start, self._optimizer, self._domain = [], None, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was trained."""
        self._stack.close()
        self._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        for parameter, start in self._start:
            parameter.copy_(start)
