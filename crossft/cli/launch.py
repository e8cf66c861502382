"""What the first process decides before any Trainer exists, and how the others learn of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from crossft.cli.slurm import environment
from crossft.errors import CrossftError, Interrupted, RunError

__all__ = ["Launch"]

_VARIABLE = "CROSSFT_LAUNCH"
_START = timedelta(minutes=15)
"""Patience with processes that start later, on slow nodes."""
_DECISION = timedelta(days=30)
"""Patience with the first process, which may wait for another run to fit the source."""


class Launch:
    """The processes of one command.

    Under torchrun or SLURM all of them start together: the first tells the others through the launcher's store. Where
    Lightning starts the others itself, it does so later and by the same command line: they inherit the decision in
    an environment variable.

    Attributes:
        rank: number of this process over all nodes.
    """

    def __init__(self) -> None:
        found = environment()
        self._environment = None if isinstance(found, LightningEnvironment) else found
        self._store: Any = None
        if self._environment is not None:
            self.rank, self.world = self._environment.global_rank(), self._environment.world_size()
        else:
            local, node = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("NODE_RANK", 0))
            self.world = int(os.environ.get("WORLD_SIZE", 1))
            self.rank = local if node == 0 else node * max(1, self.world) + local

    @property
    def first(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    def agree(self, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Decide in the first process, once, and return the decision in every one.

        Raises:
            RunError: in the others, where the first process could not decide.
        """
        if not self.first:
            decision = json.loads(self._receive())
            if decision.get("stopped"):
                raise RunError(f"the first process stopped: {decision['stopped']}")
            return dict(decision)
        try:
            decision = decide()
        except (CrossftError, Interrupted) as error:
            self._send(json.dumps({"stopped": str(error)}))
            raise
        self._send(json.dumps(decision))
        return decision

    def _send(self, text: str) -> None:
        os.environ[_VARIABLE] = text  # inherited by the processes that Lightning starts
        if self._environment is not None and self.world > 1:
            self._shared().set("crossft", text)

    def _receive(self) -> str:
        if self._environment is None:
            if _VARIABLE not in os.environ:
                raise RunError(
                    f"LOCAL_RANK={os.environ.get('LOCAL_RANK')} is set, but no first process has started this one; "
                    "start several processes with --trainer.devices, torchrun or SLURM"
                )
            return os.environ[_VARIABLE]
        return bytes(self._shared().get("crossft")).decode()

    def _shared(self) -> Any:
        if self._store is None:
            assert self._environment is not None
            agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            store = dist.TCPStore(  # type: ignore[attr-defined]
                self._environment.main_address,
                self._environment.main_port,
                self.world,
                is_master=self.first and not agent,
                timeout=_START,
                wait_for_workers=False,
                multi_tenant=True,
            )
            store.set_timeout(_DECISION)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = dist.PrefixStore(f"crossft-{attempt}", store)  # type: ignore[attr-defined]
        return self._store

    @staticmethod
    def wait() -> None:
        """Wait until every process of a running process group is here."""
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
