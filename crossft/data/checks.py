"""Reading every row once before training: content hashes, and what is wrong with which row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from filelock import FileLock
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from crossft.data.images import open_image
from crossft.data.splits import MASK
from crossft.data.table import Table
from crossft.runs import cache_folder, replacing

__all__ = ["Seen", "Verify", "content_of"]

Verify = Literal["full", "changed", "off"]
SLOW = 2000
"""Files; reading more than this shows progress."""


class Seen(NamedTuple):
    """What is known of one file: size in bytes, modification time in ns, 63-bit content hash, and why it is bad."""

    size: int
    mtime: int
    hash: int
    problem: str


def content_of(table: Table, place: str, verify: Verify) -> tuple[list[int], dict[int, str]]:
    """Content hash of each row, and row -> problem for rows that cannot be used.

    Args:
        table: the rows.
        place: what they are (root and domain); names the manifest.
        verify: ``full`` reads every file, ``changed`` those whose size or time differs from the manifest, ``off``
            trusts the manifest and decodes nothing.
    """
    if table.modality == "text":
        return _texts(table.inputs)
    paths = {i: v for i, v in enumerate(table.inputs) if isinstance(v, Path)} if isinstance(table.inputs, list) else {}
    seen = _files([str(p) for p in paths.values()], place, verify) if paths else {}
    hashes, problems = [], {}
    for i in range(len(table)):
        found = seen[str(paths[i])] if i in paths else _object(table.inputs, i)
        hashes.append(found.hash)
        if found.problem:
            problems[i] = found.problem
    return hashes, problems


def _hash(*parts: bytes) -> int:
    state = blake2b(digest_size=8)
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return int.from_bytes(state.digest(), "big") & MASK


def _texts(texts: Sequence[Any]) -> tuple[list[int], dict[int, str]]:
    hashes, problems = [], {}
    for i, value in enumerate(texts):
        parts = value if isinstance(value, tuple) else (value,)
        if any(not isinstance(v, str) and v == v and v is not None for v in parts):
            problems[i] = f"text {value!r} is a {type(parts[0]).__name__}, not a string"
        elif any(not isinstance(v, str) or not v.strip() for v in parts):
            problems[i] = "empty text"
        hashes.append(_hash(*(str(v).encode("utf-8", "surrogatepass") for v in parts)))
    return hashes, problems


def _object(inputs: Sequence[Any], row: int) -> Seen:
    """Load an input and convert it as training does; hash a PIL image, array or tensor by its values."""
    try:
        value = inputs[row]
        if value is None:
            return Seen(0, 0, 0, "no image")
        if not isinstance(value, (Image.Image, np.ndarray, Tensor)):
            return Seen(0, 0, 0, f"a {type(value).__name__} is not an image")
        content = _values(value)
        open_image(value)
    except Exception as error:  # whatever a data set or decoder raises on a damaged row is the row's problem
        return Seen(0, 0, 0, f"unreadable image: {error or type(error).__name__}")
    return Seen(0, 0, content, "")


def _values(value: Any) -> int:
    if isinstance(value, Image.Image):
        return _hash(value.mode.encode(), str(value.size).encode(), value.tobytes())
    array = np.ascontiguousarray(value.numpy() if isinstance(value, Tensor) else value)
    return _hash(str(array.dtype).encode(), str(array.shape).encode(), array.tobytes())


def _files(paths: list[str], place: str, verify: Verify) -> dict[str, Seen]:
    """What is known of these files, after reading those that must be read; the manifest is kept up to date."""
    name = f"{_hash(place.encode()):016x}"
    folder = cache_folder() / "manifests"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        file = folder / f"{name}.parquet"
        known = {} if verify == "full" else _load(file)
        todo = [p for p in dict.fromkeys(paths) if not _fresh(p, known.get(p), verify)]
        if todo:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                results = pool.map(lambda p: _read(p, decode=verify != "off"), todo)
                with _progress(results, len(todo), place) as shown:
                    known.update(zip(todo, shown))
        known = {p: known[p] for p in dict.fromkeys(paths)}
        if todo and verify != "off":
            _store(file, known)
    return known


@contextmanager
def _progress(results: Iterator[Seen], total: int, place: str) -> Iterator[Iterator[Seen]]:
    if total < SLOW:
        yield results
        return
    console = Console(stderr=True)
    yield iter(track(results, f"Checking {Path(place).name}", total=total, console=console))


def _fresh(path: str, seen: Seen | None, verify: Verify) -> bool:
    if seen is None or verify == "full":
        return False
    if verify == "off":
        return True
    try:
        stat = Path(path).stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (seen.size, seen.mtime)


def _read(path: str, decode: bool) -> Seen:
    try:
        stat = Path(path).stat()
        content = Path(path).read_bytes()
    except OSError as error:
        return Seen(0, 0, 0, f"no readable file: {error.strerror or error}")
    problem = ""
    if decode:
        try:
            open_image(path)
        except Exception as error:  # whatever a decoder raises on a damaged file is the file's problem
            problem = f"unreadable image: {error}".replace(f" {path!r}", "")
    return Seen(stat.st_size, stat.st_mtime_ns, _hash(content), problem)


def _load(file: Path) -> dict[str, Seen]:
    if not file.is_file():
        return {}
    try:
        frame = pd.read_parquet(file, columns=["path", *Seen._fields])
    except Exception:  # a manifest of another version, or damaged: read the files again
        return {}
    columns = [frame[c].tolist() for c in Seen._fields]
    return dict(zip(frame["path"].tolist(), map(Seen, *columns)))


def _store(file: Path, known: dict[str, Seen]) -> None:
    frame = pd.DataFrame(list(known.values()), columns=list(Seen._fields))
    frame.insert(0, "path", list(known))
    with replacing(file) as temporary:
        frame.to_parquet(temporary, index=False)
