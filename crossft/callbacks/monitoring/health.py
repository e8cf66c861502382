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
from crossft.callbacks.sharding import refuse_sharded
from crossft.errors import ConfigError
from crossft.functional.kernels import gaussian_kernel, mmd_unbiased
from crossft.metrics.probes import FOLDS, proxy_a_distance
from crossft.runs import RunFolder, higher_is_better
from crossft.tasks import Task

__all__ = ["VOTES", "Health", "gradient_norms"]

VOTES = ("infomax", "snd", "reverse")
"""The label-free scores by which a run is compared with its reference. Not dev and iwcv: where a classifier tells the
domains apart, their weights vanish, and the risk with them."""


class Health(Callback):
    """Watch an adaptation while it runs; no target label is read, and no weight is changed.

    Logged at each validation, from at most ``rows`` validation rows of each domain (one more forward pass over these):

    - ``health/a_distance/STAGE``, ``health/mmd/STAGE``: proxy A-distance (0 to 2) and unbiased squared MMD of sources
      and targets, on pooled features of each stage.
    - ``health/TARGET/marginal_entropy``: entropy of the shares of the predicted classes over log k, 1 where all are
      predicted alike; ``health/TARGET/largest_class``: the share of the class predicted most. A warning where the
      entropy is below half of the source's: the predictions have collapsed. ``health/TARGET/spread``: how far features
      lie from their mean, over the same for the source; near 0 where the target has become one point.
    - ``health/TARGET/SCORE`` for infomax, snd and reverse, and ``health/TARGET/negative_transfer``: the share of them
      that is worse than at the end of the reference run. A warning at the end says which. These scores are often wrong
      (SND takes predictions that are all alike for dense), so it says where to look, not what is true.

    At every ``every_n_steps``-th optimizer step: ``health/gradient/NAME``, the norm of each loss term's weighted
    gradient on the backbone over that of the task loss. That is one more backward pass for the task and for each term
    in such a step, on its first micro-batch; weight penalties are not among them. Discriminators log accuracy against
    chance and loss over log k by themselves: ``term/NAME/above_chance``, ``term/NAME/loss_share``.

    Before and after training a picture of the features, by domain and by class (of the source as labeled, of the target
    as predicted), goes to ``figures/`` of the run folder and to W&B.

    Args:
        every_n_steps: steps from one measurement of gradients to the next; 0: none.
        stages: ``features`` and stages of the backbone. Default: the features, and three stages spread over its depth.
        rows: most validation rows of a domain.
        maps: projections of the pictures, ``pca`` and ``tsne``; an empty list draws none.
        reference: arm of the source-only run that negative transfer is judged by: a finished run beside this one with
            the same seed and domains, and this callback.

    Raises:
        ConfigError: an argument out of range, no source or target with validation rows, a regression, or
            ``every_n_steps`` under a strategy that shards weights.
        StageError: an unknown stage.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        stages: list[str] | None = None,
        rows: int = 256,
        maps: list[Projection] | None = None,
        reference: str = "source-only",
    ) -> None:
        if rows < 2 * FOLDS:
            raise ConfigError(f"rows={rows} must be at least {2 * FOLDS}: validation rows of each domain")
        if every_n_steps < 0:
            raise ConfigError(f"every_n_steps={every_n_steps} must be at least 0; 0 measures no gradient norms")
        self.every_n_steps, self.stages, self.rows = every_n_steps, stages, rows
        self.maps: list[Projection] = list(get_args(Projection)) if maps is None else maps
        self.reference, self.name = reference, "health"
        self.gradients: dict[str, float] = {}
        self._layers: list[Any] = []
        self._votes: dict[str, str] = {}
        self._before: dict[str, float] = {}
        self._warned: set[str] = set()
        self._verdicts: dict[str, str] = {}
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
        if self.every_n_steps:
            reason = "takes gradients of each term on whole weights"
            refuse_sharded(trainer, self.name, reason, f"set methods.{self.name}.every_n_steps=0")
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        counts = {row["domain"]: row["val"] for row in data.describe()}
        roles = {d.role for d in pl_module.domains if counts[d.name] >= FOLDS}
        if not roles >= {"source", "target"} or any(d.kind != "multiclass" for d in pl_module.domains):
            raise ConfigError(
                f"methods.{self.name} compares sources and targets that have class labels and {FOLDS} validation rows "
                "or more; set data.source and data.target, or raise the validation share in data.splits"
            )
        self._layers = [layer_of(pl_module, name, allowed=("features",)) for name in self._stages(pl_module)]
        allowed = score_keys(pl_module.domains, data.describe())
        self._votes = {key: name for key, name in allowed.items() if name in VOTES}
        self._before = reference_scores(Path(trainer.default_root_dir), self.reference)
        self._warned, self._last, self.gradients = set(), {}, {}

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
        due = self.every_n_steps and (trainer.global_step + 1) % self.every_n_steps == 0
        if first and due and pl_module.attachments.named_terms:
            pl_module.attachments.watched = {}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Measure the gradient of each part, and log it for this step alone: by itself, Lightning would repeat it."""
        assert isinstance(pl_module, Task)
        parts, pl_module.attachments.watched = pl_module.attachments.watched, None
        if not parts:
            return
        norms = gradient_norms(parts, [p for p in pl_module.backbone.parameters() if p.requires_grad])
        task = norms.pop("task").clamp(min=1e-12)
        self.gradients = {f"health/gradient/{name}": float(norm / task) for name, norm in norms.items()}
        for logger in trainer.loggers:
            logger.log_metrics(self.gradients, step=trainer.global_step)

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
            found[f"{prefix}/spread"] = inside.spread / max(1e-12, max(i.spread for i in self._of("source")))
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
            if known := [score for score in sorted(mine) if f"health/{name}/{score}" in self._before]:
                worse = [score for score in known if self._worse(f"health/{name}/{score}", found)]
                found[f"health/{name}/negative_transfer"] = len(worse) / len(known)
                self._verdicts[name] = self._verdict(name, found, worse, known)
        return found

    def _worse(self, key: str, found: dict[str, float]) -> bool:
        value, before = found[key], self._before[key]
        return value < before if higher_is_better(key) else value > before

    def _verdict(self, name: str, found: dict[str, float], worse: Sequence[str], known: Sequence[str]) -> str:
        """What to warn of at the end, or nothing."""
        if not worse:
            return ""
        keys = {score: f"health/{name}/{score}" for score in worse}
        texts = [f"{score} {found[key]:.3f} (was {self._before[key]:.3f})" for score, key in keys.items()]
        others = ", ".join(score for score in known if score not in worse) or "none"
        return (
            f"without {name} labels, this run looks worse than {self.reference!r} by {', '.join(texts)}; not by: "
            f"{others}. Adapting may do harm here"
        )

    def _warn(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            rank_zero_warn(f"methods.{self.name}: {text}")

    # -- the end -------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say whether adapting did harm, as far as scores without labels can tell, and draw the last features."""
        assert isinstance(pl_module, Task)
        for name, text in self._verdicts.items():
            if text:
                self._warn(f"negative transfer to {name}", text)
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
