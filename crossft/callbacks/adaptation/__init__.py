"""Methods of this axis, one file each."""

from crossft.callbacks.adaptation.cdan import CDAN
from crossft.callbacks.adaptation.cmd import CMD
from crossft.callbacks.adaptation.coral import CORAL
from crossft.callbacks.adaptation.dann import DANN
from crossft.callbacks.adaptation.jan import JAN
from crossft.callbacks.adaptation.mmd import MMD

__all__ = ["CDAN", "CMD", "CORAL", "DANN", "JAN", "MMD"]
