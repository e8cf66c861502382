"""Parameter groups and learning-rate schedules."""

from crossft.optim.groups import parameter_groups
from crossft.optim.phased import Phased, Rates, reset_moments_, set_rates_
from crossft.optim.plateau import Plateau
from crossft.optim.recadam import RecAdam
from crossft.optim.schedules import (
    Constant,
    Cosine,
    InverseSqrt,
    Linear,
    OneCycle,
    Schedule,
    SlantedTriangular,
    WarmedUp,
    finite_steps,
)

__all__ = [
    "Constant",
    "Cosine",
    "InverseSqrt",
    "Linear",
    "OneCycle",
    "Phased",
    "Plateau",
    "Rates",
    "RecAdam",
    "Schedule",
    "SlantedTriangular",
    "WarmedUp",
    "finite_steps",
    "parameter_groups",
    "reset_moments_",
    "set_rates_",
]
