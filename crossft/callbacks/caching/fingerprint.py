"""What a frozen prefix is, as a hash: two prefixes of one key give one value for one input."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import PIL
import torch
import torchvision
from torch import Tensor

from crossft.backbones import Backbone
from crossft.types import Stage

__all__ = ["precision", "prefix_key", "prefix_tensors"]

FORMAT = 1
"""Changes when the stored form does."""


def prefix_tensors(stages: Sequence[Stage]) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers of these stages, in a fixed order."""
    parameters: list[Tensor] = [p for stage in stages for p in stage.parameters()]
    buffers = {id(b): b for stage in stages for module in stage.modules for b in module.buffers()}
    return parameters, list(buffers.values())


def precision(device: torch.device) -> torch.dtype | None:
    """The type that autocast gives here and now, or None: a value depends on it as on the weights."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def prefix_key(backbone: Backbone, stages: Sequence[Stage], device: torch.device, *more: object) -> str:
    """Hash (24 hex digits) over weights and buffers, modules with their settings and modes, precision and versions.

    Args:
        backbone: the backbone that the stages belong to.
        stages: those of the prefix, from the first on.
        device: where it runs.
        more: plain values that also tell one prefix from another.
    """
    state = blake2b(digest_size=12)
    facts: list[Any] = [FORMAT, torch.__version__, torchvision.__version__, PIL.__version__]
    facts += [device.type, precision(device)]
    facts += [more, type(backbone).__qualname__]
    facts.append({k: v for k, v in _settings(backbone).items() if k not in ("training", "checkpoint_grads")})
    for stage in stages:
        facts.append(stage.name)
        facts += [(type(m).__qualname__, _settings(m)) for part in stage.modules for m in part.modules()]
    state.update(repr(facts).encode())
    for tensor in (t for group in prefix_tensors(stages) for t in group):
        state.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def _settings(module: torch.nn.Module) -> dict[str, Any]:
    """Plain values that a module holds: sizes, strides, eps, names, its mode."""
    return {k: v for k, v in sorted(vars(module).items()) if _plain(v)}


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))
