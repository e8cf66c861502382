"""Methods of this axis, one file each."""

from crossft.callbacks.freezing.domain_gap import DomainGap
from crossft.callbacks.freezing.freeze import Freeze
from crossft.callbacks.freezing.gradual import GradualUnfreezing
from crossft.callbacks.freezing.phases import Phase
from crossft.callbacks.freezing.sentinel import RankSentinel

__all__ = ["DomainGap", "Freeze", "GradualUnfreezing", "Phase", "RankSentinel"]
