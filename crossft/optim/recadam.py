"""RecAdam: Adam that begins by recalling the starting weights (Chen et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from crossft.errors import ConfigError

__all__ = ["RecAdam"]


class RecAdam(AdamW):
    """AdamW with a decoupled pull to the starting weights that gives way to the task over the steps.

    With lambda(t) = 1 / (1 + exp(-rate (t - middle))) and lr the group's learning rate, one step on a weight with a
    starting point is (Chen et al. 2020, Recall and Learn, eq. 8-9 and algorithm 1)

        w <- w - lr * lambda(t) * Adam(gradient) - lr * (1 - lambda(t)) * pull * (w - w0).

    At lambda = 1 it is Adam. t counts the steps in which the group had a gradient. Starting points are kept by
    parameter, not by order (the released code pairs them by ``zip``): a weight's is its value when it first gets a
    gradient, so what thaws late is anchored where it was frozen. They are part of the optimizer's state, so a resumed
    run has them. Groups of heads and loss terms (``head.*``, ``term.*``) have no starting point worth recalling and
    take plain AdamW, as in the released code.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: of Adam.
        eps: of Adam.
        weight_decay: decoupled decay; it is scaled by lambda with the rest of the step.
        rate: k of the annealing (0.05 to 1 in the paper, appendix; 0.5).
        middle: t0, the optimizer step at which both weigh the same (250 to 1000 in the paper, appendix).
        pull: gamma on the distance from the start (5000 in the paper, at lr 2e-5: a product of 0.1, which 300 has at
            this class's default lr).

    Raises:
        ConfigError: a setting out of range, or lr * pull of 1 or more, which would overshoot the start.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rate: float = 0.5,
        middle: float = 250.0,
        pull: float = 300.0,
    ) -> None:
        if rate <= 0.0 or middle < 0.0 or pull < 0.0:
            raise ConfigError(f"rate={rate} must be positive, middle={middle} and pull={pull} at least 0")
        if lr * pull >= 1.0:
            raise ConfigError(
                f"lr={lr} times pull={pull} is {lr * pull:.3g}: a step would go past the starting weights; "
                "keep the product below 1"
            )
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.rate, self.middle, self.pull = rate, middle, pull

    def share(self, step: int) -> float:
        """lambda(t): how much the task weighs at the t-th step, counted from 1."""
        return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, self.rate * (step - self.middle)))))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rates = [group["lr"] for group in self.param_groups]
        fresh: list[tuple[nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            if not str(group.get("name", "")).startswith(("head.", "term.")):
                fresh += self._recall(group)
        super().step()
        for parameter, start in fresh:  # after it: Adam begins a state only where there is none
            self.state[parameter]["start"] = start
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        return loss

    @torch.no_grad()
    def reset_moments(self) -> None:
        """Begin Adam's moments anew; starting points and annealing stay, as they belong to the run."""
        for state in self.state.values():
            for name, value in state.items():
                if name != "start":
                    value.zero_()

    def _recall(self, group: dict[str, Any]) -> list[tuple[nn.Parameter, Tensor]]:
        """Pull the group's weights to their start, set the rate of Adam's step; return the weights that start now."""
        moving: list[nn.Parameter] = [p for p in group["params"] if p.grad is not None]
        if not moving:
            return []
        group["recalled"] = int(group.get("recalled", 0)) + 1
        share = self.share(group["recalled"])
        known = [(p, self.state[p]["start"]) for p in moving if "start" in self.state[p]]
        for parameter, start in known:
            parameter.add_(parameter - start, alpha=-group["lr"] * (1.0 - share) * self.pull)
        group["lr"] = group["lr"] * share
        return [(p, p.detach().clone()) for p in moving if "start" not in self.state[p]]
