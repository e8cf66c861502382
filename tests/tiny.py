"""Tiny models and data for the suite: a few hundred parameters, a few dozen images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from crossft.backbones import Backbone
from crossft.backbones.base import StagePlan
from crossft.types import Encoded, ImageSpec

__all__ = ["TinyVision", "image_domains", "text_domains"]


class TinyVision(Backbone):
    """Three linear stages over pixels, with dropout and BatchNorm only where asked for."""

    def __init__(
        self, size: int = 8, width: int = 12, dropout: float = 0.0, batchnorm: bool = False, pretrained: bool = True
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, width), nn.Tanh())
        middle: list[nn.Module] = [nn.Linear(width, width)]
        middle += [nn.BatchNorm1d(width)] if batchnorm else []
        self.middle = nn.Sequential(*middle, nn.Tanh(), nn.Dropout(dropout))
        self.last = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.num_features = width
        self.input_spec = ImageSpec((size, size), (0.5,) * 3, (0.5,) * 3, "bilinear")
        self.pretrained = pretrained
        self._plans = tuple(StagePlan(name, (name,)) for name in ("stem", "middle", "last"))

    def _encode(self, start: int, value: Tensor | None, inputs: Any, capture: Any) -> Encoded:
        x = inputs["pixel_values"] if start == 0 else value
        stages = {}
        for plan in self._plans[start:]:
            x = self.get_submodule(plan.name)(x)
            if plan.name in capture:
                stages[plan.name] = x
        return Encoded(features=x, tokens=x.unsqueeze(1), stages=stages)

    def _reason(self, index: int) -> str | None:
        return None

    def export(self, folder: Path) -> Path:
        raise AssertionError("a test backbone is never exported")


def image_domains(
    root: Path,
    domains: tuple[str, ...] = ("photo", "sketch"),
    classes: tuple[str, ...] = ("cat", "dog"),
    each: int = 16,
    size: int = 8,
    signal: int = 90,
) -> Path:
    """Write DOMAIN/CLASS/*.png: a class is a colour of some strength, a domain is a brightness; a linear model learns
    it. About 10 is a signal that is not always right."""
    rng = np.random.default_rng(0)
    for d, domain in enumerate(domains):
        for c, name in enumerate(classes):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for i in range(each):
                pixels = rng.integers(0, 90, (size, size, 3)) + 40 * d
                pixels[..., c % 3] += signal
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    return root


def permute_labels(root: Path, to: Path, domain: str = "sketch") -> Path:
    """A copy of `image_domains` in which the files of one domain have moved between class folders."""
    shutil.copytree(root, to)
    for i, path in enumerate(sorted((to / domain).glob("*/*.png"))):
        path.rename(to / domain / ("dog", "cat")[i % 2] / f"moved-{i:03d}.png")
    return to


def text_domains(root: Path, domains: tuple[str, ...] = ("books", "kitchen"), each: int = 16) -> Path:
    """Write DOMAIN.csv with text and label: good and bad words among a domain's own."""
    rng = np.random.default_rng(0)
    own = {d: [f"{d[:2]}{i}" for i in range(20)] for d in domains}
    root.mkdir(parents=True, exist_ok=True)
    for domain in domains:
        lines = ["text,label"]
        for i in range(2 * each):
            words = list(rng.choice(own[domain], rng.integers(2, 9)))
            words.insert(int(rng.integers(len(words))), ("bad", "good")[i % 2])
            lines.append(f"{' '.join(words)} {i},{('negative', 'positive')[i % 2]}")
        (root / f"{domain}.csv").write_text("\n".join(lines) + "\n")
    return root


def flat(module: nn.Module) -> Tensor:
    """All parameters and buffers in one vector, float64."""
    return torch.cat([t.detach().double().reshape(-1) for t in module.state_dict().values()])
