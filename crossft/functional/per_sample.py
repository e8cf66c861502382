"""Sums over rows of powers of per-sample gradients: right for any network, fast for the usual layers.

Squaring the gradient of a batch's mean would shrink it by about the batch size, so each row needs its own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from crossft.functional.layers import Call, Rule, probe_point, rule_of

__all__ = ["GradientPowers"]

Rows = Mapping[str, Tensor]
Tape = list[tuple[nn.Module, Tensor, Tensor, int]]
"""Calls in order: layer, input, output as a point of the graph, and the input's version (in-place changes)."""
HALF_SCALE = 1024.0
"""Factor on what is pulled back through a float16 network, taken out again in float32: 1e-4 squared would be 0."""


class GradientPowers:
    """Adds up sum over rows and over r of |d <c_r, model(row)> / dw|^power for every parameter w, in float32.

    Linear, convolution, BatchNorm (by running statistics), LayerNorm and embedding layers have closed forms: one
    forward, and for each r one backward by activations alone. On the first batch the closed forms are checked on two
    rows against plain autograd; a parameter where they differ (a layer of another kind, tied weights, rows that are
    not the first dimension), or that no such layer holds, is taken through ``torch.func`` instead, row by row in one
    vectorized pass, and where the network cannot be vectorized, one row at a time.

    Memory: activations of the rows given at once, rows x the largest weight of one layer, and rows x the parameters
    without a closed form; the caller chooses the number of rows.

    Modes, buffers, ``requires_grad``, ``.grad`` and the global RNG are left as they are. Parameters are looked up by
    identity, frozen ones included.

    Args:
        model: ``model(rows)`` returns [b, k] from a mapping of tensors with b rows each; in evaluation mode, so that
            a row's output depends on no other row.
        parameters: by name within ``model``; what is measured.
        power: 2 (Fisher) or 1 (MAS).

    Attributes:
        sums: by parameter name, in float32.
        slow: names without a closed form; None before the first batch.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], power: int = 2) -> None:
        self.model, self.power = model, power
        self.parameters = dict(parameters)
        self.sums = {n: torch.zeros(p.shape, device=p.device) for n, p in self.parameters.items()}
        self.slow: frozenset[str] | None = None
        self._names = {id(p): n for n, p in self.parameters.items()}

    @torch.no_grad()
    def outputs(self, rows: Rows) -> Tensor:
        """[b, k] outputs, detached."""
        out: Tensor = self.model(rows)
        return out

    def add(self, rows: Rows, pull: Callable[[Tensor], Tensor]) -> None:
        """Add the rows' contribution.

        Args:
            rows: inputs with b rows each.
            pull: from the outputs [b, k], detached, to what is pulled back from them: the c_r of each row, [r, b, k].
        """
        b = len(next(iter(rows.values())))
        if self.slow is None:
            cotangents = pull(self.outputs(rows))
            if b < 2:
                self._collect(self._one_by_one(rows, cotangents, self.parameters))
                return
            self.slow = self._audit({k: v[:2] for k, v in rows.items()}, cotangents[:, :2])
        if len(self.slow) < len(self.parameters):
            found, cotangents = self._closed_forms(rows, pull)
            self._collect({n: v for n, v in found.items() if n not in self.slow})
        else:
            cotangents = pull(self.outputs(rows))
        if self.slow:
            slow = {n: p for n, p in self.parameters.items() if n in self.slow}
            try:
                self._collect(self._vectorized(rows, cotangents, slow))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # control flow that depends on values, or an operator without a batching rule
                self._collect(self._one_by_one(rows, cotangents, slow))

    def _collect(self, found: Mapping[str, Tensor]) -> None:
        for name, value in found.items():
            self.sums[name] += value

    def _audit(self, rows: Rows, cotangents: Tensor) -> frozenset[str]:
        """Names of the parameters whose closed form is missing or differs from autograd on these rows."""
        right = self._one_by_one(rows, cotangents, self.parameters, together=True)
        found, _ = self._closed_forms(rows, lambda _: cotangents)
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.parameters())
        # A gradient that is 0 but for rounding (a key's bias in attention) says nothing: it may differ by its noise.
        noise = (1e-5 if self.power == 1 else 1e-10) * max(float(v.max()) for v in right.values())
        slow = set()
        for name, value in right.items():
            bound = (0.1 if half else 1e-3) * float(value.norm()) + noise * value.numel() ** 0.5
            if name not in found or float((found[name].to_dense() - value).norm()) > bound:
                slow.add(name)
        return frozenset(slow)

    # -- closed forms ------------------------------------------------------------------------------------------

    def _closed_forms(self, rows: Rows, pull: Callable[[Tensor], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Sums by name for the layers that have closed forms, and what was pulled back."""
        tape: Tape = []
        layers = [m for m in self.model.modules() if any(id(p) in self._names for p in m.parameters(recurse=False))]
        with torch.enable_grad(), _recording(layers, len(next(iter(rows.values()))), tape):
            out = self.model(rows)
        cotangents = pull(out.detach())
        sums: dict[str, Tensor] = {}
        scale = HALF_SCALE if out.dtype == torch.float16 else 1.0
        probes = [probe for _, _, probe, _ in tape]
        for index, cotangent in enumerate(cotangents if probes else ()):
            keep = index + 1 < len(cotangents)
            grads = torch.autograd.grad(
                out, probes, (cotangent * scale).to(out.dtype), retain_graph=keep, allow_unused=True
            )
            self._apply_rules(tape, grads, scale, sums)
        return sums, cotangents

    def _apply_rules(
        self,
        tape: Tape,
        grads: tuple[Tensor | None, ...],
        scale: float,
        sums: dict[str, Tensor],
    ) -> None:
        calls: dict[nn.Module, list[Call]] = {}
        changed = {layer for layer, x, _, version in tape if x._version != version}
        for (layer, x, probe, _), grad in zip(tape, grads, strict=True):
            g = torch.zeros_like(probe) if grad is None else grad
            calls.setdefault(layer, []).append((x.float(), g.float() if scale == 1.0 else g.float() / scale))
        with torch.no_grad():
            for layer, own in calls.items():
                rule = rule_of(layer)
                if rule is None or layer in changed:
                    continue
                try:
                    powers = rule(layer, own, self.power)
                except RuntimeError:  # a subclass with other shapes: its parameters go the slow way
                    continue
                for key, value in powers.items():
                    name = self._names.get(id(getattr(layer, key)))
                    if name is not None and value.shape == self.parameters[name].shape:
                        sums[name] = sums[name] + value if name in sums else value

    # -- any network -------------------------------------------------------------------------------------------

    def _vectorized(self, rows: Rows, cotangents: Tensor, chosen: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Per-sample gradients of all rows at once through ``torch.func``."""
        weights = {n: p.detach() for n, p in chosen.items()}

        def one(row: Rows, cotangent: Tensor) -> dict[str, Tensor]:
            single = {k: v.unsqueeze(0) for k, v in row.items()}
            out, pull = vjp(  # type: ignore[misc]
                lambda w: functional_call(self.model, w, (single,))[0], weights
            )
            total: dict[str, Tensor] = {}
            for c in cotangent:
                (grads,) = pull(c.to(out.dtype))
                for n, g in grads.items():
                    value = g.float().abs().pow(self.power)
                    total[n] = total[n] + value if n in total else value
            return total

        found = vmap(one, in_dims=(0, 1))(dict(rows), cotangents)
        return {n: v.sum(0) for n, v in found.items()}

    def _one_by_one(
        self, rows: Rows, cotangents: Tensor, chosen: Mapping[str, nn.Parameter], together: bool = False
    ) -> dict[str, Tensor]:
        """Per-sample gradients by plain autograd, one row at a time; ``together`` shares one forward over all rows."""
        weights = {n: p.detach().requires_grad_() for n, p in chosen.items()}
        total = {n: torch.zeros(p.shape, device=p.device) for n, p in chosen.items()}
        b = cotangents.shape[1]
        for i in range(b):
            part = slice(0, b) if together else slice(i, i + 1)
            with torch.enable_grad():
                out = functional_call(self.model, weights, ({k: v[part] for k, v in rows.items()},))
            scale = HALF_SCALE if out.dtype == torch.float16 else 1.0
            row = torch.zeros(b, 1, device=cotangents.device).index_fill_(0, torch.tensor(i), scale)
            for index, c in enumerate((cotangents * row)[:, part]):
                keep = index + 1 < len(cotangents)
                leaves = list(weights.values())
                grads = torch.autograd.grad(out, leaves, c.to(out.dtype), retain_graph=keep, allow_unused=True)
                for name, g in zip(weights, grads, strict=True):
                    if g is not None:
                        total[name] += (g.float() / scale).abs().pow(self.power)
        return total


@contextmanager
def _recording(layers: Iterable[nn.Module], b: int, tape: Tape) -> Iterator[None]:
    """Note calls of the layers that have a closed form: the layer, its input, and its output as a point of the graph.

    A probe is handed on as a copy, so that an activation in place changes the copy; a table read once for all rows
    (position embeddings) is handed on with a row for each. An input changed in place later shows in its version.
    """

    def note(layer: nn.Module, x: Tensor, out: Tensor) -> Tensor | None:
        if len(out) == 1 and b > 1 and isinstance(layer, nn.Embedding):
            out, x = out.expand(b, *out.shape[1:]), x.expand(b, *x.shape[1:])
        if len(x) != b or len(out) != b or not out.is_floating_point():
            return None
        probe = out if out.requires_grad else out.detach().requires_grad_()
        tape.append((layer, x.detach(), probe, x._version))
        return probe.clone()

    def after(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        return note(layer, args[0], out)

    with ExitStack() as stack:
        for layer in layers:
            rule: Rule | None = rule_of(layer)
            inner = probe_point(layer)
            if rule is None:
                continue
            if inner is None:
                stack.callback(layer.register_forward_hook(after).remove)
            else:
                _watch_inside(stack, layer, inner, note)
        yield


def _watch_inside(stack: ExitStack, layer: nn.Module, inner: nn.Module, note) -> None:  # type: ignore[no-untyped-def]
    """Note a layer whose affine output is the input of one of its children."""
    inputs: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])

    def reach(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        probe = note(layer, inputs.pop(), args[0])
        return None if probe is None else (probe, *args[1:])

    stack.callback(layer.register_forward_pre_hook(enter).remove)
    stack.callback(inner.register_forward_pre_hook(reach).remove)
