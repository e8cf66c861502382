"""The base task: one forward over a mixed batch, one loss, any number of attached terms, one optimizer step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from crossft.backbones import Backbone
from crossft.backbones.batchnorm import BatchNormPolicy, apply_batchnorm_policy, set_domains
from crossft.errors import ConfigError, TrainingError
from crossft.optim import Constant, Schedule, finite_steps, parameter_groups
from crossft.tasks.attachments import Attachments
from crossft.tasks.evaluation import Evaluation
from crossft.tasks.prefix import Prefix
from crossft.tasks.reestimation import Reestimation
from crossft.tasks.sharding import shard_, sliced_state
from crossft.tasks.trainability import Trainability, hold_frozen_
from crossft.types import Batch, Domain, Encoded, GradientProjection, Kind, LossTerm, StepOutput, WeightPenalty, head_of

__all__ = ["Task"]


def _default_optimizer(groups: Iterable[Any]) -> Optimizer:
    return torch.optim.AdamW(groups, lr=3e-4, fused=True)


class Task(LightningModule):
    """Backbone + heads + task loss + metrics; methods attach loss terms and weight penalties to it.

    Args:
        backbone: the pretrained network.
        domains: the run's domains with their label spaces. The command line fills this in from the data before the
            task is built; domain ids in a batch index into it.
        optimizer: any torch optimizer by class path; its ``lr`` and ``weight_decay`` are those of the last stage.
            Default: AdamW with lr 3e-4.
        schedule: factor on every group's learning rate by optimizer step. Default: constant.
        head_multiplier: factor on the heads' learning rate (3: from the measurements in ``experiments/demo``).
        layer_decay: factor on the learning rate per stage of depth (1: none).
        head_dropout: dropout before each head.
        batchnorm: policy for BatchNorm *statistics*. ``auto`` is ``frozen`` for a pretrained backbone (most of the
            forgetting of a fine-tuned CNN comes from its statistics) and ``training`` otherwise. The statistics of a
            frozen stage never move in training; ``reestimated`` (AdaBN) trains as ``training``, with others evaluated.

    Raises:
        ConfigError: no domains, or a setting out of range.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ()
    """Kinds of label spaces the task learns."""

    def __init__(
        self,
        backbone: Backbone,
        domains: list[Domain] | None = None,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        schedule: Schedule | None = None,
        head_multiplier: float = 3.0,
        layer_decay: float = 1.0,
        head_dropout: float = 0.0,
        batchnorm: Literal["auto"] | BatchNormPolicy = "auto",
    ) -> None:
        super().__init__()
        if not domains:
            raise ConfigError("domains=[] is empty: a task needs at least one; pass data.domains after data.prepare()")
        for domain in domains:
            if domain.kind not in self.kinds:
                other = "Regression" if domain.kind == "regression" else "Classification"
                raise ConfigError(f"domain {domain.name!r} has {domain.kind} labels; use crossft.tasks.{other}")
        self.domains: tuple[Domain, ...] = tuple(domains)
        # Whose head `forward` and `predict_step` use where none is named.
        self.default_domain = next((d.name for d in self.domains if d.role == "target"), self.domains[0].name)
        self.head_keys = head_of(self.domains)
        self.backbone = backbone
        self.heads = nn.ModuleDict()
        for domain in self.domains:
            key = self.head_keys[domain.name]
            if key not in self.heads:
                self.heads[key] = self.build_head(backbone.num_features, domain, head_dropout)
        # The first domain of each label space stands for it.
        self._spaces = {k: next(d for d in self.domains if self.head_keys[d.name] == k) for k in self.heads}
        self._roles = tuple(d.role for d in self.domains)
        self.trained_heads: frozenset[str] = frozenset(self.heads)
        self.known_heads: frozenset[str] | None = None  # that an earlier run trained; None: nobody has said
        self.attachments = Attachments()
        self.evaluation = Evaluation(self.domains)
        self._make_optimizer = optimizer or _default_optimizer
        self.schedule = schedule or Constant()
        self._head_multiplier, self._layer_decay = head_multiplier, layer_decay
        auto: BatchNormPolicy = "frozen" if backbone.pretrained else "training"
        self.batchnorm = auto if batchnorm == "auto" else batchnorm
        apply_batchnorm_policy(backbone, self.batchnorm, len(self.domains))
        self._trainability = Trainability()
        self.thawing: frozenset[str] = frozenset()  # stages that a later phase trains
        self.train_only()
        self._total_steps, self._reestimation = 0, Reestimation(self.batchnorm)
        self.prefix: Prefix | None = None
        # Anchors are the same on every process and never change: DDP need not broadcast them at each forward.
        self._ddp_params_and_buffers_to_ignore: list[str] = []

    def __setattr__(self, name: str, value: Any) -> None:
        """Lightning names its hooks in some forty places a step; a module would look whether each is a parameter."""
        (super().__setattr__ if name != "_current_fx_name" else self.__dict__.__setitem__)(name, value)

    # -- what a kind of task defines ---------------------------------------------------------------------------

    def build_head(self, num_features: int, domain: Domain, dropout: float) -> nn.Module:
        """Build the head of a label space: dropout and a linear layer, [b, d] -> [b, k]."""
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(num_features, len(domain.labels)))

    @abstractmethod
    def per_sample_loss(self, logits: Tensor, targets: Tensor, rows: Tensor, domain: Domain) -> Tensor:
        """Task loss [b] under one label space's logits [b, k]: of the marked ``rows`` [b], and 0 for the others.

        Targets of other rows may be anything (-1, NaN, an index of another space) and must not reach a gradient.
        """

    @abstractmethod
    def predictions(self, logits: Tensor, domain: Domain) -> Tensor:
        """What metrics and predictions read of a domain: probabilities [b, k], or values [b] for regression."""

    # -- one step ----------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of all optimizer steps done, in [0, 1]: the clock of every schedule."""
        return min(1.0, self.trainer.global_step / self._total_steps) if self._total_steps else 0.0

    def forward(self, inputs: dict[str, Tensor], domain: str | None = None) -> Tensor:
        """Logits [b, k] of the head of ``domain`` (``default_domain``: the first target, else the first)."""
        name = domain or self.default_domain
        if self.batchnorm == "per_domain":
            index = [d.name for d in self.domains].index(name)
            set_domains(self.backbone, torch.full((len(next(iter(inputs.values()))),), index, device=self.device))
        found: Tensor = self.heads[self.head_keys[name]](self.backbone(inputs).features)
        return found

    def encode(self, batch: Batch, capture: Collection[str] = ()) -> Encoded:
        """Run the backbone over a batch; from stored values of its frozen prefix where a method keeps them."""
        return self.prefix.encode(self, batch, capture) if self.prefix else self.backbone(batch.inputs, capture=capture)

    def model_step(self, batch: Batch) -> StepOutput:
        """Run backbone and heads over the whole mixed batch; shared by training, validation and test."""
        capture = self.attachments.needs_stages if self.training else ()
        if self.batchnorm == "per_domain":
            set_domains(self.backbone, batch.domains)
        encoded = self.encode(batch, capture)
        logits = {key: head(encoded.features) for key, head in self.heads.items()}
        return StepOutput(
            batch=batch,
            features=encoded.features,
            tokens=encoded.tokens,
            mask=encoded.mask,
            stages=encoded.stages,
            logits=logits,
            per_sample_loss=self._row_losses(logits, batch),
            progress=self.progress if self.training else 0.0,
            roles=self._roles,
        )

    def _row_losses(self, logits: dict[str, Tensor], batch: Batch) -> Tensor:
        """[b] task loss of each labeled row under the head of its own label space, 0 elsewhere."""
        if len(self._spaces) == 1:
            key, domain = next(iter(self._spaces.items()))
            return self.per_sample_loss(logits[key], batch.targets, batch.labeled, domain).float()
        total = torch.zeros(len(batch), device=batch.domains.device)
        for key, domain in self._spaces.items():
            if not domain.fits(batch.targets):
                continue  # this head's domains are in other batches
            own = [batch.domains == i for i, d in enumerate(self.domains) if self.head_keys[d.name] == key]
            rows = batch.labeled & torch.stack(own).any(0)
            total = total + self.per_sample_loss(logits[key], batch.targets, rows, domain).float()
        return total

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Task loss plus every attached term times its weight; terms sum in name order."""
        now = self.trainer.global_step
        if batch.step >= 0 and batch.step != now:
            raise TrainingError(
                f"data and clock are out of step: the batch belongs to optimizer step {batch.step}, "
                f"the trainer is at {now}; rows would be skipped or repeated"
            )
        attached = self.attachments
        step = self.model_step(attached.transform(batch, self.progress) if attached.named_terms else batch)
        quota = batch.labeled_quota or float(max(1, len(batch)))
        task_loss = step.per_sample_loss.sum() / quota
        loss, values = attached.add_terms(task_loss, step, self)
        if (now + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            logs = {"train/loss": task_loss.detach(), **attached.logs(values, step.progress)}
            self.log_dict(logs, batch_size=1, sync_dist=self.trainer.world_size > 1)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Project the gradients, then add the weight penalties' own: once per optimizer step, all-reduced, unscaled."""
        if self.attachments.projections or self.attachments.penalties:
            self.attachments.project_grads_(self, self.progress)
            self.attachments.add_penalty_grads_(self.progress)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the model's gradients and each term's own separately, so a term cannot shrink the model's step."""
        if not gradient_clip_val:
            return
        owned = [list(term.parameters()) for term in self.attachments.terms.values()]
        for parameters in ([*self.backbone.parameters(), *self.heads.parameters()], *owned):
            if gradient_clip_algorithm == "value":
                nn.utils.clip_grad_value_(parameters, gradient_clip_val)
            elif parameters:
                nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    # -- evaluation --------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Update the metrics of the loader's domain; callbacks read the step that is returned."""
        return self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics of the loader's domain."""
        self._evaluate("test", batch, dataloader_idx)

    def _evaluate(self, split: Literal["val", "test"], batch: Batch, dataloader_idx: int) -> StepOutput:
        name = self.trainer.datamodule.eval_domains(split)[dataloader_idx]  # type: ignore[attr-defined]
        step, key = self.model_step(batch), self.head_keys[name]
        self.evaluation.update(name, self.predictions(step.logits[key], self._spaces[key]), step)
        return step

    def on_validation_epoch_start(self) -> None:
        """Start the metrics afresh."""
        self.evaluation.reset()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log ``DOMAIN/val/METRIC``; a schedule that follows a metric sees it, before callbacks save."""
        self._log_evaluation("val")
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.schedule.observe(self.trainer.callback_metrics)

    def on_test_epoch_end(self) -> None:
        """Log ``DOMAIN/test/METRIC``."""
        self._log_evaluation("test")

    def _log_evaluation(self, split: Literal["val", "test"]) -> None:
        metrics = self.evaluation.compute(split, lambda seen: self.trainer.strategy.reduce(seen, reduce_op="sum"))
        self.log_dict(metrics, batch_size=1, sync_dist=self.trainer.world_size > 1)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Sample ids and predictions of the batch's rows, padding left out."""
        keep = batch.domains >= 0
        found = self.predictions(self(batch.inputs), self._spaces[self.head_keys[self.default_domain]])
        return {"sample_ids": batch.sample_ids[keep], "predictions": found[keep]}

    # -- what trains -------------------------------------------------------------------------------------------

    def train_only(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Make exactly these backbone parameters train (None: those that do); a stage with none of them is frozen.

        Frozen means parameters (no gradient at all), buffers, and train-mode behavior: evaluation mode (no dropout,
        BatchNorm by running statistics), whatever ``train()`` is called. A stage in which anything trains, adapters
        alone as well, is in training mode as a whole.
        """
        self._trainability.choose_(self.backbone, parameters)
        self.train(self.training)

    def train_stages(self, names: Collection[str]) -> None:
        """Make exactly these backbone stages train.

        Raises:
            StageError: a name is not a stage of the backbone.
        """
        stages = self.backbone.stages
        self.train_only([p for name in names for p in stages[self.backbone._index(name)].parameters()])

    @property
    def frozen_stages(self) -> frozenset[str]:
        """Names of the stages in which nothing trains."""
        return self._trainability.frozen

    def train(self, mode: bool = True) -> Task:
        """Set modes; frozen stages and heads stay in evaluation mode, BatchNorm follows its policy."""
        super().train(mode)
        if mode:
            apply_batchnorm_policy(self.backbone, self.batchnorm, len(self.domains))
            hold_frozen_(self.backbone, self.frozen_stages)
            for key in self.heads.keys() - self.trained_heads:
                self.heads[key].eval()
        return self

    # -- life cycle --------------------------------------------------------------------------------------------

    def attach(self, name: str, method: LossTerm | WeightPenalty | GradientProjection, weight: float) -> None:
        """Attach a term, penalty or projection under the method's name; called from a callback's ``setup``."""
        self.attachments.attach(name, method, weight)
        penalty = isinstance(method, WeightPenalty)
        same = [n for n, _ in method.named_buffers()] if penalty else list(getattr(method, "constants", ()))
        prefix = f"attachments.{'penalties' if penalty else 'terms'}.{name}."
        self._ddp_params_and_buffers_to_ignore += [prefix + n for n in same]

    def setup(self, stage: str) -> None:
        """Freeze the heads that nothing trains: a source label space that differs keeps its head as it is."""
        if stage != "fit":
            return
        names = getattr(self.trainer.datamodule, "training_domains", None)  # type: ignore[attr-defined]
        if names is not None:
            self.trained_heads = frozenset(self.head_keys[n] for n in names)
            if self.attachments.trains_source_head:
                self.trained_heads |= {self.head_keys[d.name] for d in self.domains if d.role == "source"}
        for key, head in self.heads.items():
            head.requires_grad_(key in self.trained_heads)
        self.train()  # an evaluation before this may have left other modes
        self.train_only()
        self._reestimation.begin(self)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """After the start of the fit, a resume, a phase change or a validation: check that all trains as it was set."""
        self._reestimation.put_back_(self)
        if self._trainability.due:
            self._trainability.check(self)

    def on_validation_start(self) -> None:
        """Policy ``reestimated``: the model that is validated, and may be chosen, has the statistics it ends with."""
        self._reestimation.replace_(self)

    def on_validation_end(self) -> None:
        """Modes and weights come back from evaluation."""
        self._trainability.due = True

    def configure_model(self) -> None:
        """Cut the parameters over the processes where the strategy is FSDP2's; nothing else."""
        shard_(self)

    def on_train_epoch_end(self) -> None:
        """Policy ``reestimated``: every epoch may be the last, and none knows whether another callback ends the fit."""
        self._reestimation.replace_(self)

    def named_groups(self) -> list[dict[str, Any]]:
        """Every parameter of backbone, heads and terms in a named group, with its learning rate and decay."""
        defaults = self._make_optimizer([nn.Parameter(torch.zeros(1))]).defaults
        return parameter_groups(
            self.backbone.stages,
            self.heads,
            self.attachments.terms,
            lr=defaults["lr"],
            weight_decay=defaults.get("weight_decay", 0.0),
            head_multiplier=self._head_multiplier,
            layer_decay=self._layer_decay,
        )

    def configure_optimizers(self) -> Any:
        """Every parameter in a named group from the first step; the schedule steps once per optimizer step."""
        groups = self.named_groups()
        optimizer = self._make_optimizer(groups)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler and getattr(optimizer, "_step_supports_amp_scaling", False):
            # A fused step would unscale fp16 gradients by itself, after penalties and clipping have seen them scaled.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
            for group in (optimizer.defaults, *optimizer.param_groups):
                group["fused"] = None
        total = self._total_steps = finite_steps(self.trainer.estimated_stepping_batches)
        if type(self.schedule) is Constant and not self.schedule.warmup:
            return optimizer
        factor = lru_cache(1)(lambda step: self.schedule(step, total))  # once a step, not once a group
        scheduler = {"scheduler": LambdaLR(optimizer, lambda step: factor(step)), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Backbone and heads only: test, predict and a later leg need no method."""
        state = super().state_dict(*args, **kwargs)
        for key in [k for k in state if k.startswith(kwargs.get("prefix", "") + "attachments.")]:
            del state[key]
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load backbone and heads (a sharded task takes whole tensors, too); fit alone restores attached terms."""
        own = {f"attachments.{k}": v for k, v in self.attachments.state_dict().items()}
        return super().load_state_dict(sliced_state(self, {**own, **state_dict}), strict=strict, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the terms by method name, which heads something has trained, and the domains as plain values."""
        known = {} if self.known_heads is None else {"known_heads": sorted(self.trained_heads | self.known_heads)}
        checkpoint |= {"terms": self.attachments.save(), "schedule": self.schedule.state_dict(), **known}
        self._reestimation.save(checkpoint)
        checkpoint["domains"] = [
            {"name": d.name, "role": d.role, "kind": d.kind, "labels": list(d.labels)} for d in self.domains
        ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the attached terms; only when fitting."""
        if self.trainer.state.fn == "fit":
            self.attachments.load(checkpoint.get("terms", {}))
            self.schedule.load_state_dict(checkpoint.get("schedule", {}))
            self._reestimation.load(checkpoint)
