"""Views of a transformers encoder: the same modules and parameters, started later, with its boundaries tapped.

A view is a shallow copy, made for one forward and thrown away; the model itself is never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossft.backbones.base import StagePlan

__all__ = ["LayerMap", "find_layers", "text_plans", "view"]

_TAILS = ("final_norm", "final_layer_norm", "emb_norm_after", "ln_f", "norm", "pooler")
_EMBEDDINGS = ("embeddings", "shared", "embed_tokens", "word_embedding")
_BEFORE = ("embeddings_project",)  # ELECTRA: between embeddings and layers


@dataclass(frozen=True)
class LayerMap:
    """Where a transformers encoder keeps its parts.

    Attributes:
        embeddings: path of the embedding module.
        layers: path of the list of layers.
        count: number of layers.
        tail: path of the norm behind the layers, or None.
    """

    embeddings: str
    layers: str
    count: int
    tail: str | None


def find_layers(model: Any) -> LayerMap | None:
    """Find the embeddings, the list of layers (as long as the config says) and the norm behind it, or None."""
    count = getattr(model.config, "num_hidden_layers", None)
    lists = [path for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if (
        count is None
        or not hasattr(model, "embeddings")
        or not lists
        or getattr(model.config, "is_encoder_decoder", False)
    ):
        return None
    layers = min(lists, key=lambda path: path.count("."))
    if _shared(list(model.get_submodule(layers))) or "albert_layer_groups" in layers:
        return None
    beside = dict(model.get_submodule(layers.rpartition(".")[0]).named_children())
    tail = next((name for name in _TAILS if isinstance(beside.get(name), nn.LayerNorm)), None)
    path = tail and ".".join(filter(None, [layers.rpartition(".")[0], tail]))
    return LayerMap("embeddings", layers, int(count), path)


def _shared(layers: list[nn.Module]) -> bool:
    ids = [id(p) for layer in layers for p in layer.parameters()]
    return len(set(ids)) != len(ids)


def text_plans(model: nn.Module, found: LayerMap | None, prefix: str) -> tuple[StagePlan, ...]:
    """Stages ``embeddings``, ``layer.0``, ..., ``norm``.

    What is used by all layers but lives outside them (relative position tables) belongs to the embeddings. Without
    a list of layers (ALBERT shares one) all that is not embedding is one stage, ``encoder``.
    """
    if found is None:
        first = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in _EMBEDDINGS]
        first = [path for path in first if not any(path.startswith(other + ".") for other in first)]
        rest, extra = _outside(model, first)
        parts: list[tuple[str, list[str], list[str]]] = [("embeddings", first, [])] if first else []
        parts.append(("encoder", rest, extra))
        return tuple(StagePlan(n, tuple(prefix + p for p in ps), tuple(prefix + e for e in es)) for n, ps, es in parts)
    layers = [f"{found.layers}.{i}" for i in range(found.count)]
    taken = [*layers, *([found.tail] if found.tail else [])]
    first, extra = _outside(model, taken)
    plans = [StagePlan("embeddings", tuple(prefix + p for p in first), tuple(prefix + p for p in extra))]
    plans += [StagePlan(f"layer.{i}", (prefix + path,)) for i, path in enumerate(layers)]
    if found.tail:
        plans.append(StagePlan("norm", (prefix + found.tail,)))
    return tuple(plans)


def _outside(model: nn.Module, taken: list[str]) -> tuple[list[str], list[str]]:
    """The largest modules that hold nothing of ``taken``, and the parameters of the modules that do."""
    paths: list[str] = []
    extra: list[str] = []

    def visit(prefix: str, module: nn.Module) -> None:
        extra.extend(prefix + name for name, _ in module.named_parameters(recurse=False))
        for name, child in module.named_children():
            path = prefix + name
            if any(t.startswith(path + ".") for t in taken):
                visit(path + ".", child)
            elif path not in taken:
                paths.append(path)

    visit("", model)
    return paths, extra


def view(
    model: Any,
    found: LayerMap,
    start: int,
    value: Tensor | None,
    taps: Sequence[int],
    seen: dict[int, Tensor],
    recompute: bool = False,
) -> Any:
    """A view that starts at stage ``start`` on ``value`` and writes the outputs of the stages ``taps`` to ``seen``.

    The output of stage k is the input of stage k + 1: stage 0 is the embeddings, 1 ... count the layers. With
    ``recompute`` each layer runs again in the backward pass instead of storing what it computes.
    """
    layers: list[nn.Module] = list(model.get_submodule(found.layers))
    if recompute:
        layers = [_Recomputed(layer) for layer in layers]
    for stage in taps:
        if stage < found.count:
            layers[stage] = _Tap(layers[stage], stage, seen)
    parts: dict[str, nn.Module] = {}
    if found.tail and found.count in taps:
        parts[found.tail] = _Tap(model.get_submodule(found.tail), found.count, seen)
    if start > 0:
        assert value is not None
        parts[found.embeddings] = _Given(value)
        parts |= {name: nn.Identity() for name in _BEFORE if hasattr(model, name)}
    parts[found.layers] = nn.ModuleList(layers[max(start - 1, 0) :])
    copied = _shallow(model)
    for path, module in parts.items():
        _replace(copied, path, module)
    return copied


class _Given(nn.Module):
    """Stands in for the embeddings: returns the given value."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.value


class _Around(nn.Module):
    """Stands around a module; every attribute that is not its own is the module's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class _Tap(_Around):
    """Keeps the module's input."""

    def __init__(self, inner: nn.Module, stage: int, seen: dict[int, Tensor]) -> None:
        super().__init__(inner)
        self.stage = stage
        self.seen = seen

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.seen[self.stage] = hidden_states
        return self.inner(hidden_states, *args, **kwargs)


class _Recomputed(_Around):
    """Runs the module again in the backward pass (Chen et al. 2016)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.inner, *args, use_reentrant=False, **kwargs)


def _shallow(module: Any) -> Any:
    """The same module with a list of children of its own."""
    copied = copy.copy(module)
    copied.__dict__["_modules"] = dict(module._modules)
    return copied


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path``, copying the modules on the way, which the model still uses."""
    *parents, last = path.split(".")
    place = root
    for name in parents:
        child = _shallow(place.get_submodule(name))
        place.add_module(name, child)
        place = child
    place.add_module(last, module)
