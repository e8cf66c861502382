"""Constant tensors of methods (anchors, importance, teachers): written once a run, referenced by hash."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from crossft.callbacks.monitoring.checkpoint_io import sha256
from crossft.errors import CheckpointError
from crossft.runs import replacing

__all__ = ["Anchors"]

_PLAIN = re.compile(r"^[A-Za-z0-9_.-]+\.safetensors$")


class Anchors:
    """The ``anchors/`` folder of a run.

    Args:
        folder: where the files lie.
        write: whether this process writes (the first one does).
    """

    def __init__(self, folder: Path, write: bool) -> None:
        self.folder, self.write = folder, write
        self._known: dict[str, dict[str, str]] = {}

    def put(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> dict[str, str]:
        """Write a method's tensors, once, and return the reference that a checkpoint keeps.

        Args:
            name: of the file: the method's, or one that begins with it.
            tensors: what to write.
            metadata: what the file's header says of them.
        """
        if name not in self._known:
            path = self.folder / f"{name}.safetensors"
            if self.write:
                with replacing(path) as temporary:
                    save_file(
                        {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()},
                        temporary,
                        metadata,
                    )
            self._known[name] = {"file": path.name, "sha256": sha256(path) if self.write else ""}
        return self._known[name]

    def get(self, reference: dict[str, Any]) -> dict[str, Tensor]:
        """Read back what ``put`` wrote.

        Raises:
            CheckpointError: the file is missing, changed, or named by a path.
        """
        file = str(reference.get("file"))
        if not _PLAIN.match(file):
            raise CheckpointError(f"the checkpoint names the anchor file {file!r}; only a plain file name is allowed")
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the run's anchors went away; restore the file")
        if sha256(path) != reference.get("sha256"):
            raise CheckpointError(f"{path} is not the file the checkpoint was saved with (checksum differs)")
        self._known[path.stem] = {"file": file, "sha256": str(reference["sha256"])}
        return load_file(path)
