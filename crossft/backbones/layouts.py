"""Where the stages of timm's model families lie: one line a family, ordered from input to output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from crossft.backbones.base import StagePlan

__all__ = ["chain_plans", "grouped_plans"]

Links = list[tuple[str, tuple[str, ...]]]
"""(stage name, names called one after the other on the running value); ``+name`` belongs to the stage, uncalled."""


def _chain(*stages: str) -> Callable[[nn.Module], Links]:
    """A family whose forward is a chain: ``name: call call``, or ``path.*`` for one stage a child."""

    def links(model: nn.Module) -> Links:
        found: Links = []
        for stage in stages:
            if stage.endswith(".*"):
                path = stage[:-2]
                found += [(f"{path}.{i}", (f"{path}.{i}",)) for i, _ in model.get_submodule(path).named_children()]
            else:
                name, _, calls = stage.partition(":")
                found.append((name, tuple(calls.split()) or (name,)))
        return found

    return links


def _split(path: str, starts: Callable[[str, nn.Module | None], str | None]) -> Callable[[nn.Module], Links]:
    """A flat Sequential, cut where ``starts(child name, module before)`` names a new stage."""

    def links(model: nn.Module) -> Links:
        found: list[tuple[str, list[str]]] = []
        before: nn.Module | None = None
        for child, module in model.get_submodule(path).named_children():
            name = starts(child, before)
            if name is not None:
                found.append((name, []))
            found[-1][1].append(f"{path}.{child}")
            before = module
        return [(name, tuple(calls)) for name, calls in found]

    return links


def _densenet(child: str, before: nn.Module | None) -> str | None:
    if before is None:
        return "stem"
    return child if child.startswith("denseblock") or child == "norm5" else None


def _vgg(child: str, before: nn.Module | None) -> str | None:
    return f"features.{child}" if before is None or isinstance(before, nn.MaxPool2d) else None


_STEM_STAGES = _chain("stem", "stages.*")
_STEM_STAGES_NORM = _chain("stem", "stages.*", "norm")
_STEM_STAGES_PRE = _chain("stem", "stages.*", "norm: norm_pre")
_PATCH_LAYERS_NORM = _chain("stem: patch_embed", "layers.*", "norm")

_FAMILIES: dict[str, Callable[[nn.Module], Links]] = {
    "ByobNet": _chain("stem", "stages.*", "norm: final_conv"),
    "CspNet": _STEM_STAGES,
    "ConvMixer": _chain("stem", "blocks.*"),
    "ConvNeXt": _STEM_STAGES_PRE,
    "DaVit": _STEM_STAGES_PRE,
    "DenseNet": _split("features", _densenet),
    "EdgeNeXt": _STEM_STAGES_PRE,
    "EfficientNet": _chain("stem: conv_stem bn1", "blocks.*", "head: conv_head bn2"),
    "EfficientVit": _STEM_STAGES,
    "FocalNet": _chain("stem", "layers.*", "norm"),
    "HighPerfGpuNet": _STEM_STAGES,
    "MaxxVit": _STEM_STAGES_NORM,
    "MetaFormer": _STEM_STAGES,
    "MetaNeXt": _STEM_STAGES,
    "MlpMixer": _chain("stem", "blocks.*", "norm"),
    "MobileNetV3": _chain("stem: conv_stem bn1", "blocks.*"),
    "NormFreeNet": _chain("stem", "stages.*", "norm: final_conv final_act"),
    "PyramidVisionTransformerV2": _chain("stem: patch_embed", "stages.*"),
    "RegNet": _chain("stem", "s1", "s2", "s3", "s4", "norm: final_conv"),
    "RepVit": _STEM_STAGES,
    "ResNet": _chain("stem: conv1 bn1 act1 maxpool", "layer1", "layer2", "layer3", "layer4"),
    "ResNetV2": _STEM_STAGES_NORM,
    "StarNet": _STEM_STAGES_NORM,
    "SwinTransformer": _PATCH_LAYERS_NORM,
    "SwinTransformerV2": _PATCH_LAYERS_NORM,
    "VGG": _split("features", _vgg),
    "VisionTransformer": _chain("stem: patch_embed _pos_embed patch_drop norm_pre +pos_drop", "blocks.*", "norm"),
}


def chain_plans(model: nn.Module, prefix: str) -> tuple[StagePlan, ...] | None:
    """Plans for a model whose forward is a chain of named parts, or None for a family that is not in the table.

    Parameters the model holds directly (class token, position embedding) belong to the first stage; what is left
    (norms and layers inside the pooling head) to the last, named ``head`` where it needs a stage of its own.

    Args:
        model: a timm model with ``num_classes=0``.
        prefix: path of the model inside the backbone, with its dot.
    """
    family = next((c for c in type(model).__mro__ if c.__name__ in _FAMILIES), None)
    if family is None or type(model).forward_features is not family.forward_features:  # type: ignore[attr-defined]
        return None
    links = _FAMILIES[family.__name__](model)
    modules = dict(model.named_modules())
    plans = [
        (name, [c.lstrip("+") for c in calls if c.lstrip("+") in modules], [c for c in calls if c[0] != "+"])
        for name, calls in links
    ]
    taken = [path for _, paths, _ in plans for path in paths]
    rest = _outside(model, taken)
    if rest:
        if plans[-1][0] not in ("norm", "head"):
            plans.append(("head", [], []))
        plans[-1][1].extend(rest)
    extra = tuple(prefix + name for name, _ in model.named_parameters(recurse=False))
    return tuple(
        StagePlan(name, tuple(prefix + p for p in paths), extra if i == 0 else (), tuple(calls))
        for i, (name, paths, calls) in enumerate(_drop_empty(model, plans))
    )


def _drop_empty(model: nn.Module, plans: list[Any]) -> list[Any]:
    """Fold stages without parameters (an identity norm, a final activation) into the stage before."""
    kept: list[Any] = []
    for name, paths, calls in plans:
        if kept and not any(True for p in paths for _ in model.get_submodule(p).parameters()):
            kept[-1] = (kept[-1][0], [*kept[-1][1], *paths], [*kept[-1][2], *calls])
        else:
            kept.append((name, paths, calls))
    return kept


def _outside(model: nn.Module, taken: list[str]) -> list[str]:
    """Paths of the largest modules outside ``taken`` that hold parameters or have a train-mode behavior."""
    found: list[str] = []

    def visit(path: str, module: nn.Module) -> None:
        if path in taken:
            return
        inside = any(t.startswith(path + ".") for t in taken)
        if inside:
            for name, child in module.named_children():
                visit(f"{path}.{name}", child)
        else:
            found.append(path)

    for name, child in model.named_children():
        visit(name, child)
    with_parameters = any(True for p in found for _ in model.get_submodule(p).parameters())
    return found if with_parameters else []


def grouped_plans(model: nn.Module, prefix: str) -> tuple[StagePlan, ...]:
    """An ordered partition for any other timm model, by its own coarse group matcher, else by its children.

    Args:
        model: a timm model with ``num_classes=0``.
        prefix: path of the model inside the backbone, with its dot.
    """
    from timm.models._manipulate import group_with_matcher

    names = [name for name, _ in model.named_parameters()]
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        order = {child: i for i, (child, _) in enumerate(model.named_children(), 1)}
        group = {name: order.get(name.split(".")[0], 0) for name in names}
    else:
        found = group_with_matcher(model.named_parameters(), matcher(coarse=True))
        group = {name: i for i, members in found.items() for name in members}
    plans = []
    for number in sorted(set(group.values())):
        members = {name for name in names if group[name] == number}
        paths, extra = _cover(model, members)
        label = (paths or [min(extra)])[0]
        plans.append((label, paths, sorted(extra)))
    for path in _dropouts(model, [path for _, paths, _ in plans for path in paths]):
        plans[-1 if "head" in path else 0][1].append(path)
    return tuple(
        StagePlan(label, tuple(prefix + p for p in paths), tuple(prefix + e for e in extra))
        for label, paths, extra in plans
    )


def _dropouts(model: nn.Module, taken: list[str]) -> list[str]:
    """Paths of dropout layers outside ``taken``: they follow the embeddings, or belong to the head."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Dropout) and not any(path == t or path.startswith(t + ".") for t in taken)
    ]


def _cover(model: nn.Module, members: set[str]) -> tuple[list[str], set[str]]:
    """The largest modules whose parameters all lie in ``members``, and the parameters left over."""
    paths: list[str] = []
    left = set(members)

    def visit(path: str, module: nn.Module) -> None:
        inside = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if inside and inside <= members:
            paths.append(path)
            left.difference_update(inside)
        elif inside & members:
            for name, child in module.named_children():
                visit(f"{path}.{name}", child)

    for name, child in model.named_children():
        visit(name, child)
    return paths, left
