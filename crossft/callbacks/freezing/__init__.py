"""Methods of this axis, one file each."""

from crossft.callbacks.freezing.freeze import Freeze
from crossft.callbacks.freezing.sentinel import RankSentinel

__all__ = ["Freeze", "RankSentinel"]
