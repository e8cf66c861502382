"""Never compute twice, nor slower than need be: stored outputs of a frozen prefix, and a compiled backbone."""

from crossft.callbacks.caching.compiled import Compile
from crossft.callbacks.caching.prefix import PrefixCache

__all__ = ["Compile", "PrefixCache"]
