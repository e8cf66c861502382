"""Images of any mode become 8-bit RGB, then what a vision backbone takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from crossft.types import ImageSpec

__all__ = ["Augment", "eval_transform", "open_image", "to_rgb", "train_transform"]

Augment = Literal["none", "light", "flip", "randaugment", "trivialaugment", "timm"]


def open_image(source: Any) -> Image.Image | Tensor:
    """Load one input: a path, PIL image, array or integer tensor becomes an 8-bit RGB image; a float tensor stays.

    Arrays [h, w] or [h, w, c] of any number type are scaled as `to_rgb` does.

    Raises:
        Exception: whatever the decoder raises on a file or value that is no image.
    """
    if isinstance(source, (str, Path)):
        with Image.open(source) as image:
            return to_rgb(image)
    if isinstance(source, Tensor):
        if source.is_floating_point():
            return source
        source = source.permute(1, 2, 0).numpy() if source.ndim == 3 else source.numpy()
    return to_rgb(_from_array(source) if isinstance(source, np.ndarray) else source)


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[-1] not in (2, 3, 4)):
        raise ValueError(f"shape {list(array.shape)} is not [h, w], or [h, w, c] with 1 to 4 channels")
    return Image.fromarray(array if array.dtype == np.uint8 else _eight_bit(array))


def _eight_bit(array: NDArray[Any]) -> NDArray[np.uint8]:
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    largest = values.max(initial=0)
    if (array.dtype.kind == "u" and array.dtype.itemsize == 2) or largest > 255:
        values = values / 257
    elif array.dtype.kind in "fb" and largest <= 1:
        values = values * 255
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright.

    EXIF rotation is applied. 16-bit values are divided by 257 (0..65535 to 0..255), where PIL would clip; 32-bit
    integers and floats likewise where they exceed 255, floats in 0..1 are multiplied by 255. Transparent pixels are
    laid on white; palettes and CMYK are converted.

    Raises:
        ValueError: a mode that has no conversion to RGB (LAB), or values that are not finite.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_eight_bit(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, (255, 255, 255, 255)), over)
    return image.convert("RGB")


def _interpolation(spec: ImageSpec) -> InterpolationMode:
    return InterpolationMode(spec.interpolation if spec.interpolation != "random" else "bicubic")


def _tail(spec: ImageSpec) -> list[Any]:
    gray = [v2.Grayscale(spec.channels)] if spec.channels == 1 else []
    return [v2.ToImage(), *gray, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(spec.mean), list(spec.std))]


def eval_transform(spec: ImageSpec) -> v2.Compose:
    """The backbone's own evaluation preprocessing: resize, center crop, normalize; gives [channels, h, w] float32."""
    height, width = spec.size
    scaled = [math.floor(side / spec.crop_pct) for side in (height, width)]
    resize = v2.Resize(scaled[0] if height == width else scaled, interpolation=_interpolation(spec), antialias=True)
    return v2.Compose([resize, v2.CenterCrop([height, width]), *_tail(spec)])


def train_transform(spec: ImageSpec, augment: Augment) -> v2.Compose:
    """The training preprocessing.

    Args:
        spec: the backbone's preprocessing.
        augment: ``none`` is the evaluation preprocessing; ``light`` a random crop of 80 to 100 % of the area, without
            flips, so digits and letters stay what they are; ``flip`` adds a horizontal flip; ``randaugment`` (Cubuk et
            al. 2020, 2 operations of magnitude 9), ``trivialaugment`` (Mueller & Hutter 2021) and ``timm`` (timm's
            RandAugment ``rand-m9-mstd0.5-inc1``) come after ``flip``.
    """
    if augment == "none":
        return eval_transform(spec)
    steps: list[Any] = [
        v2.RandomResizedCrop(
            list(spec.size), scale=(0.8, 1.0), ratio=(0.9, 1.1), interpolation=_interpolation(spec), antialias=True
        )
    ]
    if augment != "light":
        steps.append(v2.RandomHorizontalFlip())
    if augment == "randaugment":
        steps.append(v2.RandAugment())
    if augment == "trivialaugment":
        steps.append(v2.TrivialAugmentWide())
    if augment == "timm":
        from timm.data.auto_augment import rand_augment_transform

        steps.append(rand_augment_transform("rand-m9-mstd0.5-inc1", {}))
    return v2.Compose([*steps, *_tail(spec)])
