"""Enough precision for sums of exponentials, squares and kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

__all__ = ["full_precision", "upcast"]


def upcast(x: Tensor) -> Tensor:
    """``x`` in float32 where it is float16 or bfloat16, else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast on the device of ``x``: differences of sums do not survive bfloat16 products."""
    return torch.autocast(x.device.type, enabled=False)
