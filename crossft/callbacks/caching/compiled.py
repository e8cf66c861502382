"""torch.compile for the backbone, so that it goes with every method and phase."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from crossft.errors import ConfigError
from crossft.tasks import Task

__all__ = ["Compile"]


class Compile(Callback):
    """Compile the backbone's forward in place (``torch.nn.Module.compile``).

    Weights, names and checkpoints stay those of the plain model. A phase change compiles again, as ``requires_grad`` is
    a guard of the graph. What runs a backbone from a later stage on (the prefix cache) is not compiled.

    Args:
        backend: of ``torch.compile`` (``inductor`` needs a C++ compiler; ``aot_eager`` needs none, and gains nothing).
        mode: of ``torch.compile``.
        dynamic: whether one graph serves all sizes; None lets torch find out.

    Raises:
        ConfigError: the backend is not there.
    """

    def __init__(self, backend: str = "inductor", mode: str | None = None, dynamic: bool | None = None) -> None:
        self.backend, self.mode, self.dynamic = backend, mode, dynamic
        self.name = "compile"

    @property
    def state_key(self) -> str:
        """Key of the callback's state."""
        return f"Compile[{self.name}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compile before DDP wraps."""
        known = torch.compiler.list_backends(exclude_tags=())
        if self.backend not in known:
            raise ConfigError(f"backend={self.backend!r} is unknown to torch.compile; allowed: {', '.join(known)}")
        if stage == "fit" and isinstance(pl_module, Task):
            pl_module.backbone.compile(backend=self.backend, mode=self.mode, dynamic=self.dynamic)
