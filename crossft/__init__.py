"""crossft: supervised fine-tuning across domains, on PyTorch Lightning.

Importing this package loads nothing heavy; import what is used from its rooms
(``crossft.backbones``, ``crossft.data``, ``crossft.tasks``, ``crossft.callbacks``, ...).
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
