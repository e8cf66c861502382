"""Pure tensor math, no Lightning: each function with its paper and equation."""

from crossft.functional.reversal import adversarial_strength, reverse_gradient

__all__ = ["adversarial_strength", "reverse_gradient"]
