"""Health of an adaptation while it runs: gradients, distances of domains, collapse, negative transfer, pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch import distributed as dist

from crossft.callbacks.adaptation.features import layer_of
from crossft.callbacks.monitoring.feature_maps import Projection, draw_features
from crossft.callbacks.monitoring.inside import Inside, look_inside
from crossft.callbacks.monitoring.reference import reference_scores
from crossft.callbacks.monitoring.scores import SCORES, score_keys
from crossft.errors import ConfigError
from crossft.functional.kernels import gaussian_kernel, mmd_unbiased
from crossft.metrics.probes import FOLDS, proxy_a_distance
from crossft.runs import RunFolder, higher_is_better
from crossft.tasks import Task

__all__ = ["VOTES", "Health", "gradient_norms"]

VOTES = ("infomax", "snd", "dev", "reverse")
"""The label-free scores by which a run is compared with its reference."""


class Health(Callback):
    """Watch an adaptation while it runs; no target label is read, and no weight is changed.

    Logged at each validation, from at most ``rows`` validation rows of each domain (one more forward pass over these):

    - ``health/a_distance/STAGE``, ``health/mmd/STAGE``: proxy A-distance (0 to 2) and unbiased squared MMD of sources
      and targets, on pooled features of each stage.
    - ``health/TARGET/marginal_entropy``: entropy of the mean prediction over log k, 1 where all classes are predicted
      alike; ``health/TARGET/largest_class``: the share of the class predicted most. A warning where the entropy is
      below half of the source's: the predictions have collapsed.
    - ``health/TARGET/SCORE`` for infomax, snd, dev and reverse, and ``health/TARGET/negative_transfer``: the share of
      them that is worse than at the end of the reference run. Above one half there is a warning. It is a vote of scores
      that are often wrong themselves, so it says where to look, not what is true.

    Every ``every_n_steps`` optimizer steps: ``health/gradient/NAME``, the norm of each loss term's weighted gradient on
    the backbone over that of the task loss. That is one more backward pass for the task and for each term in such a
    step, on its first micro-batch; weight penalties are not among them. Discriminators log accuracy against chance and
    loss over log k by themselves: ``term/NAME/above_chance``, ``term/NAME/loss_share``.

    Before and after training a picture of the features, by domain and by class (of the source as labeled, of the target
    as predicted), goes to ``figures/`` of the run folder and to W&B.

    Args:
        every_n_steps: a multiple of ``trainer.log_every_n_steps``; default 5 times that. 0: no gradient norms.
        stages: ``features`` and stages of the backbone. Default: the features, and three stages spread over its depth.
        rows: most validation rows of a domain.
        maps: projections of the pictures, ``pca`` and ``tsne``; an empty list draws none.
        reference: arm of the source-only run that negative transfer is judged by: a finished run beside this one with
            the same seed and domains, and this callback.

    Raises:
        ConfigError: an argument out of range, no source or target with validation rows, or a regression.
        StageError: an unknown stage.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        stages: list[str] | None = None,
        rows: int = 256,
        maps: list[Projection] | None = None,
        reference: str = "source-only",
    ) -> None:
        if rows < 2 * FOLDS:
            raise ConfigError(f"rows={rows} must be at least {2 * FOLDS}: validation rows of each domain")
        if every_n_steps is not None and every_n_steps < 0:
            raise ConfigError(f"every_n_steps={every_n_steps} must be at least 0; 0 measures no gradient norms")
        self.every_n_steps, self.stages, self.rows = every_n_steps, stages, rows
        self.maps: list[Projection] = list(get_args(Projection)) if maps is None else maps
        self.reference, self.name = reference, "health"
        self._every = 0
        self._layers: list[Any] = []
        self._votes: dict[str, str] = {}
        self._before: dict[str, float] = {}
        self._warned: set[str] = set()
        self._last: dict[str, Inside] = {}

    @property
    def state_key(self) -> str:
        """Key of the callback's state."""
        return f"Health[{self.name}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the stages and the scores, and check that there is something to compare."""
        if stage != "fit":
            return
        if not isinstance(pl_module, Task):
            raise ConfigError(f"methods.{self.name} needs a crossft task, not a {type(pl_module).__name__}")
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        counts = {row["domain"]: row["val"] for row in data.describe()}
        roles = {d.role for d in pl_module.domains if counts[d.name] >= FOLDS}
        if not roles >= {"source", "target"} or any(d.kind != "multiclass" for d in pl_module.domains):
            raise ConfigError(
                f"methods.{self.name} compares sources and targets that have class labels and {FOLDS} validation rows "
                "or more; set data.source and data.target, or raise the validation share in data.splits"
            )
        logged: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._every = 5 * logged if self.every_n_steps is None else self.every_n_steps
        if logged and self._every % logged:
            raise ConfigError(
                f"methods.{self.name}.every_n_steps={self._every} must be a multiple of trainer.log_every_n_steps="
                f"{logged}: other steps are not logged"
            )
        self._layers = [layer_of(pl_module, name, allowed=("features",)) for name in self._stages(pl_module)]
        allowed = score_keys(pl_module, data)
        self._votes = {key: name for key, name in allowed.items() if name in VOTES}
        self._before = reference_scores(Path(trainer.default_root_dir), self.reference)
        self._warned, self._last = set(), {}

    def _stages(self, task: Task) -> Sequence[str]:
        if self.stages is not None:
            return self.stages
        names = [s.name for s in task.backbone.stages]
        spread = np.linspace(0, len(names) - 1, 5).round().astype(int)[1:-1]
        return [*dict.fromkeys(names[i] for i in spread), "features"]

    # -- gradients -----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask the step for its parts, where it is due."""
        assert isinstance(pl_module, Task)
        first = batch_idx % trainer.accumulate_grad_batches == 0
        due = self._every and (trainer.global_step + 1) % self._every == 0
        if first and due and pl_module.attachments.named_terms():
            pl_module.attachments.watched = {}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Measure the gradient of each part."""
        assert isinstance(pl_module, Task)
        parts, pl_module.attachments.watched = pl_module.attachments.watched, None
        if not parts:
            return
        norms = gradient_norms(parts, [p for p in pl_module.backbone.parameters() if p.requires_grad])
        task = norms.pop("task").clamp(min=1e-12)
        found = {f"health/gradient/{name}": norm / task for name, norm in norms.items()}
        pl_module.log_dict(found, batch_size=1, sync_dist=trainer.world_size > 1)

    # -- validation ------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the features that training starts from."""
        assert isinstance(pl_module, Task)
        if self.maps and not trainer.fit_loop.restarting:
            self._draw(trainer, pl_module, self._look(trainer, pl_module), "before training", "features-start.png")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log; warn once of each thing that went wrong."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        assert isinstance(pl_module, Task)
        self._last = self._look(trainer, pl_module)
        found = {**self._distances(), **self._collapse(pl_module), **self._compared(pl_module)}
        logs = {k: torch.tensor(v, dtype=torch.float32, device=pl_module.device) for k, v in found.items()}
        pl_module.log_dict(logs, batch_size=1, sync_dist=trainer.world_size > 1)

    def _look(self, trainer: Trainer, task: Task) -> dict[str, Inside]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with trainer.precision_plugin.val_step_context():
            return look_inside(task, data, self._layers, self.rows)

    def _of(self, role: str) -> list[Inside]:
        return [inside for inside in self._last.values() if inside.domain.role == role]

    def _distances(self) -> dict[str, float]:
        """Proxy A-distance and MMD of all sources and all targets, by stage."""
        found: dict[str, float] = {}
        for layer in self._layers:
            x, y = (np.concatenate([i.layers[layer.name] for i in self._of(role)]) for role in ("source", "target"))
            found[f"health/a_distance/{layer.name}"] = proxy_a_distance(x, y)
            kernel = gaussian_kernel(torch.from_numpy(np.concatenate([x, y])).double())
            found[f"health/mmd/{layer.name}"] = float(mmd_unbiased(kernel, len(x)))
        return found

    def _collapse(self, task: Task) -> dict[str, float]:
        """Marginals of the predicted classes of each target."""
        found: dict[str, float] = {}
        usual = min(inside.marginal_entropy for inside in self._of("source"))
        for inside in self._of("target"):
            prefix = f"health/{task.evaluation.names[inside.domain.name]}"
            found[f"{prefix}/marginal_entropy"] = inside.marginal_entropy
            found[f"{prefix}/largest_class"] = inside.largest_class
            if inside.marginal_entropy < 0.5 * usual:
                self._warn(
                    f"collapse of {inside.domain.name}",
                    f"{inside.largest_class:.0%} of {inside.domain.name!r} is predicted as one class, the source is "
                    "not: lower the weight of the adaptation term, or lengthen its schedule",
                )
        return found

    def _compared(self, task: Task) -> dict[str, float]:
        """Label-free scores of each target, and the share of them that is worse than the reference's."""
        found: dict[str, float] = {}
        for inside in self._of("target"):
            name = task.evaluation.names[inside.domain.name]
            mine = {score for key, score in self._votes.items() if key.startswith(f"{name}/val/")}
            own = [s for s in self._of("source") if task.head_keys[s.domain.name] == task.head_keys[inside.domain.name]]
            source = Inside.labeled_rows(own)
            for score in sorted(mine):
                if source is not None or not SCORES[score].needs_source:
                    found[f"health/{name}/{score}"] = SCORES[score].compute(inside.seen, source)
            worse = [
                (value < self._before[key]) == higher_is_better(key)
                for key, value in found.items()
                if key.startswith(f"health/{name}/") and key in self._before and value != self._before[key]
            ]
            if worse:
                found[f"health/{name}/negative_transfer"] = float(np.mean(worse))
        return found

    def _warn(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            rank_zero_warn(f"methods.{self.name}: {text}")

    # -- the end -------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say whether adapting did harm, as far as scores without labels can tell, and draw the last features."""
        assert isinstance(pl_module, Task)
        for key, share in trainer.callback_metrics.items():
            if key.endswith("/negative_transfer") and float(share) > 0.5:
                self._warn(
                    key,
                    f"{float(share):.0%} of the label-free scores are worse than those of the {self.reference!r} run "
                    f"({key}): adapting may do harm here",
                )
        if not self._before:
            rank_zero_info(
                f"methods.{self.name}: no finished {self.reference!r} run with this callback lies beside this one, so "
                "negative transfer was not judged"
            )
        if self.maps and self._last:
            self._draw(trainer, pl_module, self._last, "after training", "features-end.png")

    def _draw(self, trainer: Trainer, task: Task, seen: dict[str, Inside], when: str, file: str) -> None:
        if not trainer.is_global_zero:
            return
        features = np.concatenate([i.seen.features for i in seen.values()])
        domains = [f"{i.domain.name} ({i.domain.role})" for i in seen.values() for _ in range(len(i.seen))]
        classes = [name for i in seen.values() for name in i.class_names()]
        folder = RunFolder(trainer.default_root_dir).figures
        title = f"features {when}; classes: source as labeled, target as predicted"
        path = draw_features(folder / file, features, domains, classes, self.maps, title)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(f"health/{file.removesuffix('.png')}", images=[str(path)])


def gradient_norms(parts: dict[str, Tensor], parameters: Sequence[torch.nn.Parameter]) -> dict[str, Tensor]:
    """Norm of each part's gradient on ``parameters``, averaged over processes first; the graph is kept.

    Args:
        parts: scalars by name.
        parameters: what the gradients are taken on; their ``.grad`` is not touched.
    """
    norms: dict[str, Tensor] = {}
    for name, value in parts.items():
        norms[name] = value.detach().new_zeros(())
        if not value.requires_grad or not parameters:
            continue
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        flat = torch.cat([g.detach().float().flatten() for g in grads])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        norms[name] = flat.norm() if math.isfinite(float(value.detach())) else norms[name] + math.nan
    return norms
