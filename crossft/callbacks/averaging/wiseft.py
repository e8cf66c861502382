"""WiSE-FT: between the starting model and the fine-tuned one (Wortsman et al. 2022)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from crossft.callbacks.averaging.base import PublishedWeights, trained_state
from crossft.errors import ConfigError
from crossft.functional.averaging import interpolate
from crossft.tasks import Task

__all__ = ["WiSEFT"]


class WiSEFT(PublishedWeights):
    """WiSE-FT (Wortsman et al. 2022, Robust fine-tuning of zero-shot models, eq. 2): publish a blend.

    The published weights are (1 - alpha) times those the leg starts from plus alpha times those that train. Heads are
    blended too where the starting model knew them; a head that starts untrained should not be (``heads: false``). To
    try other alphas no training is needed: :func:`crossft.functional.averaging.interpolate` on the checkpoints of the
    two legs. A checkpoint holds the starting weights as well.

    Args:
        alpha: 0 is the starting model, 1 the fine-tuned one (0.5: the paper's choice where nothing is known).
        heads: whether heads are blended; else they are the fine-tuned ones.

    Raises:
        ConfigError: ``alpha`` is not in [0, 1].
    """

    def __init__(self, alpha: float = 0.5, heads: bool = True) -> None:
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise ConfigError(f"alpha={alpha} must be in [0, 1]: 0 is the starting model, 1 the fine-tuned one")
        self.alpha, self.heads = alpha, heads
        self.start: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the starting weights."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            assert isinstance(pl_module, Task)
            self.start = {n: t.detach().clone() for n, t in self._own(pl_module).items()}

    def _own(self, task: Task) -> dict[str, Tensor]:
        return {n: t for n, t in trained_state(task).items() if self.heads or n.startswith("backbone.")}

    def published(self, task: Task) -> dict[str, Tensor] | None:
        """The blend."""
        now = self._own(task)
        return interpolate({n: self.start[n].to(t.device) for n, t in now.items()}, now, self.alpha)

    def state_dict(self) -> dict[str, Any]:
        """The starting weights."""
        return {"start": dict(self.start)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the starting weights of the checkpoint."""
        self.start = dict(state_dict["start"])
