"""Stochastic normalization: batch and running statistics by chance, channel by channel (Kou et al. 2020)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from crossft.callbacks.base import method_seed
from crossft.callbacks.retention.swaps import Swap, put_back, swap_layers
from crossft.errors import ConfigError
from crossft.functional.mixing import drawn_mask
from crossft.tasks import Task

__all__ = ["StochNorm", "StochasticNorm"]


class StochasticNorm(_BatchNorm):
    """A BatchNorm layer over another's parameters and buffers, whose statistics are chosen by chance while training.

    Attributes:
        p: probability that a channel is normalized with running statistics.
        seed: of this step's choice.
    """

    def __init__(self, layer: _BatchNorm, p: float) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, child in layer.named_children():  # timm's norm-activations: dropout and activation
            self.add_module(name, child)
        self.p, self.seed = p, 0

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        """[b, c, ...] -> the same shape."""
        if not self.training:
            return self._rest(self._normalized(input, batch=False))
        running = self._normalized(input, batch=False)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mask = drawn_mask((self.num_features,), self.p, self.seed, input.device)
        mask = mask.view(1, -1, *[1] * (input.ndim - 2))
        return self._rest(torch.where(mask, running, self._normalized(input, batch=True)))

    def _normalized(self, x: Tensor, batch: bool) -> Tensor:
        mean, var = self.running_mean, self.running_var
        assert mean is not None
        assert var is not None
        if not batch:  # copies: the batch's own pass updates the buffers in place
            mean, var = mean.clone(), var.clone()
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / max(1, int(self.num_batches_tracked or 1))
        return F.batch_norm(x, mean, var, self.weight, self.bias, batch, momentum, self.eps)

    def _rest(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class StochNorm(Callback):
    """Stochastic normalization (Kou et al. 2020, Stochastic Normalization, eq. 4-6) in every BatchNorm of the backbone.

    While training, each channel is normalized with its running statistics with probability p and with the batch's
    otherwise; running statistics follow the batches; in evaluation they are used alone. It is a policy for statistics,
    so it needs ``model.batchnorm=training``: under ``frozen`` there is nothing to choose from. The choice is made once
    an optimizer step, from the seed: the same on every process. Needs no data of the source.

    Args:
        p: probability of the running statistics (0.5 in the paper, section 4).

    Raises:
        ConfigError: ``p`` is not in [0, 1], the BatchNorm policy is another one, or the backbone has no BatchNorm.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ConfigError(f"p={p} must be in [0, 1]: the probability of the running statistics")
        self.p, self.name = p, "stochnorm"
        self._layers: dict[str, StochasticNorm] = {}
        self._swaps: list[Swap] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the new layers stand in for the fit."""
        if stage != "fit":
            return
        assert isinstance(pl_module, Task)
        if pl_module.batchnorm != "training":
            raise ConfigError(
                f"methods.{self.name} chooses between batch and running statistics, and model.batchnorm="
                f"{pl_module.batchnorm} fixes them; set model.init_args.batchnorm=training, or switch the method off"
            )
        self._layers = {}
        self._swaps = swap_layers(pl_module.backbone, self._make)
        if not self._swaps:
            raise ConfigError(f"methods.{self.name}: the backbone has no BatchNorm layer; switch the method off")

    def _make(self, name: str, layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, _BatchNorm) or not layer.track_running_stats:
            return None
        self._layers[name] = StochasticNorm(layer, self.p)
        return self._layers[name]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Choose this optimizer step's channels."""
        for name, layer in self._layers.items():
            layer.seed = method_seed(f"{self.name}/{name}/{trainer.global_step}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the plain layers back, with the buffers of now."""
        put_back(self._swaps)
        self._swaps, self._layers = [], {}

    @property
    def state_key(self) -> str:
        """Key of the callback's state."""
        return f"StochNorm[{self.name}]"
