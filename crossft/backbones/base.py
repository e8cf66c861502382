"""The face of every backbone: features, ordered stages, and running from a stage on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from torch import Tensor, nn

from crossft.errors import BackboneError, StageError
from crossft.types import Encoded, ImageSpec, Stage, TextSpec

__all__ = ["Backbone", "StagePlan", "check_partition"]


@dataclass(frozen=True)
class StagePlan:
    """Where a stage lives in the wrapped model, as dotted paths from the backbone.

    Paths rather than modules, so that copies, sharded models and replaced layers stay right.

    Attributes:
        name: the stage's name.
        modules: paths of the modules that make up the stage; no path lies inside another.
        extra: paths of parameters that no listed module holds.
        calls: names, looked up on the wrapped model and called one after the other on the running value; empty where
            the backbone runs the stage in another way.
    """

    name: str
    modules: tuple[str, ...]
    extra: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()


class Backbone(nn.Module, ABC):
    """A pretrained network without its head: pooled features, token features, and ordered stages.

    Attributes:
        num_features: length d of the pooled feature vector.
        input_spec: how inputs are prepared.
        pretrained: True when weights were loaded.
    """

    num_features: int
    input_spec: ImageSpec | TextSpec
    pretrained: bool
    _plans: tuple[StagePlan, ...]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The ordered slices of the network, input to output. They partition its parameters, by identity."""
        return tuple(
            Stage(
                plan.name,
                tuple(self.get_submodule(path) for path in plan.modules),
                tuple(self.get_parameter(path) for path in plan.extra),
            )
            for plan in self._plans
        )

    def stage_of(self, parameter: nn.Parameter) -> Stage:
        """Return the stage that holds ``parameter``, found by identity.

        Raises:
            StageError: the parameter is not one of this backbone's.
        """
        for stage in self.stages:
            if any(p is parameter for p in stage.parameters()):
                return stage
        raise StageError(f"the parameter of shape {tuple(parameter.shape)} belongs to no stage of this backbone")

    def forward(self, inputs: Mapping[str, Tensor], capture: Collection[str] = ()) -> Encoded:
        """Encode a batch.

        Args:
            inputs: ``pixel_values`` [b, c, h, w], or ``input_ids`` [b, t] with ``attention_mask`` [b, t].
            capture: names of the stages whose outputs to return.

        Returns:
            features [b, num_features], tokens [b, n, d], a mask [b, n] for text, and the captured stages.

        Raises:
            StageError: a captured stage is unknown, or its output is not reachable in this model.
        """
        for name in capture:
            self._check_reachable(self._index(name) + 1, f"its output {name!r} cannot be captured")
        return self._encode(0, None, inputs, capture)

    def forward_from(
        self, stage: str, value: Tensor, inputs: Mapping[str, Tensor], capture: Collection[str] = ()
    ) -> Encoded:
        """Encode from ``stage`` on, given that stage's input.

        Args:
            stage: the first stage to run.
            value: its input: the output of the stage before it, as captured (any shape). Ignored for the first stage,
                which reads ``inputs``.
            inputs: as for ``forward``; text still needs ``attention_mask`` here, images need nothing.
            capture: stages, from ``stage`` on, whose outputs to return.

        Raises:
            StageError: the stage is unknown, the model cannot start there, or a captured stage lies before it.
        """
        start = self._index(stage)
        self._check_reachable(start, f"cannot start from {stage!r}")
        for name in capture:
            if self._index(name) < start:
                raise StageError(f"capture={name!r} lies before stage={stage!r}, where the run starts")
        return self._encode(start, value, inputs, capture)

    def can_start_from(self, stage: str) -> str | None:
        """Return None where ``forward_from(stage, ...)`` works, else the reason why it does not.

        Raises:
            StageError: the stage is unknown.
        """
        index = self._index(stage)
        return self._reason(index) if index > 0 else None

    @abstractmethod
    def export(self, folder: Path) -> Path:
        """Write the plain model, loadable without crossft, into ``folder`` and return the folder."""

    @abstractmethod
    def _encode(
        self, start: int, value: Tensor | None, inputs: Mapping[str, Tensor], capture: Collection[str]
    ) -> Encoded:
        """Run stages ``start`` to the last, then pool. ``value`` is None at 0."""

    @abstractmethod
    def _reason(self, index: int) -> str | None:
        """Why the model cannot start at stage ``index`` (> 0), or None."""

    def _check_reachable(self, index: int, what: str) -> None:
        """Raise where the boundary before stage ``index`` cannot be reached; both ends always can."""
        if 0 < index < len(self._plans) and (reason := self._reason(index)) is not None:
            raise StageError(f"{type(self).__name__}: {what}: {reason}")

    def _index(self, name: str) -> int:
        names = [plan.name for plan in self._plans]
        if name in names:
            return names.index(name)
        near = get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise StageError(
            f"unknown stage {name!r}; nearest: {', '.join(near)}; this backbone's stages: {', '.join(names)}"
        )


def check_partition(backbone: Backbone) -> None:
    """Check that the stages hold every parameter of the backbone exactly once.

    Raises:
        BackboneError: a parameter is in no stage or in two, or two stages share a name.
    """
    owner: dict[int, str] = {}
    stages = backbone.stages
    if len({stage.name for stage in stages}) != len(stages):
        raise BackboneError(f"two stages share a name: {[stage.name for stage in stages]}")
    for stage in stages:
        for parameter in stage.parameters():
            if id(parameter) in owner:
                raise BackboneError(f"a parameter is in two stages: {owner[id(parameter)]!r} and {stage.name!r}")
            owner[id(parameter)] = stage.name
    lost = [name for name, parameter in backbone.named_parameters() if id(parameter) not in owner]
    if lost:
        raise BackboneError(f"{len(lost)} parameters are in no stage, the first is {lost[0]!r}")
