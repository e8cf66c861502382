"""Which backbone parameters train: by depth, stage, name pattern, kind, and combinations of these."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal, get_args

from torch import nn

from crossft.backbones import Backbone
from crossft.backbones.adapted import is_adapter
from crossft.errors import ConfigError, StageError, TrainingError
from crossft.tasks import Task
from crossft.tasks.trainability import trainable_names

__all__ = ["Combine", "ParameterKind", "Selection", "refuse_another"]

ParameterKind = Literal["norm", "bias", "adapter"]
"""``norm``: scales and shifts of normalization layers. ``bias``: every bias, those of norms included (BitFit).
``adapter``: what ``crossft.backbones.Adapted`` has added."""
Combine = Literal["any", "all"]


@dataclass(frozen=True)
class Selection:
    """A set of backbone parameters; without any criterion it is the whole backbone.

    Attributes:
        train_last: the last k stages; 0 chooses nothing (the head alone trains: a linear probe).
        train: stages by name, or by glob over stage names (``blocks.*``).
        match: parameters by glob over their whole name (``*.attn.*``; ``*`` crosses dots), or by regular expression
            after ``re:``, searched anywhere in the name.
        kinds: parameters by kind: ``norm``, ``bias`` (BitFit, Ben Zaken et al. 2022: bias terms and the head).
        freeze: patterns as in ``match`` that never train, whatever the criteria above choose.
        combine: a parameter trains when ``any`` of the given criteria chooses it, or only when ``all`` do.
    """

    train_last: int | None = None
    train: list[str] | None = None
    match: list[str] | None = None
    kinds: list[ParameterKind] | None = None
    freeze: list[str] | None = None
    combine: Combine = "any"

    @property
    def chooses(self) -> bool:
        """Whether any criterion is given."""
        return any(v is not None for v in (self.train_last, self.train, self.match, self.kinds, self.freeze))

    def names(self, backbone: Backbone) -> frozenset[str]:
        """Names of the chosen parameters, as in ``backbone.named_parameters()``.

        Raises:
            ConfigError: a pattern or kind that finds nothing, a depth the backbone does not have, or criteria that
                together choose nothing.
            StageError: a stage that is not there.
        """
        owned = dict(backbone.named_parameters())
        criteria: list[frozenset[str]] = []
        if self.train_last is not None:
            criteria.append(_in_stages(backbone, _last(backbone, self.train_last)))
        if self.train is not None:
            criteria.append(_in_stages(backbone, _stages(backbone, self.train)))
        if self.match is not None:
            criteria.append(_matching(owned, self.match, "match"))
        if self.kinds is not None:
            criteria.append(frozenset().union(*(_of_kind(backbone, kind) for kind in self.kinds)))
        chosen = frozenset(owned)
        if criteria:
            chosen = frozenset.union(*criteria) if self.combine == "any" else frozenset.intersection(*criteria)
        if self.freeze is not None:
            chosen -= _matching(owned, self.freeze, "freeze")
        wanted = [c for c in criteria if c] or ([] if criteria else [chosen])
        if not chosen and wanted:
            raise ConfigError(
                f"{self} chooses no parameter of {type(backbone).__name__}; combine: any unites the criteria, and "
                "train_last: 0 alone is the way to train the head only"
            )
        return chosen

    def apply(self, task: Task) -> frozenset[str]:
        """Make exactly these backbone parameters train, heads aside; return the names of those that do."""
        names = self.names(task.backbone)
        task.train_only(p for name, p in task.backbone.named_parameters() if name in names)
        return trainable_names(task.backbone)


def refuse_another(task: Task, chosen: frozenset[str], name: str) -> None:
    """Refuse a second method that has changed what trains since method ``name`` chose; asked when training starts.

    Raises:
        TrainingError: one has.
    """
    if other := trainable_names(task.backbone) ^ chosen:
        raise TrainingError(
            f"methods.{name}: a second method has changed whether backbone parameter {min(other)!r} trains; leave that "
            "to one method"
        )


def _last(backbone: Backbone, count: int) -> list[str]:
    names = [s.name for s in backbone.stages]
    if not 0 <= count <= len(names):
        raise ConfigError(
            f"train_last={count} must be between 0 and {len(names)}, the number of stages: {', '.join(names)}"
        )
    return names[len(names) - count :]


def _stages(backbone: Backbone, patterns: Sequence[str]) -> list[str]:
    names = [s.name for s in backbone.stages]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=3, cutoff=0.4) or names
            raise StageError(
                f"unknown stage {pattern!r}; nearest: {', '.join(near)}; the backbone's stages are {', '.join(names)}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _in_stages(backbone: Backbone, names: Iterable[str]) -> frozenset[str]:
    chosen = set(names)
    ids = {id(p) for stage in backbone.stages if stage.name in chosen for p in stage.parameters()}
    return frozenset(name for name, p in backbone.named_parameters() if id(p) in ids)


def _matching(owned: dict[str, nn.Parameter], patterns: Sequence[str], argument: str) -> frozenset[str]:
    found: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                expression = re.compile(pattern[3:])
            except re.error as error:
                raise ConfigError(f"{argument}: {pattern!r} is not a regular expression: {error}") from error
            hits = {name for name in owned if expression.search(name)}
        else:
            hits = {name for name in owned if fnmatchcase(name, pattern)}
        if not hits:
            plain = re.sub(r"[*?\[\]^$\\()+|]", "", pattern.removeprefix("re:"))
            near = get_close_matches(plain, owned, n=3, cutoff=0.0)
            raise ConfigError(
                f"{argument}: {pattern!r} matches no parameter of the backbone; nearest: {', '.join(near)}. A glob is "
                "held against the whole name (write *.bias, not bias); a regular expression stands after re:"
            )
        found |= hits
    return frozenset(found)


def _of_kind(backbone: Backbone, kind: ParameterKind) -> frozenset[str]:
    """Parameters of a kind. A norm is known by its class's name, so those of timm and transformers are found too."""
    if kind not in get_args(ParameterKind):
        raise ConfigError(f"kinds: {kind!r} is unknown; allowed: {', '.join(get_args(ParameterKind))}")
    if kind == "adapter":
        found = {name for name, _ in backbone.named_parameters() if is_adapter(name)}
    elif kind == "bias":
        found = {name for name, _ in backbone.named_parameters() if re.search(r"(^|[._])bias$", name)}
    else:
        norms = [m for m in backbone.modules() if "norm" in type(m).__name__.lower()]
        ids = {id(p) for m in norms for p in m.parameters(recurse=False)}
        found = {name for name, p in backbone.named_parameters() if id(p) in ids}
    if not found:
        raise ConfigError(f"kinds: {type(backbone).__name__} has no {kind} parameters; choose by train or match")
    return frozenset(found)
