"""A command inside a SLURM job: its processes, and whether it was started again."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from crossft.errors import ConfigError

__all__ = ["environment", "refuse_strays", "restarted"]


def environment() -> ClusterEnvironment | None:
    """What started this process, where that was torchrun or SLURM.

    SLURM's comes without Lightning's requeue, which saves inside the signal handler. In an allocation of one task that
    srun was not used in, the process is one like any other, though Lightning takes it for srun's.

    Raises:
        ConfigError: a SLURM job of several tasks whose command was not started by srun, or one that names its tasks in
            a way Lightning cannot use.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if not SLURMEnvironment.detect():
        return None
    tasks, srun = int(os.environ["SLURM_NTASKS"]), "SLURM_STEP_ID" in os.environ
    if tasks == 1 and not srun:
        return LightningEnvironment()
    if not srun:
        raise ConfigError(
            f"SLURM_NTASKS={tasks}, but srun has not started this process; put srun in front of the command (in an "
            "interactive allocation without srun: export SLURM_JOB_NAME=interactive)"
        )
    try:
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:
        raise ConfigError(f"SLURM_NTASKS={tasks}: {error}") from error


def refuse_strays(folder: str | Path | None) -> None:
    """Refuse a ``trainer.default_root_dir`` with checkpoints that Lightning would load unasked inside a SLURM job.

    Raises:
        ConfigError: another program's requeue left ``hpc_ckpt_*`` there.
    """
    strays = sorted(Path(folder or ".").glob("hpc_ckpt_*")) if SLURMEnvironment.detect() else []
    if strays:
        raise ConfigError(
            f"trainer.default_root_dir: {strays[0]} is another program's checkpoint, and Lightning would load it "
            "inside a SLURM job; move it away, or set trainer.default_root_dir to another folder"
        )


def restarted() -> bool:
    """Whether SLURM or torchrun has started the same command before."""
    counts = (os.environ.get(name) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any((count or "0") != "0" for count in counts)
