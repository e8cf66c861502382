"""Never compute twice: what a frozen prefix of the backbone makes of a sample is stored and read back."""

from crossft.callbacks.caching.prefix import PrefixCache

__all__ = ["PrefixCache"]
