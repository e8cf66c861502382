"""Files written whole or not at all, and plain JSON."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crossft.errors import RunError

__all__ = ["plain", "read_json", "replacing", "write_atomic", "write_json"]


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; on success it becomes ``path``, on an error it vanishes.

    The file is flushed to the disk before the rename, and the folder after it, so that a crash at any moment leaves
    either the old file or the new one. The temporary keeps the suffix of ``path`` and starts with ``.tmp-``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{secrets.token_hex(6)}-{path.name}")
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write ``data`` (text as UTF-8) to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path | str, obj: Any, *, sort_keys: bool = True) -> None:
    """Write ``obj`` as JSON, whole or not at all; NaN and infinities become null, paths text, tuples lists.

    Raises:
        TypeError: ``obj`` holds something JSON has no form for.
    """
    text = json.dumps(plain(obj), indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    write_atomic(path, text + "\n")


def plain(obj: Any) -> Any:
    """Turn ``obj`` into what JSON can hold: NaN and infinities null, paths text, tuples lists, sets sorted lists."""
    if isinstance(obj, Mapping):
        return {str(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(value) for value in obj]
    if isinstance(obj, (set, frozenset)):
        return sorted(plain(value) for value in obj)
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, Path):
        return str(obj)
    if not isinstance(obj, (str, int, bool)) and hasattr(obj, "item"):  # a 0-d array or tensor
        return plain(obj.item())
    return obj


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        RunError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}; is this the right folder?") from error
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON ({error}); restore it, or remove its run folder") from error
