"""Keeping what the model knew: methods of this axis, one file each, and what they share."""

from crossft.callbacks.retention.ewc import EWC, OnlineEWC
from crossft.callbacks.retention.l2sp import L2SP
from crossft.callbacks.retention.mas import MAS
from crossft.callbacks.retention.si import SI

__all__ = ["EWC", "L2SP", "MAS", "SI", "OnlineEWC"]
