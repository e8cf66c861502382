"""Sweeps: one file -> arms -> runs, planned and run on this machine. Nothing here imports torch.

``crossft.sweeps.file``, ``arms`` and ``parameters`` read the file; ``plan`` checks it; ``local`` runs it.
"""
