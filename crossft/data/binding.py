"""What the backbone's preprocessing makes of prepared rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from crossft.data.dataset import ImageCache, Rows
from crossft.data.images import Augment, eval_transform, train_transform
from crossft.data.prepare import Prepared
from crossft.data.table import Concat
from crossft.data.text import tokenize
from crossft.errors import ConfigError
from crossft.types import ImageSpec, TextSpec

__all__ = ["make_rows", "same_spec"]


def make_rows(
    parts: Sequence[Prepared],
    spec: ImageSpec | TextSpec,
    *,
    seed: int = 0,
    augment: Augment = "none",
    views: int | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
    cache_bytes: int = 0,
) -> Rows:
    """One dataset over the rows of all domains: every text tokenized once, or images with their transforms.

    Args:
        parts: the domains, in the order of their ids.
        spec: the backbone's preprocessing.
        seed: of augmentation.
        augment: image augmentation in training.
        views: fixed augmentations of each image; None: a new one each time.
        image_size: height and width of images; None for the backbone's.
        max_length: most tokens of a text; None for the backbone's.
        cache_bytes: images kept in memory by each process.

    Raises:
        ConfigError: the backbone takes images and the data is text, or the other way round.
    """
    found, needed = parts[0].modality, "image" if isinstance(spec, ImageSpec) else "text"
    if found != needed:
        raise ConfigError(f"the backbone takes {needed} input, and domain {parts[0].domain.name!r} holds {found} rows")
    inputs: Sequence[Any] = Concat([p.inputs for p in parts])
    targets = [t for p in parts for t in p.targets]
    labeled = np.concatenate([p.labeled for p in parts])
    ids = np.concatenate([p.ids for p in parts])
    if isinstance(spec, TextSpec):
        return Rows((), targets, labeled, ids, seed, tokens=tokenize(list(inputs), spec, max_length))
    if image_size is not None:
        spec = replace(spec, size=(image_size, image_size))
    cache = ImageCache(cache_bytes) if cache_bytes else None
    views = 0 if augment == "none" else views
    train, evaluate = train_transform(spec, augment), eval_transform(spec)
    return Rows(inputs, targets, labeled, ids, seed, train, evaluate, cache=cache, views=views)


def same_spec(a: ImageSpec | TextSpec, b: ImageSpec | TextSpec) -> bool:
    """Whether two specs preprocess alike."""
    if isinstance(a, TextSpec) and isinstance(b, TextSpec):
        return a.tokenizer is b.tokenizer and a.max_length == b.max_length
    return a == b
