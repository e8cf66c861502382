"""Evaluation mode for a while, every module's own mode put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put ``module`` and all its children in evaluation mode; put each one's own mode back at the end.

    ``module.train()`` would set all of them to one mode, and so undo what is frozen.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluating(net):
        ...     print(net.training, net[0].training)
        False False
        >>> net.training, net[0].training, net[1].training
        (True, True, False)
    """
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
