"""Named parameter groups: one per stage and decay kind, all present from the first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from crossft.errors import ConfigError
from crossft.types import Stage

__all__ = ["parameter_groups"]

ParameterGroup = dict[str, Any]


def _is_no_decay(parameter: nn.Parameter, exempt: frozenset[int]) -> bool:
    """Norm scales and biases are vectors; position embeddings and class tokens hang on the backbone itself."""
    return parameter.ndim <= 1 or id(parameter) in exempt


def _split(
    name: str,
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float,
    exempt: frozenset[int],
    seen: set[int],
) -> list[ParameterGroup]:
    kinds: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for parameter in parameters:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            kinds["no_decay" if _is_no_decay(parameter, exempt) else "decay"].append(parameter)
    decay = {"decay": weight_decay, "no_decay": 0.0}
    return [
        {"params": members, "name": f"{name}/{kind}", "lr": lr, "initial_lr": lr, "weight_decay": decay[kind]}
        for kind, members in kinds.items()
        if members
    ]


def parameter_groups(
    stages: Sequence[Stage],
    heads: nn.ModuleDict,
    terms: nn.ModuleDict | None = None,
    *,
    lr: float,
    weight_decay: float = 0.0,
    head_multiplier: float = 1.0,
    layer_decay: float = 1.0,
) -> list[ParameterGroup]:
    """Group every parameter by stage and decay kind, with its learning rate set.

    Groups are named ``STAGE/decay``, ``STAGE/no_decay``, ``head.KEY/...`` and ``term.NAME/...``. Parameters of a
    frozen stage are in their group too: they have no gradient, so no optimizer moves them, and schedules made at the
    start stay right when they thaw. Norms, biases and parameters held by the backbone itself (position embeddings,
    class tokens) take no weight decay, the usual choice since BERT (Devlin et al. 2019, section A.2) and ViT.

    Args:
        stages: the backbone's stages, input to output.
        heads: heads by key; their learning rate is ``lr * head_multiplier``.
        terms: loss terms by name; their own parameters train at the heads' learning rate.
        lr: learning rate of the last stage.
        weight_decay: decay of matrices and kernels.
        head_multiplier: factor on the heads' learning rate.
        layer_decay: the learning rate of the stage at depth k (the last stage has depth 0) is
            ``lr * layer_decay**k`` (Howard & Ruder 2018, section 3.2, use 1/2.6).

    Raises:
        ConfigError: a factor is out of range.
    """
    if not 0.0 < layer_decay <= 1.0:
        raise ConfigError(f"layer_decay={layer_decay} must be in (0, 1]; 1 gives every stage the same learning rate")
    if head_multiplier <= 0.0:
        raise ConfigError(f"head_multiplier={head_multiplier} must be positive; 1 trains the head like the last stage")
    seen: set[int] = set()
    groups: list[ParameterGroup] = []
    depth = len(stages) - 1
    for index, stage in enumerate(stages):
        exempt = frozenset(id(p) for p in stage.extra)
        rate = lr * layer_decay ** (depth - index)
        groups += _split(stage.name, stage.parameters(), rate, weight_decay, exempt, seen)
    for prefix, owners in (("head", heads), ("term", terms if terms is not None else nn.ModuleDict())):
        for key, owner in owners.items():
            groups += _split(
                f"{prefix}.{key}", owner.parameters(), lr * head_multiplier, weight_decay, frozenset(), seen
            )
    return groups
