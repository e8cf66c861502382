"""What a method reads of a step: features, predictions, a stage's output; pooled or token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crossft.backbones.batchnorm import set_domains
from crossft.errors import StageError
from crossft.tasks import Task
from crossft.types import Encoded, StepOutput, TextSpec

__all__ = ["Layer", "layer_of", "width_of"]

_OWN = ("features", "logits", "probabilities")


@dataclass(frozen=True)
class Layer:
    """One place in the network.

    Attributes:
        name: ``features`` (pooled), ``logits``, ``probabilities``, or a stage of the backbone.
        head: key of the head that logits and probabilities are of.
        channels_last: layout of the backbone's 4-d maps.
    """

    name: str
    head: str = ""
    channels_last: bool = False

    @property
    def stage(self) -> tuple[str, ...]:
        """The stage to capture, if it is one."""
        return () if self.name in _OWN else (self.name,)

    def rows(self, step: StepOutput) -> Tensor:
        """[b, d]: one vector a row; maps and real tokens are averaged."""
        if self.name == "features":
            return step.features
        if self.name in _OWN:
            logits = step.logits[self.head]
            return logits if self.name == "logits" else F.softmax(logits, 1)
        tokens, mask = self.tokens(step)
        if mask is None:
            return tokens.mean(1)
        weight = mask.unsqueeze(2).to(tokens.dtype)
        return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)

    def tokens(self, step: StepOutput | Encoded) -> tuple[Tensor, Tensor | None]:
        """[b, n, d] and the mask [b, n] of real tokens, or None where all are."""
        if self.name == "features":
            value = step.tokens if step.tokens is not None else step.features
        else:
            value = step.stages[self.name]
        if value.ndim == 4:
            value = value.flatten(1, 2) if self.channels_last else value.flatten(2).transpose(1, 2)
        elif value.ndim == 2:
            value = value.unsqueeze(1)
        fits = step.mask is not None and step.mask.shape == value.shape[:2]
        return value, step.mask if fits else None


def layer_of(task: Task, name: str, head: str = "", allowed: tuple[str, ...] = _OWN) -> Layer:
    """The place of this name.

    Raises:
        StageError: it is none of ``allowed`` and no stage that the backbone can capture.
    """
    stages = [s.name for s in task.backbone.stages]
    if name not in allowed and name not in stages:
        raise StageError(f"layer {name!r} is unknown; allowed: {', '.join([*allowed, *stages])}")
    model: Any = getattr(task.backbone, "model", None)
    return Layer(name, head, getattr(model, "output_fmt", "NCHW") == "NHWC")


@torch.no_grad()
def width_of(task: Task, layer: Layer, tokens: bool) -> int:
    """Width d of what ``layer`` gives; a stage's is measured on one blank input, in evaluation mode."""
    if layer.name == "features" and not tokens:
        return task.backbone.num_features
    backbone = task.backbone
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    set_domains(backbone, torch.tensor([-1]))
    encoded = backbone(_blank(task), capture=layer.stage)
    set_domains(backbone, None)
    for module, training in modes:
        module.training = training
    return int(layer.tokens(encoded)[0].shape[2])


def _blank(task: Task) -> dict[str, Tensor]:
    spec = task.backbone.input_spec
    device = next(task.backbone.parameters()).device
    if isinstance(spec, TextSpec):
        encoded = spec.tokenizer("a", return_tensors="pt")
        return {k: encoded[k].to(device) for k in ("input_ids", "attention_mask")}
    return {"pixel_values": torch.zeros(1, spec.channels, *spec.size, device=device)}
