"""One dataset for all domains: a key of the sampler becomes an item."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

__all__ = ["ImageCache", "InOrder", "Item", "Rows", "seeded"]


@dataclass
class Item:
    """One row, ready to be collated: its input, target (a blank where unlabeled), and its key."""

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
    """Decoded 8-bit images by row, up to a number of bytes; what does not fit is decoded again each time."""

    def __init__(self, budget: int) -> None:
        self.left = budget
        self.images: dict[int, NDArray[np.uint8]] = {}

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
    ) -> None:
        self.inputs, self.targets, self.labeled, self.sample_ids = inputs, targets, labeled, sample_ids
        self.seed, self.train, self.evaluate, self.tokens, self.cache = seed, train, evaluate, tokens, cache

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, key: Key) -> Item:
        row = key.row
        padding = key.domain < 0
        labeled = bool(self.labeled[row]) and not padding
        return Item(self.value(key), self.targets[row], labeled, int(self.sample_ids[row]), key)

    def value(self, key: Key, view: int = 0) -> Any:
        """The row's token arrays, or its transformed image [channels, h, w]."""
        if self.tokens is not None:
            return self.tokens.row(key.row)
        source = self.inputs[key.row]
        image = open_image(source) if self.cache is None else self.cache.get(key.row, source)
        if isinstance(image, Tensor):
            return image
        if key.info is EVALUATION or key.info.step < 0:
            return self.evaluate(image)
        with seeded(digest(self.seed, "augment", key.draw, self.sample_ids[key.row], view)):
            return self.train(image)


class InOrder(Dataset[Item]):
    """All rows by position, as in evaluation; for loaders that count rows themselves."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        return self.rows[Key(index, 0, 0, EVALUATION)]
