"""FSDP2 as a strategy of the trainer, with checkpoints like those of one process."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from crossft.errors import ConfigError
from crossft.tasks.sharding import sliced, whole

__all__ = ["FSDP2"]


class FSDP2(ModelParallelStrategy):
    """FSDP2 over all processes: each holds a slice of every parameter, its gradient and its optimizer state.

    Checkpoints are one file, written by the trainer's ``CheckpointIO`` and equal in form to those of DDP and of one
    process, so each can go on from the others' weights; a method's terms are in it. The first process puts it together
    on its CPU; every process reads it whole, and keeps its slices. (Lightning's own ``ModelParallelStrategy`` reads and
    writes past ``CheckpointIO``, knows no terms, and restores an optimizer only once it has state.)

    Args:
        process_group_backend: ``nccl`` or ``gloo``. Default: by the device.
        timeout: patience of a collective operation.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = timedelta(minutes=30)
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout
        )

    def setup_environment(self) -> None:
        """Lay all processes out as one data-parallel group."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """No: as with DDP, weights and callbacks are restored before the optimizer is built."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Yes: by ``load_optimizer_state_dict``."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole model in the first process; the others hold only what is not sliced."""
        assert self.lightning_module is not None
        return dict(whole(dict(self.lightning_module.state_dict())))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state in the first process, as ``optimizer.state_dict()`` would be in a single one.

        Raises:
            ConfigError: the optimizer keeps state that is not cut like the weights.
        """
        inner: Optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        for parameter, state in inner.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                    raise ConfigError(
                        f"model.optimizer={type(inner).__name__} keeps {name!r} in another shape than its weights, "
                        "which trainer.strategy=FSDP2 cannot put together; use AdamW or SGD, or trainer.strategy=ddp"
                    )
        return dict(whole(inner.state_dict()))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the whole checkpoint through the trainer's ``CheckpointIO``."""
        return dict(self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the model; the task keeps its slices."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    @torch.no_grad()
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' states, of which each process keeps the slices of its parameters."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [n for group in saved["param_groups"] for n in group["params"]]
            own = dict(zip(numbers, parameters, strict=True))
            state = {
                n: {k: sliced(v, own[n]) if isinstance(v, Tensor) else v for k, v in values.items()}
                for n, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})
        _optimizers_to_device(self.optimizers, self.root_device)
