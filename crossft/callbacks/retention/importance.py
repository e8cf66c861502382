"""Importance of the backbone's weights for a role's data: measured, saved with provenance, carried to later runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist

from crossft.backbones import Backbone
from crossft.backbones.batchnorm import set_domains
from crossft.callbacks.retention.chain import run_before
from crossft.callbacks.retention.teacher import check_known
from crossft.data.passes import one_pass, placed, training_rows
from crossft.errors import CheckpointError, ConfigError
from crossft.functional.importance import FisherLabels, check_labels, fisher_cotangents, mas_cotangents
from crossft.functional.modes import evaluating
from crossft.functional.per_sample import GradientPowers
from crossft.runs import replacing
from crossft.tasks import Task
from crossft.types import Batch, ImageSpec, LateInputs, Role

__all__ = ["ANCHOR", "IMPORTANCE", "Importance", "Measure", "carried", "first_to_run", "hash_of", "may_train"]

Values = dict[str, Tensor]
IMPORTANCE = "importance:"
"""What the keys of importance begin with in a file; a parameter's name follows. A run's anchors keep them so too."""
ANCHOR = "anchor:"
"""The same for the points that weights are held at."""
ENTERING = "entering"
"""Key of what enters the first stage that is run."""


@dataclass
class Importance:
    """One non-negative number a weight, in float32, with where it comes from.

    Attributes:
        values: by parameter name within the backbone.
        provenance: plain values: kind, labels, rows, domains, data (fingerprint), weights (hash).
        anchors: where each weight is held; none: at the weights a leg starts from.
    """

    values: Values
    provenance: dict[str, Any] = field(default_factory=dict)
    anchors: Values = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all, with the provenance in its header."""
        both = {IMPORTANCE: self.values, ANCHOR: self.anchors}
        tensors = {k + n: v.detach().cpu().contiguous() for k, values in both.items() for n, v in values.items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, self.header)

    @property
    def header(self) -> dict[str, str]:
        """The provenance as it stands in a file."""
        return {"importance": json.dumps(self.provenance)}

    @classmethod
    def load(cls, path: Path | str) -> Importance:
        """Read what ``save`` wrote, or what a run keeps under ``anchors/``.

        Raises:
            CheckpointError: the file is missing, not safetensors, or holds no importance.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                values, anchors = (
                    {k.removeprefix(p).replace("/", "."): file.get_tensor(k) for k in file.keys() if k.startswith(p)}  # noqa: SIM118
                    for p in (IMPORTANCE, ANCHOR)
                )
                provenance = json.loads((file.metadata() or {}).get("importance", "{}"))
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"importance={path} cannot be read as importance: {error}") from error
        if not values:
            raise CheckpointError(f"importance={path} holds no importance; give the anchors/NAME.safetensors of a run")
        return cls(values, provenance, anchors)

    def fit_to(self, parameters: Mapping[str, nn.Parameter], path: Path | str, needed: Collection[str]) -> Values:
        """The values for these parameters; 0 for what was not measured and is not needed.

        Args:
            parameters: by name.
            path: where they come from, for the message.
            needed: names of those that may train in this run (see ``may_train``).

        Raises:
            CheckpointError: a parameter is missing, or has another shape, or is needed and was never measured.
        """
        left_out = {*self.provenance.get("left_out", ())}
        for name, parameter in parameters.items():
            if name in left_out and name in needed:
                raise CheckpointError(
                    f"importance={path} says nothing of {name}: it was measured where that never trained, and here it "
                    "may; freeze the same stages, or measure it at those weights in a run that trains it"
                )
            if name not in left_out and (name not in self.values or self.values[name].shape != parameter.shape):
                found = tuple(self.values[name].shape) if name in self.values else "missing"
                raise CheckpointError(
                    f"importance={path}: {name} is {found}, the backbone's is {tuple(parameter.shape)}; "
                    "measure it for this backbone (importance: null)"
                )
        return {
            name: torch.zeros(p.shape, device=p.device) if name in left_out else self.values[name].to(p.device)
            for name, p in parameters.items()
        }


def hash_of(module: nn.Module) -> str:
    """Hash (16 hex digits) over a module's parameters and buffers."""
    state = hashlib.blake2b(digest_size=8)
    for name, tensor in module.state_dict().items():
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def carried(task: Task, name: str, required: bool = True) -> Path | None:
    """What the run that this one starts from has left of a method's importance under its name.

    Args:
        task: its anchors say where this run's folder is.
        name: the method's.
        required: whether it is an error that the other run has left none.

    Returns:
        The file; None where this run starts from no other, or keeps no run folder.

    Raises:
        ConfigError: the other run has left none.
    """
    parent = run_before(task)
    if parent is None:
        return None
    files = [parent.anchors / f"{stem}.safetensors" for stem in (f"{name}.final", name)]
    for file in files:
        if file.is_file():
            return file
    if not required:
        return None
    raise ConfigError(
        f"methods.{name} carries importance from the run before, and {parent} has none under that name; name the "
        f"method there too (source_leg.methods.{name}), or give a file (methods.{name}.importance)"
    )


def may_train(task: Task) -> dict[str, nn.Parameter]:
    """Parameters of the backbone, by name, whose stage trains now or in a later phase; what heads share is left out."""
    heads = {id(p) for p in task.heads.parameters()}
    constant = task.frozen_stages - task.thawing
    frozen = {id(p) for stage in task.backbone.stages if stage.name in constant for p in stage.parameters()}
    return {n: p for n, p in task.backbone.named_parameters() if id(p) not in heads | frozen and p.is_floating_point()}


def first_to_run(task: Task, named: Mapping[str, nn.Parameter]) -> int:
    """Index of the stage that a pass over stored prefixes starts at: the last with all of ``named`` at or above it."""
    wanted = {id(p) for p in named.values()}
    stages = task.backbone.stages
    index = next((i for i, s in enumerate(stages) if any(id(p) in wanted for p in s.parameters())), 0)
    while index and task.backbone.can_start_from(stages[index].name) is not None:
        index -= 1
    return index if task.prefix is not None else 0


class _Outputs(nn.Module):
    """Backbone and head as a function of one domain's inputs, [b, k]; owns nothing.

    Args:
        backbone: run from stage ``start`` on.
        head: of the domain.
        domain: its number.
        start: index of a stage; above 0 the rows hold what enters it under ``ENTERING``.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, domain: int, start: int = 0) -> None:
        super().__init__()
        self.backbone, self.head, self.domain = backbone, head, domain
        self.start = backbone.stages[start].name if start else None

    def forward(self, rows: Mapping[str, Tensor]) -> Tensor:
        first = next(iter(rows.values()))
        set_domains(self.backbone, torch.full((len(first),), self.domain, device=first.device))
        if self.start is None:
            encoded = self.backbone(rows)
        else:
            others = {k: v for k, v in rows.items() if k != ENTERING}
            encoded = self.backbone.forward_from(self.start, rows[ENTERING], others)
        out: Tensor = self.head(encoded.features)
        return out


@dataclass(frozen=True)
class Measure:
    """How importance is measured; ``run`` measures it at the task's weights of now.

    Attributes:
        kind: ``fisher`` or ``mas``.
        labels: whose labels the Fisher reads (see ``FisherLabels``).
        draws: labels drawn a row by ``sampled``.
        samples: rows read; None reads all.
        chunk: rows at a time; bounds the memory (see ``GradientPowers``).
        role: whose training split is read.
    """

    kind: Literal["fisher", "mas"] = "fisher"
    labels: FisherLabels = "exact"
    draws: int = 1
    samples: int | None = None
    chunk: int = 16
    role: Role = "source"

    def __post_init__(self) -> None:
        for name in ("draws", "chunk", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        check_labels(self.labels, "multiclass")

    def run(self, task: Task, data: Any, known: Collection[str] = ()) -> Importance:
        """One pass over the role's training split, unaugmented: the mean over rows, all-reduced over processes.

        The heads are left out, whatever shares their parameters with the backbone too. So are stages that never train
        in this run (what a later phase thaws is measured), of which the provenance keeps the names; a prefix cache
        gives what enters the others. Modes, buffers, gradients and generators are left as they were.

        Args:
            task: measured as it is.
            data: bound to its backbone.
            known: domains to leave out, since earlier legs have measured them; where no other is left, all are read.

        Raises:
            ConfigError: the label mode is not defined for the data's labels, the data lacks the role, or nothing has
                trained its head.
        """
        rows = training_rows(data, self.role, self.labels == "empirical", self.samples, known)
        if self.role == "source":
            check_known(task, {task.head_keys[task.domains[number].name] for number in rows}, "importance")
        named = may_train(task)
        totals = {n: torch.zeros(p.shape, device=p.device) for n, p in named.items()}
        count = torch.zeros((), device=task.device)
        with evaluating(task):
            for number, own in rows.items() if named else ():
                count += self._add_domain(task, data, number, own, named, totals)
        if dist.is_available() and dist.is_initialized():
            for tensor in (count, *totals.values()):
                dist.all_reduce(tensor)
        values = {n: t / count for n, t in totals.items()}
        left_out = [n for n, p in task.backbone.named_parameters() if n not in named and p.is_floating_point()]
        provenance = {
            "kind": self.kind,
            "labels": self.labels if self.kind == "fisher" else None,
            "draws": self.draws if self.labels == "sampled" else None,
            "rows": int(count),
            "domains": [task.domains[n].name for n in rows if named],
            "data": data.fingerprint,
            "weights": hash_of(task.backbone),
            **({"left_out": left_out} if left_out else {}),
        }
        return Importance(values, provenance)

    def _add_domain(
        self, task: Task, data: Any, number: int, rows: Any, named: Mapping[str, nn.Parameter], totals: Values
    ) -> int:
        """Add one domain's rows of this process to ``totals``; return their number."""
        domain = task.domains[number]
        if self.kind == "fisher":
            check_labels(self.labels, domain.kind)
        start = first_to_run(task, named)
        model = _Outputs(task.backbone, task.heads[task.head_keys[domain.name]], number, start)
        own = {f"backbone.{n}": p for n, p in named.items()}
        powers = GradientPowers(model, own, power=2 if self.kind == "fisher" else 1)
        seen = 0
        for batch in self._chunks(one_pass(data, {number: rows}, self.chunk), task.backbone):
            set_domains(task.backbone, batch.domains)
            powers.add(_rows(task, batch, start), partial(self._cotangents, batch=batch, kind=domain.kind))
            seen += len(batch)
        set_domains(task.backbone, None)
        for name in named:
            totals[name] += powers.sums[f"backbone.{name}"]
        return seen

    def _chunks(self, batches: Iterator[Batch], backbone: nn.Module) -> Iterator[Batch]:
        """The batches without padding rows, where the backbone is; empty ones are left out."""
        for batch in batches:
            batch = placed(batch, backbone)
            keep = batch.domains >= 0
            if bool(keep.all()):
                yield batch
            elif bool(keep.any()):
                yield _kept(batch, keep)

    def _cotangents(self, logits: Tensor, batch: Batch, kind: Any) -> Tensor:
        if self.kind == "mas":
            return mas_cotangents(logits)
        uniform = self._uniform(batch.sample_ids, logits) if self.labels == "sampled" else None
        return fisher_cotangents(logits, kind, self.labels, batch.targets, uniform)

    def _uniform(self, sample_ids: Tensor, logits: Tensor) -> Tensor:
        """[draws, b, k]: each row's numbers come from its sample id alone, so no batching or process moves them."""
        drawn = []
        for sample in sample_ids.tolist():
            generator = torch.Generator().manual_seed(sample)
            drawn.append(torch.rand(self.draws, logits.shape[1], generator=generator).clamp(1e-6, 1.0 - 1e-6))
        return torch.stack(drawn, 1).to(logits.device)


@torch.no_grad()
def _rows(task: Task, batch: Batch, start: int) -> dict[str, Tensor]:
    """What ``_Outputs`` takes: the inputs, or what enters stage ``start``, from the cache where it is there."""
    if not start:
        return dict(batch.inputs)
    below = task.backbone.stages[start - 1].name
    entering = task.encode(batch, capture=(below,)).stages[below]
    images = isinstance(task.backbone.input_spec, ImageSpec)  # which need no inputs any more
    return {ENTERING: entering, **({} if images else batch.inputs)}


def _kept(batch: Batch, keep: Tensor) -> Batch:
    source, rows = batch.inputs, keep.nonzero().flatten().tolist()
    inputs: Mapping[str, Tensor] = (
        LateInputs(lambda some: source.take([rows[i] for i in some]), len(rows))
        if isinstance(source, LateInputs)
        else {k: v[keep] for k, v in source.items()}
    )
    return Batch(
        inputs=inputs,
        targets=batch.targets[keep],
        labeled=batch.labeled[keep],
        domains=batch.domains[keep],
        sample_ids=batch.sample_ids[keep],
        keys=tuple(key for key, real in zip(batch.keys, keep.tolist()) if real),
    )
