"""Methods of this axis, one file each."""

from crossft.callbacks.retention.l2sp import L2SP

__all__ = ["L2SP"]
