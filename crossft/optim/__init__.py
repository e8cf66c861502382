"""Parameter groups and learning-rate schedules."""

from crossft.optim.groups import parameter_groups
from crossft.optim.schedules import Constant, Cosine, Linear, Schedule

__all__ = ["Constant", "Cosine", "Linear", "Schedule", "parameter_groups"]
