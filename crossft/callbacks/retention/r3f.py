"""R3F: predictions that do not move under noise at the input (Aghajanyan et al. 2020)."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from crossft.backbones.batchnorm import without_statistics
from crossft.callbacks.base import MethodCallback, method_seed
from crossft.callbacks.retention.rows import ids_of, refuse_absent
from crossft.errors import ConfigError, StageError
from crossft.functional.distillation import symmetric_kl
from crossft.tasks import Task
from crossft.types import HasBackbone, Kind, LossTerm, StepOutput

__all__ = ["R3F", "NoisyAgreement"]


class NoisyAgreement(LossTerm):
    """Symmetric divergence between the predictions on x and on x with noise after the first stage.

    Noise and dropout of the second forward are computed from seed, optimizer step and sample, so there is no state to
    restore, batching and processes do not move the noise, and the global generator is untouched.

    Args:
        first: stage after which noise is added (text: the embeddings).
        second: stage the second forward starts at.
        head: key of the head whose predictions are compared.
        kind: of its label space.
        ids: domain ids of the rows.
        epsilon: size of the noise.
        noise: its distribution.
        seed: of the noise.
    """

    def __init__(
        self,
        first: str,
        second: str,
        head: str,
        kind: Kind,
        ids: tuple[int, ...],
        epsilon: float,
        noise: Literal["normal", "uniform"],
        seed: int,
    ) -> None:
        super().__init__()
        self.needs_stages = (first,)
        self.second, self.head, self.kind, self.ids = second, head, kind, ids
        self.epsilon, self.noise, self.seed = epsilon, noise, seed

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """Mean over rows of KL(p || q) + KL(q || p); a scalar."""
        value, clean = step.stages[self.needs_stages[0]], step.logits[self.head]
        if not torch.is_autocast_enabled(value.device.type):
            return self._apart(value, clean, step, model)
        with torch.autocast(value.device.type, enabled=False):  # a half would swallow the noise
            value = value.float()
            return self._apart(value, self._logits(value, step, model, 1), step, model)

    def _apart(self, value: Tensor, clean: Tensor, step: StepOutput, model: HasBackbone) -> Tensor:
        logits = self._logits(value + self._drawn(value, step), step, model)
        return step.mean(symmetric_kl(clean, logits, self.kind), self.ids)

    def _logits(self, value: Tensor, step: StepOutput, model: HasBackbone, dropout: int = 0) -> Tensor:
        """Logits [b, k] from the second stage on, under the same dropout for each call with one number."""
        devices = [value.device] if value.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), without_statistics([model.backbone]):
            torch.manual_seed(self._number(step.batch.step, dropout))
            features = model.backbone.forward_from(self.second, value, step.batch.inputs).features
            found: Tensor = model.heads[self.head](features)
        return found

    def _number(self, step: int, sample: int) -> int:
        """A seed from the term's, the optimizer step and the sample."""
        return (self.seed ^ (step * 0x9E3779B97F4A7C15) ^ sample) & 0x7FFFFFFFFFFFFFFF

    def _drawn(self, value: Tensor, step: StepOutput) -> Tensor:
        """Noise of each row, in the shape of ``value`` [b, ...]."""
        rows = []
        for sample in step.batch.sample_ids.tolist():
            generator = torch.Generator().manual_seed(self._number(step.batch.step, sample))
            shape = value.shape[1:]
            if self.noise == "normal":
                rows.append(torch.randn(shape, generator=generator))
            else:
                rows.append(2.0 * torch.rand(shape, generator=generator) - 1.0)
        return self.epsilon * torch.stack(rows).to(value)


class R3F(MethodCallback):
    """R3F (Aghajanyan et al. 2020, Better Fine-Tuning by Reducing Representational Collapse, eq. 5 and 6).

    Noise is added to the output of the backbone's first stage: the word embeddings of text, as published, the stem's
    output of an image network. One more forward from there, in float32, which takes a second one of the plain input
    under mixed precision. ``SMART`` looks for the worst noise instead. Needs no source data.

    Args:
        weight: lambda (0.1 to 5 in the paper's table 9; 1 here).
        epsilon: standard deviation, or half width, of the noise (1e-5 in the paper).
        noise: ``normal`` or ``uniform``; the paper finds no difference.

    Raises:
        ConfigError: ``epsilon`` is not positive, or too small for weights in half precision.
        StageError: the backbone cannot start from its second stage.
    """

    def __init__(
        self, weight: float = 1.0, epsilon: float = 1e-5, noise: Literal["normal", "uniform"] = "normal"
    ) -> None:
        super().__init__(weight)
        if epsilon <= 0.0:
            raise ConfigError(f"epsilon={epsilon} must be positive: the size of the noise")
        self.epsilon, self.noise = epsilon, noise

    def build(self, task: Task) -> NoisyAgreement:
        """Compare predictions of the target's head on target rows."""
        names = [s.name for s in task.backbone.stages]
        reason = task.backbone.can_start_from(names[1]) if len(names) > 1 else "it has one stage"
        if reason is not None:
            raise StageError(f"methods.{self.name} runs the backbone from its second stage on, and cannot: {reason}")
        targets = [(i, d) for i, d in enumerate(task.domains) if d.role == "target"]
        keys = list(dict.fromkeys(task.head_keys[d.name] for _, d in targets))
        if len(keys) != 1:
            raise ConfigError(
                f"methods.{self.name} compares the predictions of one head; the target domains have {len(keys)}: "
                "name the same labels for all of them in data.labels"
            )
        return NoisyAgreement(
            names[0],
            names[1],
            keys[0],
            targets[0][1].kind,
            tuple(i for i, _ in targets),
            self.epsilon,
            self.noise,
            method_seed(self.name),
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a fit without rows to work on, or of weights in half precision."""
        assert isinstance(pl_module, Task)
        dtype = next(pl_module.backbone.parameters()).dtype
        if dtype in (torch.float16, torch.bfloat16) and self.epsilon < torch.finfo(dtype).eps:
            raise ConfigError(
                f"methods.{self.name}: noise of {self.epsilon} is lost in half precision, which resolves "
                f"{torch.finfo(dtype).eps:.1e}; set trainer.precision to 32-true, 16-mixed or bf16-mixed"
            )
        refuse_absent(trainer, self.name, ids_of(pl_module, "target"))
