"""The loss terms, weight penalties and gradient projections that methods have attached to a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from crossft.errors import CheckpointError, ConfigError
from crossft.tasks.sharding import sliced_state, whole
from crossft.types import Batch, GradientProjection, HasBackbone, LossTerm, StepOutput, WeightPenalty

__all__ = ["Attachments"]

Weight = float | Callable[[float], float]


class Attachments(nn.Module):
    """Loss terms, weight penalties and gradient projections by method name, with their weights.

    A child module of the task, so that terms follow its device, DDP wrap and optimizer; left out of its state dict.

    Attributes:
        named_terms: loss terms in name order.
        named_penalties: weight penalties in name order.
        needs_stages: stages whose outputs the attached terms read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.terms = nn.ModuleDict()
        self.penalties = nn.ModuleDict()
        self.projections = nn.ModuleDict()
        self.weights: dict[str, Weight] = {}
        self.named_terms: list[tuple[str, LossTerm]] = []
        self.named_penalties: list[tuple[str, WeightPenalty]] = []
        self.needs_stages: tuple[str, ...] = ()
        self.watched: dict[str, Tensor] | None = None  # a dict asks the next step for its parts, weighted, with graph
        self.anchors: Any = None  # where constant tensors go; None keeps them inside the checkpoint

    def attach(self, name: str, method: LossTerm | WeightPenalty | GradientProjection, weight: Weight) -> None:
        """Attach a method under its name.

        Raises:
            ConfigError: the name is taken, the method is of no known kind, or a second one that rewrites the batch.
        """
        if name in self.weights:
            raise ConfigError(f"methods.{name} is attached twice; every method needs a name of its own")
        if isinstance(method, LossTerm):
            other = next((n for n, term in self.named_terms if term.transforms_batch), None)
            if method.transforms_batch and other is not None:
                raise ConfigError(f"methods.{name} and methods.{other} both rewrite the batch; set one of them to null")
            self.terms[name] = method
        elif isinstance(method, WeightPenalty):
            self.penalties[name] = method
        elif isinstance(method, GradientProjection):
            self.projections[name] = method
        else:
            allowed = "LossTerm, WeightPenalty or GradientProjection"
            raise ConfigError(f"methods.{name} built a {type(method).__name__}; allowed: {allowed}")
        self.weights[name] = weight
        self.named_terms = sorted(cast("dict[str, LossTerm]", dict(self.terms.items())).items())
        self.named_penalties = sorted(cast("dict[str, WeightPenalty]", dict(self.penalties.items())).items())
        self.needs_stages = tuple(sorted({stage for _, term in self.named_terms for stage in term.needs_stages}))

    def weight(self, name: str, progress: float) -> float:
        """The method's weight at this share of training."""
        weight = self.weights[name]
        return weight(progress) if callable(weight) else weight

    @property
    def trains_source_head(self) -> bool:
        """Whether any attached term trains the source's own head."""
        return any(term.trains_source_head for _, term in self.named_terms)

    def transform(self, batch: Batch, progress: float) -> Batch:
        """The batch to train on, rewritten by the one term that does so, unless its weight is 0."""
        for name, term in self.named_terms:
            if term.transforms_batch and self.weight(name, progress) != 0:
                return term.transform(batch)
        return batch

    def add_terms(self, loss: Tensor, step: StepOutput, model: HasBackbone) -> tuple[Tensor, dict[str, Tensor]]:
        """Add every term times its weight to the task loss, in name order; return the sum and the raw values."""
        values: dict[str, Tensor] = {}
        parts = {"task": loss}
        for name, term in self.named_terms:
            value = term(step, model)
            parts[name] = self.weight(name, step.progress) * value
            loss = loss + parts[name]
            values[name] = value.detach()
        if self.watched is not None:
            self.watched = parts
        return loss, values

    def project_grads_(self, model: HasBackbone, progress: float) -> None:
        """Let every projection whose weight is not 0 change the gradients, in name order."""
        for name, rule in sorted(self.projections.items()):
            if self.weight(name, progress) != 0:
                cast(GradientProjection, rule).project_(model)

    def add_penalty_grads_(self, progress: float) -> None:
        """Add every penalty's weighted gradient to ``.grad``, in name order."""
        for name, penalty in self.named_penalties:
            penalty.add_grad_(self.weight(name, progress))

    @torch.no_grad()
    def gradient_ratios(self, parameters: Sequence[nn.Parameter], progress: float) -> dict[str, Tensor]:
        """Norm of every penalty's weighted gradient over that of ``.grad`` as it is, on the weights it acts on.

        Gradients are left as they were. It holds one more gradient while it runs.

        Args:
            parameters: all that may have a gradient.
            progress: share of training done.
        """
        own = [p.grad for p in parameters]
        ratios: dict[str, Tensor] = {}
        try:
            for name, penalty in self.named_penalties:
                for parameter in parameters:
                    parameter.grad = None
                penalty.add_grad_(self.weight(name, progress))
                pairs = [(p.grad, g) for p, g in zip(parameters, own) if p.grad is not None and g is not None]
                if pairs:
                    pull, task = (torch.stack(torch._foreach_norm(list(side))).norm() for side in zip(*pairs))
                    ratios[name] = pull.float() / task.float()
        finally:
            for parameter, gradient in zip(parameters, own):
                parameter.grad = gradient
        return ratios

    @torch.no_grad()
    def logs(self, values: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        """``term/NAME``, ``term/NAME/weighted`` and the terms' own scalars, for a step that is logged."""
        raw = {**values, **{name: penalty.value() for name, penalty in self.named_penalties}}
        logs: dict[str, Tensor] = {}
        for name, value in raw.items():
            logs[f"term/{name}"] = value
            logs[f"term/{name}/weighted"] = self.weight(name, progress) * value
        for name, own in [*self.named_terms, *sorted(self.projections.items())]:
            logs |= {f"term/{name}/{key}": v for key, v in cast("LossTerm | GradientProjection", own).logs().items()}
        return logs

    def save(self) -> dict[str, Any]:
        """State of every method by name; constant tensors as references where a store for them is set.

        Where the task is sharded every process calls it, and the first one gets the tensors.
        """
        saved: dict[str, Any] = {}
        for name, module in self._all().items():
            state = whole(dict(module.state_dict()))
            constant = {k: state.pop(k) for k in getattr(module, "constants", ()) if k in state}
            if constant and self.anchors is not None:
                saved[name] = {"state": dict(state), "anchors": self._put(name, module, constant)}
            else:
                saved[name] = {"state": {**state, **constant}}
        return saved

    def _all(self) -> dict[str, nn.Module]:
        return {name: m for kind in (self.terms, self.penalties, self.projections) for name, m in kind.items()}

    def _put(self, name: str, module: nn.Module, constant: dict[str, Tensor]) -> Any:
        """Store constant tensors, with what the module says of them (``metadata``, text by key) in the header."""
        return self.anchors.put(name, constant, getattr(module, "metadata", None))

    def load(self, saved: dict[str, Any]) -> None:
        """Restore what ``save`` returned.

        Raises:
            CheckpointError: the checkpoint's methods are not those attached, or an anchor file is missing or changed.
        """
        mine = self._all()
        if set(saved) != set(mine):
            raise CheckpointError(
                f"the checkpoint holds the methods {sorted(saved)}, the run has {sorted(mine)}; "
                "resume with the run's own config, or start a new run with --init"
            )
        for name, module in mine.items():
            state = dict(saved[name]["state"])
            if "anchors" in saved[name]:
                if self.anchors is None:
                    raise CheckpointError(f"methods.{name} has its anchors in a run folder; resume from that folder")
                state |= self.anchors.get(saved[name]["anchors"])
            module.load_state_dict(sliced_state(module, state))
