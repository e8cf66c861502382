"""The network of the MNIST peer check: two hidden layers of 400 units (van de Ven et al. 2022, Methods)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from crossft.backbones import Backbone
from crossft.backbones.base import StagePlan
from crossft.errors import BackboneError
from crossft.types import Encoded, ImageSpec

__all__ = ["MLP"]


class MLP(Backbone):
    """Fully connected layers with ReLU over grey pixels; a run names it as ``mlp.MLP`` with ``--allow mlp``.

    Args:
        width: units of each of the two layers.
        size: height and width of the images.
    """

    def __init__(self, width: int = 400, size: int = 28) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(size * size, width), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.num_features = width
        self.input_spec = ImageSpec((size, size), (0.0,) * 3, (1.0,) * 3, "nearest")
        self.pretrained = False
        self._plans = tuple(StagePlan(name, (name,)) for name in ("first", "second"))

    def _encode(
        self, start: int, value: Tensor | None, inputs: Mapping[str, Tensor], capture: Collection[str]
    ) -> Encoded:
        x = inputs["pixel_values"][:, :1] if start == 0 or value is None else value
        stages = {}
        for plan in self._plans[start:]:
            x = self.get_submodule(plan.name)(x)
            if plan.name in capture:
                stages[plan.name] = x
        return Encoded(features=x, stages=stages)

    def _reason(self, index: int) -> str | None:
        return None

    def export(self, folder: Path) -> Path:
        """Refused: no other library knows this network."""
        raise BackboneError("the peer check's network has no timm or transformers form; keep the run folder")
