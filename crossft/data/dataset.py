"""One dataset for all domains: a key of the sampler becomes an item."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from crossft.data.images import open_image
from crossft.data.sampler import EVALUATION, Key
from crossft.data.splits import digest
from crossft.data.text import Tokens
from crossft.errors import DataError

__all__ = ["ImageCache", "InOrder", "Item", "Rows", "seeded"]


@dataclass
class Item:
    """One row, ready to be collated: its input (None where postponed), target (a blank where unlabeled), its key."""

    value: Any
    target: Any
    labeled: bool
    sample_id: int
    key: Key


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under torch, random and numpy generators seeded by ``seed``, and put their states back after it."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


class ImageCache:
    """Images by row, up to a number of bytes; what does not fit is decoded again each time.

    Attributes:
        images: decoded, 8-bit.
        inputs: ready for the backbone, of rows that nothing augments.
        left: bytes that are free.
    """

    def __init__(self, budget: int) -> None:
        self.budget = self.left = budget
        self.images: dict[int, NDArray[np.uint8]] = {}
        self.inputs: dict[int, Tensor] = {}

    def get(self, row: int, source: Any) -> Image.Image | Tensor:
        """The row's image, decoded once where it fits."""
        if row in self.images:
            return Image.fromarray(self.images[row])
        image = open_image(source)
        if isinstance(image, Image.Image):
            size = image.width * image.height * 3
            if size <= self.left:
                self.left -= size
                self.images[row] = np.asarray(image)
        return image

    def put(self, row: int, value: Tensor, rows: int) -> None:
        """Keep the row's input as evaluation sees it instead of the decoded image, where those of all ``rows`` fit."""
        size = value.numel() * value.element_size()
        if rows * size <= self.budget:
            image = self.images.pop(row, None)
            self.left += (0 if image is None else image.nbytes) - size
            self.inputs[row] = value


class Rows(Dataset[Item]):
    """Rows of all domains; an item depends on its key alone, so it is the same in every process.

    Args:
        inputs: [n] inputs of all rows: image sources, or nothing for text.
        targets: one entry a row, in its own domain's form.
        labeled: [n] bool.
        sample_ids: [n] int64.
        seed: of augmentation, with draw number, sample id and view.
        train, evaluate: image transforms of training and evaluation; None for text.
        tokens: token ids of all rows; None for images.
        cache: decoded images, or None.
        views: training draws one of so many fixed augmentations of an image; None: a new one each time; 0: none.

    Attributes:
        postponed: [1 + views, n] by view and row (see `view_of`), in shared memory: where it is not 0 nobody is
            expected to read the input, so it is loaded only when somebody does. None postpones nothing.
    """

    def __init__(
        self,
        inputs: Sequence[Any],
        targets: Sequence[Any],
        labeled: NDArray[np.bool_],
        sample_ids: NDArray[np.int64],
        seed: int,
        train: Any = None,
        evaluate: Any = None,
        tokens: Tokens | None = None,
        cache: ImageCache | None = None,
        views: int | None = None,
    ) -> None:
        self.views = 0 if tokens is not None else views
        self.postponed: Tensor | None = None
        self.inputs, self.targets, self.labeled, self.sample_ids = inputs, targets, labeled, sample_ids
        self.seed, self.train, self.evaluate, self.tokens, self.cache = seed, train, evaluate, tokens, cache

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, key: Key) -> Item:
        return self._item(key, load=True)

    def __getitems__(self, keys: Sequence[Key]) -> list[Item]:
        """The rows of one batch; their inputs are left out where most of them are postponed."""
        load = True
        if self.postponed is not None:
            views = [self.view_of(key) for key in keys]
            load = None in views or 2 * int(self.postponed[views, [key.row for key in keys]].sum()) <= len(keys)
        return [self._item(key, load) for key in keys]

    def _item(self, key: Key, load: bool) -> Item:
        row = key.row
        labeled = bool(self.labeled[row]) and key.labeled
        return Item(self.value(key) if load else None, self.targets[row], labeled, int(self.sample_ids[row]), key)

    def view_of(self, key: Key) -> int | None:
        """Which of its row's fixed inputs a key asks for: 0 as in evaluation, 1 + i augmented, None: a new one."""
        if self.views == 0 or key.info.step < 0:
            return 0
        return None if self.views is None else 1 + key.draw % self.views

    def content(self, rows: slice, view: int) -> str:
        """Hash (16 hex digits) over what a view of these rows is made of: samples, and token ids or the transform."""
        state = blake2b(self.sample_ids[rows].tobytes(), digest_size=8)
        if self.tokens is not None:
            state.update(self.tokens.content(rows))
        elif view == 0:
            state.update(repr(self.evaluate).encode())
        else:
            state.update(repr((self.train, self.seed, view)).encode())
        return state.hexdigest()

    def value(self, key: Key, view: int = 0) -> Any:
        """The row's token arrays, or its transformed image [channels, h, w].

        Raises:
            DataError: an image that cannot be read (one that changed since it was checked, or ``verify=off``).
        """
        if self.tokens is not None:
            return self.tokens.row(key.row)
        fixed = self.views == 0 or key.info is EVALUATION or key.info.step < 0
        if fixed and self.cache is not None and key.row in self.cache.inputs:
            return self.cache.inputs[key.row]
        source: Any = f"row {key.row}"
        try:
            source = self.inputs[key.row]
            image = open_image(source) if self.cache is None else self.cache.get(key.row, source)
        except Exception as error:  # whatever a data set or decoder raises
            raise DataError(
                f"{source}: unreadable image: {error}; check it before training with data.verify"
            ) from error
        if isinstance(image, Tensor):
            return image
        if fixed:
            made = self.evaluate(image)
            if self.cache is not None and self.views == 0:
                self.cache.put(key.row, made, len(self))
            return made
        draw = key.draw % self.views if self.views else key.draw
        with seeded(digest(self.seed, "augment", draw, self.sample_ids[key.row], view)):
            return self.train(image)


class InOrder(Dataset[Item]):
    """All rows by position, as in evaluation; for loaders that count rows themselves."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        return self.rows[Key(index, 0, 0, EVALUATION)]
