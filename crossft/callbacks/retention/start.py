"""The weights a leg starts from, kept as constants for methods that act on weights but add no gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from crossft.types import WeightPenalty

__all__ = ["StartingPoint"]


class StartingPoint(WeightPenalty):
    """Copies of parameters, stored once a run; its value, half the squared distance from them, is only logged.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.named = dict(parameters)
        for name, parameter in self.named.items():
            self.register_buffer(name.replace(".", "/"), parameter.detach().clone())

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the buffers: all of them."""
        return tuple(name for name, _ in self.named_buffers())

    def of(self, name: str) -> Tensor:
        """The starting point of a parameter."""
        return self.get_buffer(name.replace(".", "/"))

    @torch.no_grad()
    def value(self) -> Tensor:
        """1/2 ||w - w0||^2 over what trains, a scalar in float32."""
        parts = [
            0.5 * (p.float() - self.of(n).float()).square().sum() for n, p in self.named.items() if p.requires_grad
        ]
        return torch.stack(parts).sum() if parts else torch.zeros(())

    def add_grad_(self, weight: float) -> None:
        """Add nothing."""
