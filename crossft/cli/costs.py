"""What a training step costs, phase by phase, counted before any training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from crossft.backbones.batchnorm import set_domains
from crossft.tasks import Task
from crossft.types import ImageSpec

__all__ = ["full_cost", "step_cost"]


def step_cost(task: Task) -> tuple[int, int]:
    """FLOPs of the forward and the backward pass of one row, as the task trains now.

    Matrix products, convolutions and attention are counted as they run (``torch.utils.flop_counter``), on an input of
    the backbone's full size; element-wise work, the optimizer and the attached terms are not. Weights, buffers and
    generators stay as they are.
    """
    training = task.training
    task.eval()
    head = next((h for h in task.heads.values() if any(p.requires_grad for p in h.parameters())), None)
    head = head or next(iter(task.heads.values()))
    mapping = {torch.ops.aten.convolution_backward: _convolution_backward}
    if task.batchnorm == "per_domain":
        set_domains(task.backbone, torch.zeros(1, dtype=torch.long))
    with torch.enable_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        value = head(task.backbone(_one_row(task)).features).sum()
        forward = counter.get_total_flops()
        if value.requires_grad:
            value.backward()
    set_domains(task.backbone, None)
    for parameter in task.parameters():
        parameter.grad = None
    task.train(training)
    return forward, counter.get_total_flops() - forward


def full_cost(task: Task) -> tuple[int, int]:
    """The same where every parameter of the backbone trains; what trains is as before afterwards."""
    before = [(p, p.requires_grad) for p in task.backbone.parameters()]
    task.backbone.requires_grad_(True)
    cost = step_cost(task)
    for parameter, trains in before:
        parameter.requires_grad_(trains)
    return cost


def _convolution_backward(grad: list[int], inputs: list[int], weight: list[int], *rest: Any, **_: Any) -> int:
    """Each gradient that is asked for, of the input and of the weight, costs as much as the forward pass did.

    torch's own count forgets that grouped convolutions are grouped: 40 times too much for EfficientNet.
    """
    transposed, wanted = rest[4], rest[7]
    once = 2 * math.prod(inputs if transposed else grad) * math.prod(weight[1:])
    return int(once * (int(wanted[0]) + int(wanted[1])))


def _one_row(task: Task) -> dict[str, Tensor]:
    spec = task.backbone.input_spec
    if isinstance(spec, ImageSpec):
        return {"pixel_values": torch.zeros(1, spec.channels, *spec.size)}
    ids = torch.zeros(1, spec.max_length, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
