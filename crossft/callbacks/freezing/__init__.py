"""Methods of this axis, one file each."""

from crossft.callbacks.freezing.freeze import Freeze

__all__ = ["Freeze"]
