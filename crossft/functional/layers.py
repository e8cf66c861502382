"""Closed forms of per-sample weight gradients, layer by layer, from a layer's inputs and output gradients.

With output gradient g and input x of one row, a linear layer's weight gradient is the sum over positions t of
g_t x_t^T (Goodfellow 2015, Efficient per-example gradient computations); the other layers are of the same kind. A
layer that is called several times in one pass sums over its calls, before any power is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Call", "probe_point", "rule_of"]

Call = tuple[Tensor, Tensor]
"""One call of a layer: its input, and the gradient of the row's scalar by its output; both with rows first."""

Sums = dict[str, Tensor]
BLOCK = 1 << 17
"""Elements of a weight's gradient worked on at a time."""
Rule = Callable[[Any, list[Call], int], Sums]


def _summed(per_row: Tensor, power: int) -> Tensor:
    """[b, ...] gradients of each row -> [...] sum over rows of their absolute value to a power."""
    return per_row.square().sum(0) if power == 2 else per_row.abs().sum(0)


def _outer(g: list[Tensor], x: list[Tensor], power: int) -> Tensor:
    """Sum over rows of |sum over positions of g x^T|^power, for g [b, t, o] and x [b, t, i]; one row at a time.

    On a CPU a block of outputs at a time, which stays in its cache over all rows.
    """
    gs, xs = (g[0], x[0]) if len(g) == 1 else (torch.cat(g, 1), torch.cat(x, 1))
    if gs.shape[1] == 1:  # one position: the power of a product is the product of powers
        gs, xs = gs.squeeze(1), xs.squeeze(1)
        return gs.square().t() @ xs.square() if power == 2 else gs.abs().t() @ xs.abs()
    sums = gs.new_zeros(gs.shape[2], xs.shape[2])
    block = len(sums) if gs.is_cuda else max(1, BLOCK // xs.shape[2])
    for start in range(0, len(sums), block):
        part = sums[start : start + block]
        own = torch.empty_like(part)
        for own_g, own_x in zip(gs[:, :, start : start + block], xs):
            torch.mm(own_g.t(), own_x, out=own)
            _ = part.addcmul_(own, own) if power == 2 else part.add_(own.abs_())
    return sums


def _linear(layer: nn.Linear, calls: list[Call], power: int) -> Sums:
    g = [g.flatten(1, -2) if g.ndim > 2 else g.unsqueeze(1) for _, g in calls]
    x = [x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1) for x, _ in calls]
    sums = {"weight": _outer(g, x, power)}
    if layer.bias is not None:
        sums["bias"] = _summed(torch.cat(g, 1).sum(1), power)
    return sums


def _conv(layer: nn.Conv2d, calls: list[Call], power: int) -> Sums:
    shape = layer.weight.shape
    if layer.groups == 1:
        columns = [_columns(layer, x, g).transpose(1, 2) for x, g in calls]
        weight = _outer([g.flatten(2).transpose(1, 2) for _, g in calls], columns, power).view(shape)
    else:
        depthwise = layer.groups == layer.in_channels == layer.out_channels
        own = [(_correlated if depthwise else _grouped)(layer, x, g) for x, g in calls]
        weight = _summed(torch.stack(own).sum(0), power)
    sums = {"weight": weight}
    if layer.bias is not None:
        sums["bias"] = _summed(torch.stack([g.flatten(2).sum(2) for _, g in calls]).sum(0), power)
    return sums


def _columns(layer: nn.Conv2d, x: Tensor, g: Tensor) -> Tensor:
    """[b, i * kh * kw, positions] of the input."""
    if layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0):
        return x.flatten(2)
    x, padding = _padded(layer, x, g)
    return F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)


def _grouped(layer: nn.Conv2d, x: Tensor, g: Tensor) -> Tensor:
    """[b, *weight] weight gradients of each row."""
    columns = _columns(layer, x, g)
    columns = columns.reshape(len(x) * layer.groups, -1, columns.shape[2])
    own = g.reshape(len(columns), -1, columns.shape[2]) @ columns.transpose(1, 2)
    return own.view(len(x), *layer.weight.shape)


def _correlated(layer: nn.Conv2d, x: Tensor, g: Tensor) -> Tensor:
    """The same for a depthwise convolution: each channel's input correlated with its own output gradient."""
    x, padding = _padded(layer, x, g)
    channels = len(x) * layer.groups
    own = F.conv2d(
        x.reshape(1, channels, *x.shape[2:]),
        g.reshape(channels, 1, *g.shape[2:]),
        padding=padding,
        stride=layer.dilation,
        dilation=layer.stride,
        groups=channels,
    )
    height, width = layer.kernel_size
    return own[..., :height, :width].reshape(len(x), *layer.weight.shape)


def _padded(layer: nn.Conv2d, x: Tensor, g: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input and its padding; where the output's size says so, padded as TensorFlow does (timm's Conv2dSame)."""
    padding = tuple(int(p) for p in layer.padding)
    reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size)]
    sizes = zip(x.shape[2:], padding, reach, layer.stride)
    if tuple((n + 2 * p - r) // s + 1 for n, p, r, s in sizes) == tuple(g.shape[2:]):
        return x, padding
    total = [max((o - 1) * s + r - n, 0) for o, s, r, n in zip(g.shape[2:], layer.stride, reach, x.shape[2:])]
    (top, left), (bottom, right) = [t // 2 for t in total], [t - t // 2 for t in total]
    return F.pad(x, (left, right, top, bottom)), (0, 0)


def _affine(pairs: list[Call], has_bias: bool, power: int) -> Sums:
    """Scale and shift of a normalization, from pairs of (normalized input, output gradient) [b, t, c]."""
    sums = {"weight": _summed(torch.stack([(x * g).sum(1) for x, g in pairs]).sum(0), power)}
    if has_bias:
        sums["bias"] = _summed(torch.stack([g.sum(1) for _, g in pairs]).sum(0), power)
    return sums


def _batch_norm(layer: _BatchNorm, calls: list[Call], power: int) -> Sums:
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    scale = torch.rsqrt(var.float() + layer.eps)
    pairs = []
    for x, g in calls:
        rows = [t.reshape(len(t), t.shape[1], -1).transpose(1, 2) for t in (x, g)]
        pairs.append(((rows[0] - mean.float()) * scale, rows[1]))
    return _affine(pairs, layer.bias is not None, power)


def _layer_norm(layer: nn.LayerNorm, calls: list[Call], power: int) -> Sums:
    shape = list(layer.normalized_shape)
    pairs = []
    for x, g in calls:
        normal = F.layer_norm(x, shape, eps=layer.eps)
        pairs.append((normal.reshape(len(x), -1, *shape), g.reshape(len(x), -1, *shape)))
    return _affine(pairs, layer.bias is not None, power)


def _embedding(layer: nn.Embedding, calls: list[Call], power: int) -> Sums:
    """A sparse tensor: only the rows of the table that a row's ids name are touched."""
    touched: list[Tensor] = []
    values: list[Tensor] = []
    ids, grads = (torch.cat([c[i].flatten(1, c[0].ndim - 1) for c in calls], 1) for i in (0, 1))
    for row, g in zip(ids.long(), grads):
        names, place = row.unique(return_inverse=True)
        own = torch.zeros(len(names), g.shape[1], device=g.device).index_add_(0, place, g)
        if layer.padding_idx is not None:
            own[names == layer.padding_idx] = 0.0
        touched.append(names)
        values.append(own.square() if power == 2 else own.abs())
    names, sums = torch.cat(touched)[None], torch.cat(values)
    return {"weight": torch.sparse_coo_tensor(names, sums, layer.weight.shape, check_invariants=False)}


_RULES: tuple[tuple[type[nn.Module], Rule], ...] = (
    (nn.Linear, _linear),
    (nn.Conv2d, _conv),
    (_BatchNorm, _batch_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.Embedding, _embedding),
)


def rule_of(layer: nn.Module) -> Rule | None:
    """The closed form for a layer, or None. A subclass may compute something else: the caller checks the result."""
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return None
    if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None or not layer.affine):
        return None
    if isinstance(layer, nn.LayerNorm) and layer.weight is None:
        return None
    return next((rule for kind, rule in _RULES if isinstance(layer, kind)), None)


def probe_point(layer: nn.Module) -> nn.Module | None:
    """The child whose *input* is the layer's affine output, where the layer goes on after it (timm BatchNormAct2d)."""
    if isinstance(layer, _BatchNorm) and isinstance(drop := getattr(layer, "drop", None), nn.Module):
        return drop
    return None
