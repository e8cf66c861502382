"""Layers of a backbone replaced by others over the same parameters, and put back."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

__all__ = ["Swap", "put_back", "swap_layers"]

Swap = tuple[nn.Module, str, nn.Module]
"""Parent, name in it, and the layer that stood there."""


def swap_layers(root: nn.Module, make: Callable[[str, nn.Module], nn.Module | None]) -> list[Swap]:
    """Replace layers below ``root``; a layer that stands in several places is replaced by one.

    Args:
        root: changed in place.
        make: from a layer's dotted name and the layer, what stands in for it, or None to leave it. It shares the
            layer's parameters, so names in a state dict stay as they are.

    Returns:
        What ``put_back`` takes.
    """
    made: dict[int, nn.Module | None] = {}
    swaps: list[Swap] = []
    for name, parent in list(root.named_modules()):
        for key, layer in list(parent._modules.items()):  # named_children() names a shared layer once only
            if layer is None:
                continue
            if id(layer) not in made:
                made[id(layer)] = make(f"{name}.{key}" if name else key, layer)
            new = made[id(layer)]
            if new is not None:
                new.train(layer.training)
                parent.add_module(key, new)
                swaps.append((parent, key, layer))
    return swaps


def put_back(swaps: list[Swap]) -> None:
    """Undo ``swap_layers``; modes and buffers of the layers that stood in are kept."""
    for parent, key, layer in swaps:
        current = parent.get_submodule(key)
        layer.train(current.training)
        for name, buffer in current.named_buffers(recurse=False):
            if name in dict(layer.named_buffers(recurse=False)):
                layer.register_buffer(name, buffer, persistent=name not in layer._non_persistent_buffers_set)
        parent.add_module(key, layer)
