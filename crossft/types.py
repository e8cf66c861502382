"""What the rooms of crossft meet through: domains, batches, step outputs, stages, and the two method protocols."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from crossft.errors import ConfigError

__all__ = [
    "PADDING",
    "Batch",
    "Domain",
    "Encoded",
    "GradientProjection",
    "HasBackbone",
    "ImageSpec",
    "Kind",
    "LateInputs",
    "LossTerm",
    "Role",
    "Stage",
    "StepOutput",
    "TextSpec",
    "WeightPenalty",
    "domain_ids",
    "head_of",
]

Role = Literal["source", "target", "eval"]
Kind = Literal["multiclass", "multilabel", "regression"]

PADDING = -1
"""Domain id of a padding row: a row repeated so that no process is left without one. It counts nowhere."""


@dataclass(frozen=True)
class Domain:
    """A named data distribution, with its role and its label space, as plain values.

    Attributes:
        name: the domain's own name (a folder or file under the data root).
        role: ``source`` (labeled, what the model knows), ``target`` (what it must learn) or ``eval`` (measured only).
        kind: the label space's kind. Binary labels are ``multiclass`` with two names.
        labels: the label names in index order; the columns of a multilabel target; one name for regression.
    """

    name: str
    role: Role
    kind: Kind = "multiclass"
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))

    @property
    def space(self) -> tuple[str, tuple[str, ...]]:
        """What two domains must share to share a head: kind and label names."""
        return (self.kind, self.labels)

    def fits(self, targets: Tensor) -> bool:
        """Whether a batch's targets [b] or [b, c] have the form of this label space."""
        if self.kind == "multilabel":
            return targets.ndim == 2 and targets.shape[1] == len(self.labels)
        return targets.ndim == 1 and targets.is_floating_point() == (self.kind == "regression")


def head_of(domains: Sequence[Domain]) -> dict[str, str]:
    """Map each domain's name to the key of its head: domains with one label space share the head of the first.

    The order source, target, eval decides which domain is first, so a shared head is named after the source.

    Example:
        >>> head_of([Domain("photo", "source", labels=("a", "b")), Domain("sketch", "target", labels=("a", "b"))])
        {'photo': 'photo', 'sketch': 'photo'}
    """
    first: dict[tuple[str, tuple[str, ...]], str] = {}
    order = {"source": 0, "target": 1, "eval": 2}
    for domain in sorted(domains, key=lambda d: order[d.role]):
        first.setdefault(domain.space, domain.name)
    return {domain.name: first[domain.space] for domain in domains}


class LateInputs(Mapping[str, Tensor]):
    """Inputs of a batch that are loaded when somebody first reads them.

    Args:
        load: returns the inputs of the rows at these positions of the batch.
        rows: number of rows of the batch.
    """

    def __init__(self, load: Callable[[Sequence[int]], dict[str, Tensor]], rows: int) -> None:
        self._load, self._rows = load, rows
        self._loaded: dict[str, Tensor] | None = None

    def take(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Inputs of some rows; the others are not loaded."""
        if self._loaded is None:
            return self._load(positions)
        return {k: v[list(positions)] for k, v in self._loaded.items()}

    @property
    def loaded(self) -> bool:
        """Whether somebody has read them."""
        return self._loaded is not None

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> LateInputs:
        """The same inputs with ``fn`` applied to each tensor when it is loaded."""
        return LateInputs(lambda positions: {k: fn(v) for k, v in self.take(positions).items()}, self._rows)

    def _all(self) -> dict[str, Tensor]:
        if self._loaded is None:
            self._loaded = self._load(range(self._rows))
        return self._loaded

    def __getitem__(self, key: str) -> Tensor:
        return self._all()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


@dataclass(eq=False)
class Batch:
    """One micro-batch of one process: rows of all domains together.

    Not frozen: Lightning's transfer assigns to dataclasses. ``to`` and ``pin_memory`` return a new batch.

    Attributes:
        inputs: what the backbone takes: ``pixel_values`` [b, 3, h, w], or ``input_ids`` and ``attention_mask`` [b, t].
        targets: [b] int64 class indices in the row's own label space (-1: none); [b, c] float (multilabel);
            [b] float (regression); nan where there is none.
        labeled: [b] bool, True where the supervised loss may read ``targets``.
        domains: [b] int64 index into the task's ``domains``; -1 marks a padding row, which counts nowhere.
        sample_ids: [b] int64, from the sample's content; stable over paths, orders and processes.
        quota: rows of each domain per micro-batch in this optimizer step, averaged over its micro-batches and
            processes (so exact in a ragged step too); denominators of per-domain means. [len(domains)]
        labeled_quota: the same for labeled rows of all domains together.
        step: the optimizer step this batch belongs to, counted from 0 over the whole fit; -1 in evaluation.
        keys: where each row comes from, as the data module names it; empty in a batch made in another way.
    """

    inputs: Mapping[str, Tensor]
    targets: Tensor
    labeled: Tensor
    domains: Tensor
    sample_ids: Tensor
    quota: tuple[float, ...] = ()
    labeled_quota: float = 0.0
    step: int = -1
    keys: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.domains)

    def _apply(self, fn: Any) -> Batch:
        inputs = self.inputs
        return replace(
            self,
            inputs=inputs.mapped(fn) if isinstance(inputs, LateInputs) else {k: fn(v) for k, v in inputs.items()},
            targets=fn(self.targets),
            labeled=fn(self.labeled),
            domains=fn(self.domains),
            sample_ids=fn(self.sample_ids),
        )

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Batch:
        """Return the batch on ``device``: a new one, or itself where it is there already.

        Args:
            device: where to.
            non_blocking: whether the host goes on at once; None: where the device is a GPU, as Lightning says nothing.
        """
        device = torch.device(device)
        if self.domains.device == device:
            return self
        non_blocking = device.type == "cuda" if non_blocking is None else non_blocking
        return self._apply(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory."""
        return self._apply(lambda t: t.pin_memory())


@dataclass(frozen=True)
class Stage:
    """One ordered slice of a backbone, from input to output.

    Attributes:
        name: as printed and as used in configs (``stem``, ``blocks.0``, ``norm``).
        modules: the modules that make up the slice; their parameters and buffers, and ``extra``, belong to it.
        extra: parameters held directly by the backbone (``cls_token``, ``pos_embed``).
    """

    name: str
    modules: tuple[nn.Module, ...]
    extra: tuple[nn.Parameter, ...] = ()

    def parameters(self) -> list[nn.Parameter]:
        """The stage's parameters, each once, in a fixed order."""
        seen: dict[int, nn.Parameter] = {id(p): p for p in self.extra}
        for module in self.modules:
            for parameter in module.parameters():
                seen.setdefault(id(parameter), parameter)
        return list(seen.values())


@dataclass(eq=False)
class Encoded:
    """What a backbone returns.

    Attributes:
        features: [b, d] pooled.
        tokens: [b, n, d] token or spatial features before pooling, or None.
        mask: [b, n] True where a token is real, or None where all are.
        stages: outputs of the stages that were asked for, by name.
    """

    features: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None
    stages: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageSpec:
    """The preprocessing a vision backbone was pretrained with.

    Attributes:
        size: (height, width) of the input.
        mean, std: per channel, on a 0..1 scale.
        interpolation: ``bilinear`` or ``bicubic``.
        crop_pct: share of the resized image that the evaluation crop keeps.
        channels: number of input channels.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    channels: int = 3


@dataclass(frozen=True, eq=False)
class TextSpec:
    """How a text backbone reads text.

    Attributes:
        tokenizer: a transformers tokenizer.
        max_length: most tokens of one input, special tokens included.
    """

    tokenizer: Any
    max_length: int


class HasBackbone(Protocol):
    """What a loss term may read of the task: nothing else, so terms stay independent of one another."""

    backbone: Any
    heads: nn.ModuleDict
    domains: tuple[Domain, ...]
    head_keys: dict[str, str]
    prefix: Any  # what keeps values of networks that do not change, or None


@dataclass(eq=False)
class StepOutput:
    """What one training step has computed, handed to every attached loss term.

    Attributes:
        batch: the mixed batch.
        features: [b, d] pooled backbone features.
        tokens: [b, n, d] or None; ``mask`` [b, n] or None.
        stages: outputs of the stages that attached terms list in ``needs_stages``.
        logits: by head key, [b, k], each head applied to all rows.
        per_sample_loss: [b] task loss, 0 where unlabeled.
        progress: share of all optimizer steps done, in [0, 1]; the clock of every schedule.
        roles: role of each domain id.
    """

    batch: Batch
    features: Tensor
    logits: dict[str, Tensor]
    per_sample_loss: Tensor
    progress: float
    roles: tuple[Role, ...]
    tokens: Tensor | None = None
    mask: Tensor | None = None
    stages: dict[str, Tensor] = field(default_factory=dict)

    def ids(self, role: Role) -> tuple[int, ...]:
        """Domain ids with this role."""
        return tuple(i for i, r in enumerate(self.roles) if r == role)

    def rows(self, ids: Sequence[int]) -> Tensor:
        """[b] bool: rows of these domain ids. Padding rows are in none."""
        domains = self.batch.domains
        mask = torch.zeros_like(domains, dtype=torch.bool)
        for i in ids:
            mask |= domains == i
        return mask

    def mean(self, values: Tensor, ids: Sequence[int]) -> Tensor:
        """Mean of ``values`` [b] over the rows of domain ``ids``, exact over processes and accumulation.

        The sum over this micro-batch's rows is divided by their quota; averaging over micro-batches and processes,
        as Lightning and DDP do with gradients, then gives the mean over the whole optimizer step.
        """
        quota = sum(self.batch.quota[i] for i in ids)
        kept = torch.where(self.rows(ids), values, torch.zeros((), dtype=values.dtype, device=values.device))
        return kept.sum() / max(quota, 1e-12)


class LossTerm(nn.Module, ABC):
    """A term in the autograd graph: adversarial, discrepancy, distillation, ...

    It returns its unweighted scalar (its own 1/2 or T^2 included); only the task multiplies by the weight. It touches
    its own parameters in every step on every process, draws randomness from its own generator, and reads no other term.
    """

    needs_stages: tuple[str, ...] = ()
    needs_tokens: bool = False
    """Whether it reads ``tokens`` of a step; they may be None where no term does."""
    trains_source_head: bool = False
    transforms_batch: bool = False
    """Whether it rewrites a training batch before the forward; at most one term of a run does."""

    def transform(self, batch: Batch) -> Batch:
        """Return the batch to train on; called where ``transforms_batch`` is set and the weight is not 0."""
        return batch

    @abstractmethod
    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """Return the term's value: a scalar, unweighted."""

    def logs(self) -> dict[str, Tensor]:
        """Detached scalars of the last step worth logging under ``term/NAME/``; read only when the step is logged."""
        return {}


class WeightPenalty(nn.Module, ABC):
    """A penalty on weights alone: L2-SP, EWC, SI, MAS. It never enters the autograd graph."""

    @abstractmethod
    def value(self) -> Tensor:
        """The penalty's value, a scalar, unweighted."""

    @abstractmethod
    def add_grad_(self, weight: float) -> None:
        """Add ``weight`` times the penalty's gradient to ``.grad`` of every anchored parameter that trains.

        Called once per optimizer step, after the all-reduce and unscaling, before clipping.
        """


class GradientProjection(nn.Module, ABC):
    """A rule that changes the gradients of one optimizer step before weight penalties are added: A-GEM."""

    @abstractmethod
    def project_(self, model: HasBackbone) -> None:
        """Change ``.grad`` of the parameters that train.

        Called once per optimizer step unless the weight is 0, after the all-reduce and unscaling, in name order, on
        every process with the same gradients; it must leave the same ones on each. A backward of its own goes through
        ``torch.autograd.grad``, which touches neither ``.grad`` nor DDP's reducer.
        """

    def logs(self) -> dict[str, Tensor]:
        """Detached scalars of the last step worth logging under ``term/NAME/``; read only when the step is logged."""
        return {}


def domain_ids(domains: Sequence[Domain], names: Sequence[str]) -> tuple[int, ...]:
    """Ids of the named domains.

    Raises:
        ConfigError: a name is not a domain of the run.
    """
    known = {d.name: i for i, d in enumerate(domains)}
    unknown = [n for n in names if n not in known]
    if unknown:
        raise ConfigError(f"unknown domain {unknown[0]!r}; the run's domains are {', '.join(known)}")
    return tuple(known[n] for n in names)
