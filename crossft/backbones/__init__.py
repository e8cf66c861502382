"""Backbones: pretrained networks with ordered stages. timm and transformers are imported when one is built."""

from crossft.backbones.adapted import Adapted
from crossft.backbones.base import Backbone
from crossft.backbones.batchnorm import (
    BatchNormPolicy,
    DomainBatchNorm,
    apply_batchnorm_policy,
    batch_norms,
    freeze_statistics_,
    reestimate_,
    set_domains,
)
from crossft.backbones.timm import Timm
from crossft.backbones.transformer import Transformer

__all__ = [
    "Adapted",
    "Backbone",
    "BatchNormPolicy",
    "DomainBatchNorm",
    "Timm",
    "Transformer",
    "apply_batchnorm_policy",
    "batch_norms",
    "freeze_statistics_",
    "reestimate_",
    "set_domains",
]
