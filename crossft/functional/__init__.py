"""Pure tensor math, no Lightning: each function with its paper and equation."""

from crossft.functional.classifier_terms import (
    batch_nuclear_norm,
    classifier_discrepancy,
    entropy,
    log_not,
    minimum_class_confusion,
)
from crossft.functional.conditioning import multilinear, randomized_multilinear
from crossft.functional.discrepancy import central_moment_discrepancy, coral
from crossft.functional.gather import gather_rows, mean_over_processes
from crossft.functional.invariance import (
    gradient_variance,
    logit_gradients,
    scale_gradients,
    square_of_mean,
    update_group_weights,
)
from crossft.functional.kernels import gaussian_kernel, mmd_linear, mmd_unbiased, paired_kernel, squared_distances
from crossft.functional.norms import spectral_penalty, stepwise_norm
from crossft.functional.precision import full_precision, upcast
from crossft.functional.reversal import adversarial_strength, reverse_gradient
from crossft.functional.similarity import linear_cka

__all__ = [
    "adversarial_strength",
    "batch_nuclear_norm",
    "central_moment_discrepancy",
    "classifier_discrepancy",
    "coral",
    "entropy",
    "full_precision",
    "gather_rows",
    "gaussian_kernel",
    "gradient_variance",
    "linear_cka",
    "log_not",
    "logit_gradients",
    "mean_over_processes",
    "minimum_class_confusion",
    "mmd_linear",
    "mmd_unbiased",
    "multilinear",
    "paired_kernel",
    "randomized_multilinear",
    "reverse_gradient",
    "scale_gradients",
    "spectral_penalty",
    "square_of_mean",
    "squared_distances",
    "stepwise_norm",
    "upcast",
    "update_group_weights",
]
