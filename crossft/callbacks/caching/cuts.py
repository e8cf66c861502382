"""Where a network is cut: what runs below the cut, and what runs above it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from crossft.backbones import Backbone
from crossft.backbones.batchnorm import set_domains
from crossft.types import Batch, Encoded, LateInputs, Stage

__all__ = ["Cut", "Value", "cuts", "values"]


@dataclass(frozen=True)
class Value:
    """What the stages below a cut make of some rows.

    Attributes:
        flat: [rows, ...], or [tokens of all rows, ...] where each row has as many parts as tokens.
        mask: [rows, t] True on real tokens, or None.
    """

    flat: Tensor
    mask: Tensor | None

    def padded(self) -> Tensor:
        """[rows, ...], tokens padded with zeros to [rows, t, ...]."""
        if self.mask is None:
            return self.flat
        mask = self.mask.reshape(*self.mask.shape, *[1] * (self.flat.dim() - 1))
        out = self.flat.new_zeros(*self.mask.shape, *self.flat.shape[1:])
        return out.masked_scatter_(mask, self.flat)


@dataclass(frozen=True)
class Cut:
    """A place between two stages, or behind the last.

    Attributes:
        below: the stages below it.
        above: name of the first stage above it; None: the pooled features come out of it. A cut from which nothing
            is run (see `crossft.callbacks.caching.constants`) may have another name here.
    """

    below: tuple[Stage, ...]
    above: str | None

    @property
    def name(self) -> str:
        """What the value enters."""
        return self.above or "features"

    def allows(self, capture: Collection[str]) -> bool:
        """Whether the outputs of the stages ``capture`` can be had when the run starts at the cut."""
        known = {stage.name for stage in (self.below if self.above is None else self.below[:-1])}
        return not known.intersection(capture)

    def whole(self, backbone: Backbone, batch: Batch, capture: Collection[str]) -> tuple[Encoded, Value]:
        """Run all stages; also return the value at the cut."""
        inside = self.below[-1].name
        wanted = {*capture, inside} if self.above is not None else {*capture}
        encoded = backbone(batch.inputs, capture=tuple(sorted(wanted)))
        value = self._value(encoded, batch.inputs.get("attention_mask"))
        if inside not in capture:
            encoded.stages.pop(inside, None)
        return encoded, value

    def value(self, backbone: Backbone, batch: Batch, rows: Sequence[int]) -> Value:
        """The value of some rows of a batch, computed alone, without a gradient, in evaluation mode."""
        return values([self], backbone, batch, rows)[0]

    def rest(self, backbone: Backbone, value: Value, batch: Batch, capture: Collection[str]) -> Encoded:
        """Run the stages above the cut on the value of all rows of a batch."""
        padded = value.padded()
        if self.above is None:
            return Encoded(padded)
        inside = self.below[-1].name
        later = [name for name in capture if name != inside]
        encoded = backbone.forward_from(self.above, padded, batch.inputs, capture=later)
        if inside in capture:
            encoded.stages[inside] = padded
        return encoded

    def _value(self, encoded: Encoded, mask: Tensor | None) -> Value:
        if self.above is None:
            return Value(encoded.features.detach(), None)
        value = encoded.stages[self.below[-1].name].detach()
        if mask is None or value.dim() < 3 or value.shape[:2] != mask.shape:
            return Value(value, None)
        return Value(value[mask.bool()], mask.bool())


def values(at: Sequence[Cut], backbone: Backbone, batch: Batch, rows: Sequence[int]) -> list[Value]:
    """The values of some rows at several cuts, computed alone, without a gradient, in evaluation mode."""
    inputs = batch.inputs
    taken = inputs.take(rows) if isinstance(inputs, LateInputs) else {k: v[list(rows)] for k, v in inputs.items()}
    mask = taken.get("attention_mask")
    if mask is not None:  # no longer than these rows need
        used = mask.bool().any(0)
        taken = {k: v[:, used] if v.shape[1:] == mask.shape[1:] else v for k, v in taken.items()}
    capture = tuple(dict.fromkeys(cut.below[-1].name for cut in at if cut.above is not None))
    with torch.no_grad(), _evaluating(backbone):
        set_domains(backbone, batch.domains[list(rows)])
        encoded = backbone(taken, capture=capture)
        set_domains(backbone, batch.domains)
    return [cut._value(encoded, taken.get("attention_mask")) for cut in at]


def cuts(
    backbone: Backbone, frozen: Collection[str], needed: Collection[str], tokens: bool = False
) -> tuple[list[Cut], str]:
    """Cuts to try, the last first, and why there is none.

    Args:
        backbone: the network.
        frozen: stages in which nothing trains; those before the first other stage count.
        needed: stages whose outputs somebody reads.
        tokens: whether somebody reads the features before pooling.
    """
    stages = backbone.stages
    first = next((i for i, stage in enumerate(stages) if stage.name not in frozen), len(stages))
    read = [i for i, stage in enumerate(stages) if stage.name in needed]
    if first == 0:
        return [], "nothing is frozen from the first stage on"
    found = [Cut(stages, None)] if first == len(stages) and not read and not tokens else []
    last = min([first, len(stages) - 1, *(i + 1 for i in read)])
    if last == 0:
        return found, "the backbone has a single stage"
    reason = backbone.can_start_from(stages[last].name)
    if reason is None:
        found.append(Cut(stages[:last], stages[last].name))
    return found, f"the backbone cannot start from {stages[last].name!r}: {reason}"


@contextmanager
def _evaluating(backbone: Backbone) -> Iterator[None]:
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
