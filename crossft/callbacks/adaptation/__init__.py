"""Methods of this axis, one file each."""

from crossft.callbacks.adaptation.dann import DANN

__all__ = ["DANN"]
