"""Keeping what the model knew: methods of this axis, one file each, and what they share."""

from crossft.callbacks.retention.agem import AGEM
from crossft.callbacks.retention.bss import BSS
from crossft.callbacks.retention.cotuning import CoTuning
from crossft.callbacks.retention.delta import DELTA
from crossft.callbacks.retention.derpp import DERPlusPlus
from crossft.callbacks.retention.drift import DriftLimit
from crossft.callbacks.retention.ewc import EWC, OnlineEWC
from crossft.callbacks.retention.features import FeatureDistillation
from crossft.callbacks.retention.l2sp import L2SP
from crossft.callbacks.retention.lwf import LwF
from crossft.callbacks.retention.mas import MAS
from crossft.callbacks.retention.mixout import Mixout
from crossft.callbacks.retention.r3f import R3F
from crossft.callbacks.retention.replay import Replay
from crossft.callbacks.retention.si import SI
from crossft.callbacks.retention.smart import SMART
from crossft.callbacks.retention.stochnorm import StochNorm

__all__ = [
    "AGEM",
    "BSS",
    "DELTA",
    "EWC",
    "L2SP",
    "MAS",
    "R3F",
    "SI",
    "SMART",
    "CoTuning",
    "DERPlusPlus",
    "DriftLimit",
    "FeatureDistillation",
    "LwF",
    "Mixout",
    "OnlineEWC",
    "Replay",
    "StochNorm",
]
