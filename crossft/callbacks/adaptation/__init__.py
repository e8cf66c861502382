"""Methods of this axis, one file each."""

from crossft.callbacks.adaptation.afn import AFN
from crossft.callbacks.adaptation.bnm import BNM
from crossft.callbacks.adaptation.bsp import BSP
from crossft.callbacks.adaptation.cdan import CDAN
from crossft.callbacks.adaptation.cmd import CMD
from crossft.callbacks.adaptation.coral import CORAL
from crossft.callbacks.adaptation.dann import DANN
from crossft.callbacks.adaptation.domain_mixup import DomainMixup
from crossft.callbacks.adaptation.entropy import EntropyMinimization
from crossft.callbacks.adaptation.fishr import Fishr
from crossft.callbacks.adaptation.group_dro import GroupDRO
from crossft.callbacks.adaptation.irm import IRM
from crossft.callbacks.adaptation.jan import JAN
from crossft.callbacks.adaptation.mcc import MCC
from crossft.callbacks.adaptation.mcd import MCD
from crossft.callbacks.adaptation.mdd import MDD
from crossft.callbacks.adaptation.mean_teacher import MeanTeacher
from crossft.callbacks.adaptation.mixup import InterDomainMixup
from crossft.callbacks.adaptation.mmd import MMD
from crossft.callbacks.adaptation.pseudo_labels import PseudoLabels
from crossft.callbacks.adaptation.swad import SWAD
from crossft.callbacks.adaptation.tent import Tent
from crossft.callbacks.adaptation.vrex import VREx

__all__ = [
    "AFN",
    "BNM",
    "BSP",
    "CDAN",
    "CMD",
    "CORAL",
    "DANN",
    "IRM",
    "JAN",
    "MCC",
    "MCD",
    "MDD",
    "MMD",
    "SWAD",
    "DomainMixup",
    "EntropyMinimization",
    "Fishr",
    "GroupDRO",
    "InterDomainMixup",
    "MeanTeacher",
    "PseudoLabels",
    "Tent",
    "VREx",
]
