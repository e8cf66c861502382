"""Averages and blends of weights, published in place of those that train: methods of this axis, one file each."""

from crossft.callbacks.averaging.ema import EMA
from crossft.callbacks.averaging.swa import SWA
from crossft.callbacks.averaging.wiseft import WiSEFT

__all__ = ["EMA", "SWA", "WiSEFT"]
