"""A wish to stop, as schedulers and users send it: by signal."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from crossft.errors import Interrupted

__all__ = ["Stopping"]

_REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)


class Stopping(Callback):
    """Takes SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 from Lightning, which communicates and saves inside its handlers.

    While a fit trains, the handler sets a flag, nothing else: `Checkpoints` asks for it at every optimizer step, and
    all processes save and stop there together. At other times nothing is lost by stopping, so `Interrupted` is raised
    where the process stands. SIGUSR1 and SIGUSR2, which schedulers send ahead of a time limit, ask to be queued again
    as well. A second SIGINT while training raises KeyboardInterrupt.

    Use it as a context around everything a run does, and as a callback of the trainers in it that measure.

    Attributes:
        received: the first signal that came, or None.
        requeue: whether a signal asked to be queued again.
        training: whether a fit trains, so that stopping waits for the next optimizer step.
    """

    acts_at_test = True

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.requeue = self.training = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        """Take the signals; threads other than the main one cannot, and leave them as they are."""
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.getsignal(number) for number in _SIGNALS}
        self.take()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Put the former handlers back."""
        self.training = False
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def take(self, training: bool = False) -> None:
        """Take the signals (again, after Lightning has)."""
        self.training = training
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._handle)

    def check(self) -> None:
        """Stop now if a signal came while training that no optimizer step has seen.

        Raises:
            Interrupted: one came.
        """
        self.training = False
        if self.received is not None:
            raise Interrupted(f"stopped by {self.received.name}", requeue=self.requeue)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        repeated, self.received = self.received, self.received or signal.Signals(signum)
        self.requeue |= signum in _REQUEUE
        if not self.training:
            raise Interrupted(f"stopped by {signal.Signals(signum).name}", requeue=self.requeue)
        if signum == signal.SIGINT:
            if repeated is not None:
                raise KeyboardInterrupt
            os.write(2, b"\nsaving at the next optimizer step, then stopping; Ctrl-C again stops at once\n")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals from Lightning, where validation is all that runs."""
        if not self.training:
            self.take()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals from Lightning."""
        self.take()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the processes that Lightning has started too, where this one does not wait for them."""
        launcher = trainer.strategy.launcher
        if isinstance(exception, Interrupted) and not self.training and isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGTERM)


_SIGNALS = (signal.SIGTERM, signal.SIGINT, *_REQUEUE)
