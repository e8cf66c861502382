"""Mixout: dropout that drops to the starting weights instead of to zero (Lee, Cho & Kang 2020)."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from crossft.callbacks.base import MethodCallback, method_seed
from crossft.callbacks.retention.start import StartingPoint
from crossft.callbacks.retention.swaps import Swap, put_back, swap_layers
from crossft.callbacks.sharding import refuse_sharded
from crossft.errors import ConfigError
from crossft.functional.mixing import drawn_mask, mixout
from crossft.tasks import Task
from crossft.types import WeightPenalty

__all__ = ["Mixout", "MixoutConv2d", "MixoutLinear"]


class MixoutLinear(nn.Linear):
    """A linear layer over another's parameters, with mixout on its weight while training.

    Attributes:
        p: probability that a weight is put back for one optimizer step.
        seed: of this step's mask; the same on every process and micro-batch of the step.
        start: the starting point, held elsewhere: one element.
    """

    def __init__(self, layer: nn.Linear, start: Tensor, p: float) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.p, self.seed, self.start = p, 0, [start]

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(input, _mixed(self), self.bias)


class MixoutConv2d(nn.Conv2d):
    """A convolution over another's parameters, with mixout on its weight while training."""

    def __init__(self, layer: nn.Conv2d, start: Tensor, p: float) -> None:
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
        )
        self.weight, self.bias = layer.weight, layer.bias
        self.p, self.seed, self.start = p, 0, [start]

    def forward(self, input: Tensor) -> Tensor:
        """[b, c, h, w] -> [b, k, h', w']."""
        found: Tensor = self._conv_forward(input, _mixed(self), self.bias)
        return found


def _mixed(layer: MixoutLinear | MixoutConv2d) -> Tensor:
    if not layer.training or layer.p == 0.0:
        return layer.weight
    weight = layer.weight
    mask = drawn_mask(tuple(weight.shape), layer.p, layer.seed, weight.device)
    return mixout(weight, layer.start[0], mask, layer.p)


class Mixout(MethodCallback):
    """Mixout (Lee, Cho & Kang 2020, Effective Regularization to Finetune Large-scale Pretrained Language Models).

    In every optimizer step each weight of the backbone's linear layers (and plain convolutions) is its starting value
    with probability p; the others are scaled so that the mean is the weight itself. Biases and norms are left, as in
    the released code. The head has no starting point worth keeping, so it is left too. One mask a step, computed from
    the seed: the same on every process and for every micro-batch, with nothing to restore. The gradient carries the
    factor 1 / (1 - p) that the released code's backward omits. Needs no data of the source.

    Args:
        p: probability of the starting value (0.7, 0.8 or 0.9 in the paper, section 5; 0 changes nothing).

    Raises:
        ConfigError: ``p`` is not in [0, 1).
    """

    def __init__(self, p: float = 0.7) -> None:
        super().__init__(1.0)
        if not 0.0 <= p < 1.0:
            raise ConfigError(
                f"p={p} must be in [0, 1): the share of weights put back to their start; 0 changes nothing"
            )
        self.p = p
        self._layers: list[MixoutLinear | MixoutConv2d] = []
        self._seeds: list[str] = []
        self._swaps: list[Swap] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, then swap layers."""
        if stage == "fit":
            refuse_sharded(trainer, self.name)
        super().setup(trainer, pl_module, stage)

    def build(self, task: Task) -> WeightPenalty:
        """Keep the starting weights, and let the layers read them."""
        self._layers, self._seeds = [], []
        chosen: dict[str, nn.Parameter] = {
            f"{n}.weight": cast("nn.Parameter", m.weight)
            for n, m in task.backbone.named_modules()
            if type(m) in (nn.Linear, nn.Conv2d) and isinstance(m, nn.Linear | nn.Conv2d)
        }
        if not chosen:
            raise ConfigError(f"methods.{self.name}: the backbone has no plain linear layer or convolution to mix")
        start = StartingPoint(chosen)

        def make(name: str, layer: nn.Module) -> nn.Module | None:
            if f"{name}.weight" not in chosen:
                return None
            held = start.of(f"{name}.weight")
            new: MixoutLinear | MixoutConv2d
            if isinstance(layer, nn.Linear):
                new = MixoutLinear(layer, held, self.p)
            else:
                assert isinstance(layer, nn.Conv2d)
                new = MixoutConv2d(layer, held, self.p)
            self._layers.append(new)
            self._seeds.append(name)
            return new

        self._swaps = swap_layers(task.backbone, make)
        self._start = start
        return start

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the starting point where it is now: moved to the device, restored from a checkpoint."""
        for name, layer in zip(self._seeds, self._layers, strict=True):
            layer.start = [self._start.of(f"{name}.weight")]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Choose the masks of this optimizer step."""
        step = trainer.global_step
        for name, layer in zip(self._seeds, self._layers, strict=True):
            layer.seed = method_seed(f"{self.name}/{name}/{step}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the plain layers back."""
        put_back(self._swaps)
        self._swaps, self._layers, self._seeds = [], [], []
