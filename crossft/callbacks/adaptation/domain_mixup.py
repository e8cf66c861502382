"""Mixup and CutMix among the labeled rows of one domain, by torchvision."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import v2

from crossft.callbacks.base import MethodCallback, method_seed
from crossft.errors import ConfigError
from crossft.tasks import Task
from crossft.types import Batch, Domain, HasBackbone, ImageSpec, LossTerm, StepOutput

__all__ = ["DomainMixup", "Mixed"]

RowLoss = Callable[[Tensor, Tensor, Tensor, Domain], Tensor]
_KINDS = {"mixup": v2.MixUp, "cutmix": v2.CutMix}


class Mixed(LossTerm):
    """Labeled rows become mixtures of two rows of their domain, with lam of the first.

    Their loss is lam loss(z, y_i) + (1 - lam) loss(z, y_j). The task loss holds loss(z, y_i) already, so the term is
    the mean of (1 - lam) (loss(z, y_j) - loss(z, y_i)), and task loss + 1 * term is the objective. What is drawn is a
    function of the seed, the optimizer step and the rows of a domain in the micro-batch: nothing of it is saved.

    Args:
        kind: ``mixup`` or ``cutmix``.
        alpha: lam is drawn from Beta(alpha, alpha).
        spaces: a domain of each head's label space, by the head's key.
        heads: the head's key of each domain, by domain id.
        loss: the task's loss of each row, from logits, targets and the rows that count.
        seed: of the draws.
    """

    transforms_batch = True

    def __init__(
        self, kind: str, alpha: float, spaces: dict[str, Domain], heads: list[str], loss: RowLoss, seed: int
    ) -> None:
        super().__init__()
        self.kind, self.alpha, self.spaces, self.heads, self.loss, self.seed = kind, alpha, spaces, heads, loss, seed
        self._drawn: tuple[Tensor, Tensor] | None = None

    def transform(self, batch: Batch) -> Batch:
        """Mix the pixels within each domain; labels, domains and ids stay those of the first row."""
        pixels = batch.inputs["pixel_values"].clone()
        partner = torch.arange(len(batch), device=pixels.device)
        rest = torch.zeros(len(batch), device=pixels.device)  # 1 - lam of each row
        for domain in range(len(self.heads)):
            rows = (batch.labeled & (batch.domains == domain)).nonzero().flatten()
            if len(rows) < 2:
                continue
            mix = _KINDS[self.kind](alpha=self.alpha, num_classes=len(rows))
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(_digest(self.seed, batch.step, batch.sample_ids[rows].tolist()))
                pixels[rows], shares = mix(pixels[rows], torch.arange(len(rows), device=rows.device))
            partner[rows] = rows.roll(1)  # whom torchvision mixes each row with
            rest[rows] = 1.0 - shares.diagonal()
        self._drawn = (partner, rest)
        return replace(batch, inputs={**batch.inputs, "pixel_values": pixels}, keys=())

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """What the second labels add, a scalar; 0 where the batch was not rewritten."""
        batch = step.batch
        total = sum((logits.sum() * 0.0 for logits in step.logits.values()), step.features.sum() * 0.0)
        if self._drawn is None:
            return total
        (partner, rest), self._drawn = self._drawn, None
        for key, domain in self.spaces.items():
            ids = torch.tensor([i for i, head in enumerate(self.heads) if head == key], device=rest.device)
            rows = (rest > 0) & torch.isin(batch.domains, ids)
            if not domain.fits(batch.targets):
                continue
            first = self.loss(step.logits[key], batch.targets, rows, domain)
            second = self.loss(step.logits[key], batch.targets[partner], rows, domain)
            total = total + (rest * (second - first).float()).sum() / max(batch.labeled_quota, 1e-12)
        return total


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


class DomainMixup(MethodCallback):
    """Mixup (Zhang et al. 2018, section 1) or CutMix (Yun et al. 2019, eq. 1) within each domain.

    It rewrites the batch before the forward: every labeled row is mixed with another labeled row of its own domain and
    micro-batch, with one lam (and one box) a domain and micro-batch, as torchvision does. Domains stay apart, so
    other terms see rows that belong to one domain. At weight 1 the objective is the published one; at weight 0 no row
    is touched. Partners come from the same process, so the result depends on the number of processes and on
    accumulation.

    Args:
        weight: 1 for the published objective.
        kind: ``mixup`` or ``cutmix``.
        alpha: of the Beta distribution (1: CutMix's value; 0.1 to 0.4 are Mixup's on ImageNet).

    Raises:
        ConfigError: ``kind`` unknown, ``alpha`` not positive, or text.
    """

    def __init__(self, weight: float = 1.0, kind: Literal["mixup", "cutmix"] = "mixup", alpha: float = 0.2) -> None:
        super().__init__(weight)
        if kind not in _KINDS:
            raise ConfigError(f"kind={kind!r} is unknown; allowed: {', '.join(_KINDS)}")
        if alpha <= 0:
            raise ConfigError(f"alpha={alpha} must be positive; small values blend little")
        self.kind, self.alpha = kind, alpha

    def build(self, task: Task) -> LossTerm:
        """Find the label spaces."""
        if not isinstance(task.backbone.input_spec, ImageSpec):
            raise ConfigError(f"methods.{self.name} mixes pixels; token ids cannot be mixed. Set it to null for text")
        heads = [task.head_keys[d.name] for d in task.domains]
        spaces = {key: next(d for d in task.domains if task.head_keys[d.name] == key) for key in task.heads}
        return Mixed(self.kind, self.alpha, spaces, heads, task.per_sample_loss, method_seed(self.name))
