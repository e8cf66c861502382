"""BatchNorm policies: who sets the running statistics. Gamma and beta follow their stage, not the policy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from crossft.errors import ConfigError

__all__ = [
    "BatchNormPolicy",
    "DomainBatchNorm",
    "apply_batchnorm_policy",
    "batch_norms",
    "freeze_statistics_",
    "reestimate_",
    "set_domains",
    "with_domains",
    "without_statistics",
]

BatchNormPolicy = Literal["frozen", "training", "per_domain", "reestimated", "reestimated_source"]
"""``frozen``: running statistics, never moved. ``training``: batch statistics, running ones follow (torch's default).
``per_domain``: one set of running statistics a domain. ``reestimated``: trains as ``training``; what is validated, and
saved at a validation or at an epoch's end, has statistics computed anew by ``reestimate_`` from the targets' training
inputs, in frozen stages too. ``reestimated_source``: likewise, from the sources'. With several processes ``training``,
``per_domain`` and ``reestimated`` normalize each process's own rows in training, as torch does, so their weights are
those of its smaller batches; statistics computed anew are averaged over the batches of all processes."""


_SEEN = "seen"


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """All BatchNorm layers in ``module``, itself included; timm's fused norm-activation layers among them."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


def freeze_statistics_(module: nn.Module) -> None:
    """Let every BatchNorm layer use its running statistics and leave them alone.

    Sets the layers' eval mode, so it is called again after each ``train()``. Parameters keep their gradients.
    Per-domain layers are not touched: their policy is another one.
    """
    for layer in _plain(module):
        layer.eval()


def apply_batchnorm_policy(backbone: nn.Module, policy: BatchNormPolicy, domains: int = 0) -> None:
    """Put a policy into force; called again after each ``train()``, which sets modes anew.

    Args:
        backbone: changed in place.
        policy: see ``BatchNormPolicy``.
        domains: number of domains; read by ``per_domain`` only.

    Raises:
        ConfigError: an unknown policy, two policies at once, or ``per_domain`` without domains.
    """
    if policy not in get_args(BatchNormPolicy):
        raise ConfigError(f"batchnorm={policy!r} is unknown; allowed: {', '.join(get_args(BatchNormPolicy))}")
    converted = [m for m in backbone.modules() if isinstance(m, DomainBatchNorm)]
    if policy == "per_domain":
        if domains < 1:
            raise ConfigError(f"batchnorm='per_domain' needs domains >= 1, got {domains}; pass the number of domains")
        if not converted:
            _convert(backbone, domains)
        return
    if converted:
        raise ConfigError(f"batchnorm={policy!r} on a backbone that has per-domain statistics: choose one policy")
    if policy == "frozen":
        freeze_statistics_(backbone)


class DomainBatchNorm(nn.Module):
    """BatchNorm with one set of statistics a domain and shared scale and shift.

    Domain-specific batch normalization (Chang et al. 2019, eq. 2-4) with the affine part shared: each row is
    normalized with the statistics of its own domain. In training these are the domain's batch statistics, and its
    running ones follow; in evaluation the running ones. Rows whose domain is out of range (-1: padding, or an
    evaluation domain) or was never trained on use the statistics the layer had before (the pretrained ones), in
    both modes. The wrapped layer is kept as ``base``, so its own statistics stay as they were. With several
    processes each normalizes with its own rows, and the running statistics of the first are kept, as in torch.

    Attributes:
        domains: [b] domain id of each row of the current batch; set by ``set_domains``.

    Example:
        >>> layer = DomainBatchNorm(nn.BatchNorm2d(3), domains=2)
        >>> layer.domains = torch.tensor([0, 0, 1, 1])
        >>> layer(torch.randn(4, 3, 2, 2)).shape
        torch.Size([4, 3, 2, 2])
    """

    running_mean: Tensor
    running_var: Tensor
    seen: Tensor

    def __init__(self, base: _BatchNorm, domains: int) -> None:
        super().__init__()
        if base.running_mean is None or base.running_var is None:
            raise ConfigError("per_domain needs BatchNorm layers with running statistics")
        self.base = base
        self.domains: Tensor | None = None
        self.register_buffer("running_mean", base.running_mean.detach().clone().repeat(domains, 1))
        self.register_buffer("running_var", base.running_var.detach().clone().repeat(domains, 1))
        self.register_buffer("seen", torch.zeros(domains, dtype=torch.long, device=base.running_mean.device))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take a plain layer's state too: its statistics are those before any domain's."""
        if f"{prefix}{_SEEN}" not in state_dict and f"{prefix}running_mean" in state_dict:
            for key in list(self.base.state_dict()):
                if f"{prefix}{key}" in state_dict:
                    state_dict[f"{prefix}base.{key}"] = state_dict.pop(f"{prefix}{key}")
            for key in ("running_mean", "running_var"):
                state_dict[prefix + key] = state_dict[f"{prefix}base.{key}"].repeat(len(self.seen), 1)
            state_dict[prefix + _SEEN] = torch.zeros_like(self.seen)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` [b, c, ...], each row by its domain.

        Raises:
            ConfigError: ``domains`` is not set, or its length is not the batch's.
        """
        if self.domains is None or len(self.domains) != len(x):
            got = "nothing" if self.domains is None else f"{len(self.domains)} ids"
            raise ConfigError(f"a per-domain BatchNorm needs one domain id a row: got {got} for {len(x)} rows")
        mean, var = self._statistics(x)
        shape = (len(x), -1, *[1] * (x.dim() - 2))
        y = (x - mean.view(shape)) * torch.rsqrt(var + self.base.eps).view(shape)  # float32 for half-precision x
        return self._affine(y, x.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each row's domain, [b, c] each."""
        assert self.domains is not None
        ids = self.domains.to(x.device)
        trained = (ids >= 0) & (ids < len(self.seen))
        row = ids.clamp(0, len(self.seen) - 1)
        if not self.training:
            trained = trained & (self.seen[row] > 0)
        base_mean, base_var = self.base.running_mean, self.base.running_var
        assert base_mean is not None
        assert base_var is not None
        mean = torch.where(trained[:, None], self.running_mean[row], base_mean)
        var = torch.where(trained[:, None], self.running_var[row], base_var)
        if self.training:
            for domain in ids[trained].unique().tolist():
                rows = ids == domain
                if x[rows].numel() == x.shape[1]:
                    continue  # one value a channel has no variance: its row uses the running statistics
                batch_mean, batch_var = self._update(x[rows], domain)
                mean = torch.where(rows[:, None], batch_mean, mean)
                var = torch.where(rows[:, None], batch_var, var)
        return mean, var

    def _update(self, x: Tensor, domain: int) -> tuple[Tensor, Tensor]:
        """Batch statistics of one domain's rows; its running statistics follow as in ``nn.BatchNorm2d``."""
        flat = x.float().transpose(0, 1).flatten(1)
        mean, var = flat.mean(1), flat.var(1, unbiased=False)
        with torch.no_grad():
            self.seen[domain] += 1
            momentum = self.base.momentum
            rate = 1.0 / float(self.seen[domain]) if momentum is None else momentum
            unbiased = var * flat.shape[1] / (flat.shape[1] - 1)
            self.running_mean[domain] += rate * (mean - self.running_mean[domain])
            self.running_var[domain] += rate * (unbiased - self.running_var[domain])
        return mean, var

    def _affine(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        base = self.base
        if base.weight is not None:
            shape = (1, -1, *[1] * (y.dim() - 2))
            y = y * base.weight.view(shape) + base.bias.view(shape)
        y = y.to(dtype)
        for name in ("drop", "act"):  # timm's BatchNormAct2d
            layer = getattr(base, name, None)
            if isinstance(layer, nn.Module):
                y = layer(y)
        return y


def _convert(backbone: nn.Module, domains: int) -> None:
    found = [
        (parent, name)
        for parent in backbone.modules()
        for name, m in parent.named_children()
        if isinstance(m, _BatchNorm)
    ]
    if not found:
        raise ConfigError("batchnorm='per_domain' on a backbone without BatchNorm layers; leave the policy out")
    for parent, name in found:
        layer = parent.get_submodule(name)
        assert isinstance(layer, _BatchNorm)
        wrapped = DomainBatchNorm(layer, domains)
        wrapped.train(layer.training)
        parent.add_module(name, wrapped)


def set_domains(module: nn.Module, domains: Tensor | None) -> None:
    """Tell every per-domain layer the domain ids [b] of the batch that comes next; None forgets them."""
    for layer in module.modules():
        if isinstance(layer, DomainBatchNorm):
            layer.domains = domains


def with_domains(
    module: nn.Module, state: Mapping[str, Tensor], now: Sequence[str], then: Sequence[str]
) -> dict[str, Tensor]:
    """A state dict whose per-domain layers have the domains of ``module``, from one with others.

    A domain that the state dict knows keeps its statistics; another starts with those the layer had before any, as one
    that was never trained on. The state of plain layers is left alone: per-domain layers load that by themselves.

    Args:
        module: what the state dict is loaded into.
        state: of the same network.
        now: names of the module's domains, by id.
        then: names of the state dict's.

    Raises:
        ConfigError: it has per-domain statistics, and ``module`` has not.
    """
    found = dict(state)
    layers = [key.removesuffix(_SEEN) for key in state if key.endswith(f".{_SEEN}")]
    layers = [prefix for prefix in layers if f"{prefix}base.running_mean" in state]
    if layers and not any(isinstance(m, DomainBatchNorm) for m in module.modules()):
        raise ConfigError(
            "it was trained with model.batchnorm=per_domain, and has no statistics for all; set it here too"
        )
    for prefix in layers:
        for key in ("running_mean", "running_var", _SEEN):
            old, fresh = state[prefix + key], state.get(f"{prefix}base.{key}", torch.zeros((), dtype=torch.long))
            found[prefix + key] = torch.stack([old[then.index(n)] if n in then else fresh.to(old.device) for n in now])
    return found


@torch.no_grad()
def reestimate_(backbone: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Compute the running statistics anew from ``batches``: the cumulative average over them.

    Adaptive batch normalization (Li et al. 2016, algorithm 1): the statistics of a domain replace those of
    pretraining; no label is read. All layers are re-estimated in one pass, each on what earlier layers make with the
    batch's own statistics, as ``torch.optim.swa_utils.update_bn`` does. Every batch counts the same. Modes, momentum
    and ``num_batches_tracked`` stay as they were; dropout is off while this runs.

    Args:
        backbone: changed in place; ``backbone(inputs)`` is called.
        batches: inputs of the backbone. Across processes each brings its own share, and the averages are
            all-reduced, weighted by the number of batches.

    Raises:
        ConfigError: no batch is given on any process, or the backbone has per-domain statistics.
    """
    if any(isinstance(m, DomainBatchNorm) for m in backbone.modules()):
        raise ConfigError("batchnorm='reestimated' on a backbone that has per-domain statistics: choose one policy")
    layers = [layer for layer in batch_norms(backbone) if layer.track_running_stats]
    before = [[b.clone() for b in layer.buffers(recurse=False)] for layer in layers]
    with ExitStack() as stack:
        for module in backbone.modules():
            stack.callback(setattr, module, "training", module.training)
        backbone.eval()
        for layer in layers:
            stack.callback(setattr, layer, "momentum", layer.momentum)
            layer.train().reset_running_stats()
            layer.momentum = None  # torch's cumulative average
        try:
            for inputs in batches:
                backbone(inputs)
            counts = [_average(layer) for layer in layers]
        except BaseException:
            counts = [0] * len(layers)
            raise
        finally:
            for layer, buffers, count in zip(layers, before, counts):
                _restore(layer, buffers, everything=count == 0)
    if layers and not any(counts):
        raise ConfigError("reestimate_ got no batch; pass at least one batch of inputs")


def _average(layer: _BatchNorm) -> int:
    """Average the layer's running statistics over processes, weighted by batches; return the number of batches."""
    assert layer.num_batches_tracked is not None
    assert layer.running_mean is not None
    assert layer.running_var is not None
    count = layer.num_batches_tracked.double()
    if dist.is_available() and dist.is_initialized():
        sums = torch.stack([layer.running_mean.double() * count, layer.running_var.double() * count])
        dist.all_reduce(count)
        dist.all_reduce(sums)
        sums = sums / count.clamp(min=1)
        layer.running_mean.copy_(sums[0])
        layer.running_var.copy_(sums[1])
    return int(count)


def _restore(layer: _BatchNorm, buffers: list[Tensor], everything: bool) -> None:
    for buffer, old in zip(layer.buffers(recurse=False), buffers):
        if everything or buffer is layer.num_batches_tracked:
            buffer.copy_(old)


@contextmanager
def without_statistics(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run BatchNorm layers as their mode says, without moving their running statistics.

    For the second forward of gradient checkpointing, which would otherwise count each batch twice.
    """
    with ExitStack() as stack:
        for layer in {layer for module in modules for layer in module.modules()}:
            if isinstance(layer, DomainBatchNorm):
                stack.callback(_copy, layer.seen, layer.seen.clone())
            elif isinstance(layer, _BatchNorm):
                if layer.num_batches_tracked is not None:
                    stack.callback(_copy, layer.num_batches_tracked, layer.num_batches_tracked.clone())
                stack.callback(setattr, layer, "momentum", layer.momentum)
                layer.momentum = 0.0  # leaves the buffers' bits and autograd's version counters alone
        yield


@torch.no_grad()
def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


def _plain(module: nn.Module) -> list[_BatchNorm]:
    inside = {id(m.base) for m in module.modules() if isinstance(m, DomainBatchNorm)}
    return [layer for layer in batch_norms(module) if id(layer) not in inside]
