"""Write three domains of digits, DOMAIN/{train,test}/CLASS/*.png, from MNIST and USPS files.

    python experiments/adaptation/make_digits.py FOLDER --mnist mnist.npz --usps usps.h5 [--train 2000] [--test 1000]

mnist     60,000 / 10,000 handwritten digits, 28 x 28
usps      7,291 / 2,007 digits of envelopes, 16 x 16
blended   other MNIST digits, each as |patch - digit| with a patch of a photograph: the recipe of MNIST-M (Ganin et al.
          2016, section 5.1.3). It is NOT MNIST-M: the photographs are the three that ship with scikit-learn and
          matplotlib, not BSDS500, so its numbers cannot be compared with published ones.

``--train`` of 2,000 takes 2,000 MNIST and 1,800 USPS images, as Long et al. 2013 do and others since. Rows are taken in
proportion to the classes, in a fixed order; no MNIST digit is in two domains. The same arguments write the same pixels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import h5py
import numpy as np
from matplotlib import get_data_path
from PIL import Image
from sklearn.datasets import load_sample_images

__all__ = ["blend", "main", "make_digits", "pick"]

Pair = tuple[np.ndarray, np.ndarray]


def load_mnist(path: Path) -> dict[str, Pair]:
    """Images [n, 28, 28] uint8 and labels, by split."""
    with np.load(path) as file:
        return {s: (file[f"x_{s}"].reshape(-1, 28, 28), file[f"y_{s}"].astype(int)) for s in ("train", "test")}


def load_usps(path: Path) -> dict[str, Pair]:
    """Images [n, 16, 16] uint8 and labels, by split."""
    with h5py.File(path) as file:
        found = {s: (np.asarray(file[s]["data"]), np.asarray(file[s]["target"]).astype(int)) for s in ("train", "test")}
    return {s: ((x.reshape(-1, 16, 16) * 255).round().clip(0, 255).astype(np.uint8), y) for s, (x, y) in found.items()}


def pick(labels: np.ndarray, count: int, seed: int, skip: int = 0) -> np.ndarray:
    """At most ``count`` rows, in proportion to the classes; with ``skip`` those that a pick of so many left."""
    rng = np.random.default_rng(seed)
    rows = []
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        start, n = (round(k * len(own) / len(labels)) for k in (skip, count))
        rows.append(own[start : start + n])
    return np.sort(np.concatenate(rows))


def photographs() -> list[np.ndarray]:
    """Two photographs of scikit-learn and one of matplotlib, RGB."""
    portrait = Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    return [*load_sample_images().images, np.asarray(portrait)]


def blend(digit: np.ndarray, scenes: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """|patch - digit| over the three channels, [h, w] uint8 to [h, w, 3] uint8."""
    h, w = digit.shape
    scene = scenes[int(rng.integers(len(scenes)))]
    top, left = (int(rng.integers(n - k + 1)) for n, k in zip(scene.shape[:2], (h, w)))
    patch = scene[top : top + h, left : left + w].astype(np.int16)
    return np.abs(patch - digit[:, :, None].astype(np.int16)).astype(np.uint8)


def make_digits(root: Path, mnist: Path, usps: Path, train: int = 2000, test: int = 1000, seed: int = 0) -> Path:
    """Write the three domains and return ``root``; USPS has 9 training images for 10 of MNIST."""
    counts = {"train": train, "test": test}
    scenes, rng = photographs(), np.random.default_rng(seed)
    digits, envelopes = load_mnist(mnist), load_usps(usps)
    for split, count in counts.items():
        x, y = digits[split]
        half = min(count, len(y) // 2)
        first, other = pick(y, half, seed), pick(y, half, seed, skip=half)
        assert not set(first) & set(other)
        for row in first:
            _save(root / "mnist" / split / str(y[row]) / f"{row:05d}.png", x[row])
        for row in other:
            _save(root / "blended" / split / str(y[row]) / f"{row:05d}.png", blend(x[row], scenes, rng))
        x, y = envelopes[split]
        for row in pick(y, min(len(y), round(0.9 * count) if split == "train" else count), seed):
            _save(root / "usps" / split / str(y[row]) / f"{row:05d}.png", x[row])
    return root


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert("RGB").save(path)


def main() -> int:
    """Read the arguments, write the domains, say how many images each has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--mnist", type=Path, required=True, help="npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--usps", type=Path, required=True, help="HDF5 with train/test, each data and target")
    parser.add_argument("--train", type=int, default=2000, help="training images of a domain, at most half of MNIST's")
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    root = make_digits(args.root, args.mnist, args.usps, args.train, args.test, args.seed)
    for domain in sorted(p for p in root.iterdir() if p.is_dir()):
        print(domain.name, {s.name: len(list(s.rglob("*.png"))) for s in sorted(domain.iterdir())})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
