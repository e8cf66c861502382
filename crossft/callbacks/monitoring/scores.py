"""Scores of a target without its labels, as validation metrics that checkpoints and early stopping can follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from crossft.callbacks.monitoring.seen import Seen, SeenRows
from crossft.errors import ConfigError
from crossft.functional.classifier_terms import batch_nuclear_norm
from crossft.functional.selection import (
    deep_embedded_validation,
    importance_weighted_risk,
    importance_weights,
    information_maximization,
    mean_entropy,
    soft_neighborhood_density,
)
from crossft.metrics.probes import FOLDS, domain_probabilities, reverse_validation
from crossft.tasks import Task
from crossft.tasks.evaluation import display_names
from crossft.types import Domain, head_of

__all__ = ["SCORES", "Score", "Scores", "score_keys"]


@dataclass(frozen=True)
class Score:
    """One score.

    Attributes:
        compute: from the target's rows and the labeled rows of the sources (None where not needed) to the score.
        needs_source: whether it reads labeled validation rows of the source.
        classes: whether it reads class predictions, so that the target's labels must be exclusive classes.
    """

    compute: Callable[[Seen, Any], float]
    needs_source: bool = False
    classes: bool = True


def _of_logits(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Seen, Any], float]:
    return lambda target, source: float(function(torch.from_numpy(target.logits).double()))


def _risk(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Seen, Seen], float]:
    def compute(target: Seen, source: Seen) -> float:
        p, _ = domain_probabilities(source.features, target.features)
        weights = importance_weights(torch.from_numpy(p), len(source), len(target))
        known = source.labels >= 0
        errors = (source.predicted != source.labels) if known.all() else source.losses
        return float(function(torch.from_numpy(errors.astype("float64")), weights))

    return compute


def _reverse(target: Seen, source: Seen) -> float:
    return reverse_validation(target.features, target.predicted, source.features, source.labels)


SCORES: dict[str, Score] = {
    "entropy": Score(_of_logits(mean_entropy)),
    "infomax": Score(_of_logits(information_maximization)),
    "snd": Score(_of_logits(soft_neighborhood_density)),
    "bnm": Score(_of_logits(batch_nuclear_norm)),
    "dev": Score(_risk(deep_embedded_validation), needs_source=True, classes=False),
    "iwcv": Score(_risk(importance_weighted_risk), needs_source=True, classes=False),
    "reverse": Score(_reverse, needs_source=True),
}
"""By name in ``TARGET/val/NAME``. ``entropy``, ``dev`` and ``iwcv`` are better where lower, the others where higher."""


def _sources(domains: Sequence[Domain], rows: Sequence[Mapping[str, Any]], target: Domain) -> list[str]:
    """Names of the source domains that share the target's head and have enough labeled validation rows."""
    labeled = {row["domain"] for row in rows if row["val_labels"] >= FOLDS}
    keys = head_of(domains)
    own = keys[target.name]
    return [d.name for d in domains if d.role == "source" and keys[d.name] == own and d.name in labeled]


def score_keys(domains: Sequence[Domain], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The validation metrics that exist without a target's labels, by key ``TARGET/val/NAME``: the score's name.

    Of a target with 5 validation rows or more: scores of predictions where its labels are exclusive classes, scores
    that need the source where one shares its label space and has as many labeled validation rows.

    Args:
        domains: of the run.
        rows: what ``DomainData.describe`` says of them.
    """
    names, counts = display_names(domains), {row["domain"]: row["val"] for row in rows}
    found: dict[str, str] = {}
    for domain in domains:
        if domain.role != "target" or counts[domain.name] < FOLDS:
            continue
        for name, score in SCORES.items():
            fits = domain.kind == "multiclass" or not score.classes
            if fits and (not score.needs_source or _sources(domains, rows, domain)):
                found[f"{names[domain.name]}/val/{name}"] = name
    return found


class Scores(Callback):
    """Log scores of every target without its labels, ``TARGET/val/NAME``, at each validation.

    They come from the rows that validation runs over anyway, so there is no further forward pass. ``entropy``,
    ``infomax``, ``snd`` and ``bnm`` read the target's predictions; ``dev`` and ``iwcv`` fit 5 logistic regressions on
    features to weight the source's validation errors (0 or 1 where labels are classes, else the task loss); ``reverse``
    fits one. No label of a target is read: an unlabeled one has none in validation, and of a labeled one they are not
    used. Every process computes the same numbers from the rows of all.

    The command line adds this by itself where ``select``, early stopping or a schedule follows such a metric.

    Args:
        scores: names; default: all that the run's domains allow.
        limit: at most so many rows of each domain, the first by sample id (a random choice): SND compares all pairs.

    Raises:
        ConfigError: an unknown name, or one that the run's domains do not allow.
    """

    def __init__(self, scores: list[str] | None = None, limit: int = 4096) -> None:
        unknown = [s for s in scores or () if s not in SCORES]
        if unknown:
            raise ConfigError(f"scores: {unknown[0]!r} is unknown; allowed: {', '.join(SCORES)}")
        if limit < 10:
            raise ConfigError(f"limit={limit} must be at least 10: rows of each domain that scores are taken from")
        self.scores, self.limit = scores, limit
        self.name = "scores"
        self._rows = SeenRows()
        self._keys: dict[str, str] = {}

    @property
    def state_key(self) -> str:
        """Key of the callback's state."""
        return f"Scores[{self.name}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out which scores the run's domains allow."""
        if stage not in ("fit", "validate"):
            return
        if not isinstance(pl_module, Task):
            raise ConfigError(f"methods.{self.name} needs a crossft task, not a {type(pl_module).__name__}")
        allowed = score_keys(pl_module.domains, trainer.datamodule.describe())  # type: ignore[attr-defined]
        wanted = self.scores or list(SCORES)
        missing = [s for s in self.scores or () if s not in allowed.values()]
        if missing or not allowed:
            raise ConfigError(
                f"scores: {(missing or ['any score'])[0]!r} cannot be had here; allowed: "
                f"{', '.join(dict.fromkeys(allowed.values())) or 'none'}. All need a target with a validation split; "
                f"{', '.join(n for n, s in SCORES.items() if s.needs_source)} also a source of the same label space "
                "with labeled validation rows"
            )
        self._keys = {key: name for key, name in allowed.items() if name in wanted}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the rows of the last validation."""
        self._rows.clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what the step has computed."""
        task = cast(Task, pl_module)
        name = trainer.datamodule.eval_domains("val")[dataloader_idx]  # type: ignore[attr-defined]
        if self._keys and next(d.role for d in task.domains if d.name == name) != "eval":
            self._rows.add(name, outputs, task.head_keys[name])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and log the scores."""
        if not self._keys or trainer.sanity_checking:
            return
        found = self.compute(cast(Task, pl_module), trainer.datamodule)  # type: ignore[attr-defined]
        pl_module.log_dict(found, batch_size=1, sync_dist=trainer.world_size > 1)
        self._rows.clear()

    def compute(self, task: Task, data: Any) -> dict[str, torch.Tensor]:
        """The scores of the rows seen, by key; NaN where one is undefined."""
        names, found = task.evaluation.names, {}
        for domain in task.domains:
            mine = {k: n for k, n in self._keys.items() if k.startswith(f"{names[domain.name]}/val/")}
            target = self._rows.take(domain.name, self.limit) if mine else None
            if target is None:
                continue
            needed = any(SCORES[name].needs_source for name in mine.values())
            source = (
                _joined(self._rows, _sources(task.domains, data.describe(), domain), self.limit) if needed else None
            )
            for key, name in mine.items():
                missing = SCORES[name].needs_source and source is None
                value = float("nan") if missing else SCORES[name].compute(target, source)
                found[key] = torch.tensor(value, device=task.device, dtype=torch.float32)
        return found


def _joined(rows: SeenRows, names: Sequence[str], limit: int) -> Seen | None:
    parts = [seen.labeled() for name in names if (seen := rows.take(name, limit)) is not None]
    if not parts:
        return None
    columns = zip(*((p.features, p.logits, p.losses, p.labels) for p in parts))
    return Seen(*(np.concatenate(c) for c in columns))
