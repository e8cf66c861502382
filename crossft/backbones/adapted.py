"""Parameter-efficient fine-tuning: any backbone with adapters of the ``peft`` package in its stages."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from crossft.backbones.base import Backbone
from crossft.errors import BackboneError, ConfigError, StageError
from crossft.types import Encoded

__all__ = ["Adapted", "AdapterKind", "is_adapter"]

AdapterKind = Literal["lora", "dora", "ia3"]


class Adapted(Backbone):
    """A backbone with adapters in its layers: LoRA (Hu et al. 2022), DoRA (Liu et al. 2024), IA3 (Liu et al. 2022).

    Its linear (and ungrouped convolution) layers carry them; its own weights start frozen. LoRA (eq. 3), DoRA (eq. 5)
    or IA3 (section 3.3, on the outputs of every adapted layer) are built by the ``peft`` package. At the start the
    features are those of the backbone.
    Stages keep their names and hold their adapters, so freezing and phases go by stage as before;
    ``Freeze(kinds: [adapter])`` keeps adapters alone, and any other choice thaws what it names. Without a choice the
    adapters train: a stage without any is frozen (no dropout, no statistics that move), and one that holds some is in
    training mode as a whole, its own dropout and BatchNorm policy included.

    Weights of a plain backbone load into this one (``--init`` of a run without adapters), adapters then stay as they
    are, and DoRA's magnitudes become those of the weights. ``export`` writes the plain model with the adapters merged
    in; in float32 its features are those of this one within 1e-4, absolute and relative.

    Args:
        backbone: what is adapted, in place.
        kind: ``lora``, ``dora`` or ``ia3``.
        rank: rank of the update (8: peft's default); IA3 has none.
        alpha: the update is scaled by ``alpha / rank`` (8: peft's default).
        dropout: on the input of the update, while training.
        stages: names of the stages that get adapters, or globs over them; None: all.
        targets: globs over whole layer names (``*.attn.qkv``); None: every linear and ungrouped convolution layer.

    Raises:
        BackboneError: ``peft`` is not installed, or it refuses the layers.
        ConfigError: a setting out of range, or no layer is found.
        StageError: a stage is not there.
    """

    def __init__(
        self,
        backbone: Backbone,
        kind: AdapterKind = "lora",
        rank: int = 8,
        alpha: int = 8,
        dropout: float = 0.0,
        stages: list[str] | None = None,
        targets: list[str] | None = None,
    ) -> None:
        super().__init__()
        if kind not in get_args(AdapterKind):
            raise ConfigError(f"kind={kind!r} is unknown; allowed: {', '.join(get_args(AdapterKind))}")
        if rank < 1 or not 0.0 <= dropout < 1.0 or alpha < 1:
            raise ConfigError(f"rank={rank} must be >= 1, alpha={alpha} >= 1, dropout={dropout} in [0, 1)")
        layers = _layers(backbone, stages, targets)
        _inject(backbone, kind, rank, alpha, dropout, layers)
        self.inner = backbone
        self.kind = kind
        self.num_features, self.input_spec = backbone.num_features, backbone.input_spec
        self.pretrained = backbone.pretrained
        self._plans = tuple(
            replace(
                plan, modules=tuple(f"inner.{m}" for m in plan.modules), extra=tuple(f"inner.{e}" for e in plan.extra)
            )
            for plan in backbone._plans
        )
        self.register_load_state_dict_pre_hook(_from_plain)  # type: ignore[no-untyped-call]

    @property
    def name(self) -> str:
        """Name of the backbone inside."""
        return str(getattr(self.inner, "name", type(self.inner).__name__))

    def _encode(
        self, start: int, value: Tensor | None, inputs: Mapping[str, Tensor], capture: Collection[str]
    ) -> Encoded:
        return self.inner._encode(start, value, inputs, capture)

    def _reason(self, index: int) -> str | None:
        return self.inner._reason(index)

    def merged(self) -> Backbone:
        """A copy of the plain backbone with the adapters merged into its weights."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        plain = copy.deepcopy(self.inner)
        for path, module in list(plain.named_modules()):
            if isinstance(module, BaseTunerLayer):
                layer: Any = module
                layer.merge(safe_merge=True)
                plain.set_submodule(path, layer.get_base_layer())
        return plain

    def export(self, folder: Path) -> Path:
        """Write the merged model as the plain backbone does."""
        return self.merged().export(folder)


def _layers(backbone: Backbone, stages: list[str] | None, targets: list[str] | None) -> list[str]:
    """Names of the layers that get adapters, by stage and pattern."""
    known = [stage.name for stage in backbone.stages]
    for pattern in stages or []:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise StageError(f"stages: unknown stage {pattern!r}; the backbone's stages are {', '.join(known)}")
    inside = {
        id(module)
        for stage in backbone.stages
        if stages is None or any(fnmatchcase(stage.name, pattern) for pattern in stages)
        for owner in stage.modules
        for module in owner.modules()
    }
    bypassed = {id(c) for m in backbone.modules() if isinstance(m, nn.MultiheadAttention) for c in m.modules()}
    able = {
        path: m
        for path, m in backbone.named_modules()
        if id(m) in inside - bypassed and (isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1))
    }
    for pattern in targets or []:
        if not any(fnmatchcase(path, pattern) for path in able):
            raise ConfigError(f"targets: {pattern!r} matches no layer; there are {', '.join(list(able)[:8])}, ...")
    found = [path for path in able if targets is None or any(fnmatchcase(path, pattern) for pattern in targets)]
    if not found:
        raise ConfigError(
            f"{type(backbone).__name__} has no linear or ungrouped convolution layer in the chosen stages"
        )
    return found


def _inject(backbone: Backbone, kind: AdapterKind, rank: int, alpha: int, dropout: float, layers: list[str]) -> None:
    try:
        import peft
    except ImportError as error:
        raise BackboneError("adapters need the peft package: pip install 'crossft[peft]'") from error
    config: Any
    if kind == "ia3":
        config = peft.IA3Config(target_modules=layers, feedforward_modules=[])
    else:
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=layers, use_dora=kind == "dora"
        )
    try:
        peft.inject_adapter_in_model(config, backbone)
    except (ValueError, NotImplementedError) as error:
        raise BackboneError(f"peft refuses {kind} on {type(backbone).__name__}: {error}") from error


def is_adapter(name: str) -> bool:
    """Whether ``peft`` has added the parameter of this name (``lora_A``, ``lora_magnitude_vector``, ``ia3_l``)."""
    return re.search(r"\.(lora|ia3)_", name) is not None


def _from_plain(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename what a plain backbone has saved; adapters stay as they are. What else it lacks, strict loading names."""
    if any(key.startswith(f"{prefix}inner.") for key in state):
        return
    own = module.state_dict()
    for key in [k for k in state if k.startswith(prefix)]:
        path = f"inner.{key.removeprefix(prefix)}"
        layer, last = path.rsplit(".", 1)
        wrapped = f"{layer}.base_layer.{last}"
        state[prefix + (wrapped if wrapped in own else path)] = state.pop(key)
    for name in filter(is_adapter, own):
        state.setdefault(prefix + name, own[name])
    for path, layer in module.named_modules():  # DoRA's magnitudes are those of the weights that it adapts (eq. 5)
        weight = f"{path}.base_layer.weight"
        for adapter in getattr(layer, "lora_magnitude_vector", ()):
            name, given = f"{path}.lora_magnitude_vector.{adapter}.weight", state.get(prefix + weight)
            if given is not None and given.shape == own[weight].shape:
                sums = (given + layer.get_delta_weight(adapter).to(given)).flatten(1)
                state[prefix + name] = torch.linalg.vector_norm(sums, dim=1).reshape(own[name].shape)
