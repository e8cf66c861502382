"""Freezing once, for the whole run: by depth, stage, name pattern or kind of parameter."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from crossft.callbacks.freezing.selection import Combine, ParameterKind, Selection, refuse_another
from crossft.callbacks.freezing.wrapping import refuse_fused
from crossft.errors import ConfigError
from crossft.tasks import Task

__all__ = ["Freeze"]


class Freeze(Callback):
    """Train only some parameters of the backbone; the head always trains.

    A frozen parameter has no gradient. A stage in which nothing trains also keeps its buffers, and stays in evaluation
    mode while training. The task checks that this is so, at the start of the fit, after a resume and each validation.

    Criteria add up (``combine: any``) or narrow each other down (``combine: all``): ``train_last: 2, kinds: [norm],
    combine: all`` trains the norms of the last two stages.

    Args:
        train_last: train the last k stages; 0 is a linear probe.
        train: names of the stages that train, or globs over them.
        match: globs over whole parameter names, or regular expressions after ``re:``, that train.
        kinds: ``norm`` and ``bias`` (``kinds: [bias]`` is BitFit, Ben Zaken et al. 2022).
        freeze: patterns as in ``match`` that stay frozen, whatever the others choose.
        combine: ``any`` or ``all`` of the given criteria.

    Raises:
        ConfigError: no criterion is given, one finds nothing (with the nearest names), or the strategy fuses
            parameters.
        StageError: a stage is not there.
        TrainingError: when the fit begins, where a second method has chosen what trains.
    """

    def __init__(
        self,
        train_last: int | None = None,
        train: list[str] | None = None,
        match: list[str] | None = None,
        kinds: list[ParameterKind] | None = None,
        freeze: list[str] | None = None,
        combine: Combine = "any",
    ) -> None:
        self.selection = Selection(train_last, train, match, kinds, freeze, combine)
        if not self.selection.chooses:
            raise ConfigError(
                "Freeze() without a criterion freezes nothing; give train_last, train, match, kinds or freeze"
            )
        self.name = "freeze"
        self._chosen: frozenset[str] = frozenset()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze before DDP wraps, so that the reducer sees exactly what trains."""
        if stage != "fit" or not isinstance(pl_module, Task):
            return
        refuse_fused(trainer, self.name)
        self._chosen = self.selection.apply(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a second method that has chosen anew; from here on the task checks what trains."""
        if isinstance(pl_module, Task):
            refuse_another(pl_module, self._chosen, self.name)

    @property
    def state_key(self) -> str:
        """Key of the callback's state."""
        return f"Freeze[{self.name}]"
