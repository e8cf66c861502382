"""Inter-domain mixup: rows of different source domains are blended (Xu et al. 2020; Yan et al. 2020)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from crossft.callbacks.adaptation.roles import Ids, source_groups
from crossft.callbacks.base import MethodCallback, method_seed
from crossft.errors import ConfigError
from crossft.tasks import Task
from crossft.types import Batch, Domain, HasBackbone, ImageSpec, LossTerm, StepOutput

__all__ = ["Blend", "InterDomainMixup"]

RowLoss = Callable[[Tensor, Tensor, Tensor, Domain], Tensor]


class Blend(LossTerm):
    """Each labeled source row becomes lam x_i + (1 - lam) x_j, with j of another source domain.

    The loss of such a row is lam loss(z, y_i) + (1 - lam) loss(z, y_j). The task loss holds loss(z, y_i) already, so
    the term is the mean of (1 - lam) (loss(z, y_j) - loss(z, y_i)), and task loss + 1 * term is the objective. The
    partners and lam are a function of the seed, the optimizer step and the micro-batch's own rows: nothing of them
    needs to be saved.

    Args:
        groups: ids of the source domains.
        head: key of their head.
        domain: a domain of that head's label space.
        loss: the task's loss of each row, from logits, targets and the rows that count.
        alpha: lam is drawn from Beta(alpha, alpha).
        seed: of the draws.
    """

    transforms_batch = True

    def __init__(self, groups: Ids, head: str, domain: Domain, loss: RowLoss, alpha: float, seed: int) -> None:
        super().__init__()
        self.groups, self.head, self.domain, self.loss = groups, head, domain, loss
        self.alpha, self.seed = alpha, seed
        self._drawn: tuple[Tensor, Tensor, float] | None = None

    def transform(self, batch: Batch) -> Batch:
        """Blend the pixels; labels, domains and ids stay those of row i."""
        labeled, domains = batch.labeled.cpu().numpy(), batch.domains.cpu().numpy()
        draw = np.random.default_rng(_digest(self.seed, batch.step, batch.sample_ids.tolist()))
        lam = float(draw.beta(self.alpha, self.alpha))
        rows = np.flatnonzero(labeled & np.isin(domains, self.groups))
        partners = np.arange(len(batch))
        for row in rows:
            others = rows[domains[rows] != domains[row]]
            if len(others):
                partners[row] = draw.choice(others)
        partner = torch.from_numpy(partners).to(batch.domains.device)
        blended = partner != torch.arange(len(batch), device=partner.device)
        self._drawn = (partner, blended, lam)
        pixels = batch.inputs["pixel_values"]
        mixed = torch.where(blended[:, None, None, None], lam * pixels + (1 - lam) * pixels[partner], pixels)
        return replace(batch, inputs={**batch.inputs, "pixel_values": mixed}, keys=())

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """What the second labels add, a scalar; 0 where the batch was not rewritten."""
        logits, batch = step.logits[self.head], step.batch
        if self._drawn is None:
            return logits.sum() * 0.0
        partner, blended, lam = self._drawn
        self._drawn = None
        first = self.loss(logits, batch.targets, blended, self.domain)
        second = self.loss(logits, batch.targets[partner], blended, self.domain)
        return (1 - lam) * (second - first).float().sum() / max(batch.labeled_quota, 1e-12)


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


class InterDomainMixup(MethodCallback):
    """Inter-domain mixup as in DomainBed (Xu et al. 2020, eq. 1; Yan et al. 2020).

    It rewrites the batch before the forward: labeled source rows are blended with rows of other source domains of the
    same micro-batch, with one lam for the micro-batch. Other terms then see the blended rows under their first
    domain. At weight 1 the objective is that of mixup; at weight 0 no row is touched. Partners come from the same
    process, so the result depends on the number of processes and on accumulation.

    Args:
        weight: 1 for the published objective.
        alpha: of the Beta distribution (0.2 in DomainBed).

    Raises:
        ConfigError: ``alpha`` not positive, fewer than two source domains or several label spaces among them, or text.
    """

    needs_source = "labeled"

    def __init__(self, weight: float = 1.0, alpha: float = 0.2) -> None:
        super().__init__(weight)
        if alpha <= 0:
            raise ConfigError(f"alpha={alpha} must be positive; small values blend little")
        self.alpha = alpha

    def build(self, task: Task) -> LossTerm:
        """Find the source domains."""
        who = f"methods.{self.name}"
        groups = source_groups(task, who)
        if not isinstance(task.backbone.input_spec, ImageSpec):
            raise ConfigError(f"{who} blends pixels; token ids cannot be blended. Set it to null for text")
        heads = {task.head_keys[task.domains[g].name] for g in groups}
        if len(heads) > 1:
            raise ConfigError(f"{who} blends labels of one space; the sources have {len(heads)}. Set data.labels")
        domain = task.domains[groups[0]]
        return Blend(groups, heads.pop(), domain, task.per_sample_loss, self.alpha, method_seed(self.name))
