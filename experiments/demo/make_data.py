"""Write the demo's three domains of digits, as DOMAIN/CLASS/*.png, from what ships inside packages.

    python experiments/demo/make_data.py FOLDER [--images 500] [--size 40] [--seed 0] [--sheet SHEET.png]

printed   digits drawn with matplotlib's own text fonts, slightly turned, scaled and moved; light on dark
digits    handwritten digits of scikit-learn (UCI, 8x8), enlarged; light on dark
blended   other handwritten digits, each as |patch - digit| with a patch of a photograph: the MNIST-M recipe of
          Ganin et al. 2016, "Domain-adversarial training of neural networks"; the photographs are scikit-learn's two
No handwritten sample is in two domains. The same arguments write the same pixels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_images

__all__ = ["CLASSES", "DOMAINS", "contact_sheet", "make_data"]

DOMAINS = ("printed", "digits", "blended")
CLASSES = 10
FONTS = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")


def make_data(root: Path, images: int = 500, size: int = 40, seed: int = 0) -> Path:
    """Write ``images`` pictures a domain, as many of each class, ``size`` pixels square; return ``root``.

    Raises:
        ValueError: ``images`` is no multiple of 10, or more than the handwritten samples allow (870 a domain).
    """
    if images % CLASSES or images <= 0:
        raise ValueError(f"images is {images}; it must be a positive multiple of {CLASSES}, as classes are balanced")
    each = images // CLASSES
    handwritten, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(labels == label)) for label in range(CLASSES)]
    if 2 * each > min(map(len, rows)):
        raise ValueError(
            f"images is {images}; scikit-learn's digits allow at most {min(map(len, rows)) // 2 * CLASSES}"
        )
    scenes = [np.asarray(scene, dtype=np.float32) for scene in load_sample_images().images]
    files = _fonts()
    for label, mine in enumerate(rows):
        for i in range(each):
            digit, other = _enlarge(handwritten[mine[i]], size), _enlarge(handwritten[mine[each + i]], size)
            _save(root, "printed", label, i, _print(str(label), files[int(rng.integers(len(files)))], size, rng))
            _save(root, "digits", label, i, digit)
            _save(root, "blended", label, i, np.abs(_patch(scenes, size, rng) - other[:, :, None]))
    return root


def contact_sheet(root: Path, path: Path, columns: int = 20) -> Path:
    """Draw the first images of every class, two rows a domain, into one picture."""
    files = {
        domain: sorted((root / domain).glob("*/*.png"), key=lambda f: (f.name, f.parent.name)) for domain in DOMAINS
    }
    size = Image.open(files[DOMAINS[0]][0]).width
    sheet = Image.new("RGB", (columns * (size + 2), 2 * len(DOMAINS) * (size + 2)), "white")
    for row, domain in enumerate(DOMAINS):
        for i, file in enumerate(files[domain][: 2 * columns]):
            place = (i % columns * (size + 2), (2 * row + i // columns) * (size + 2))
            sheet.paste(Image.open(file).convert("RGB"), place)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _fonts() -> list[Path]:
    """matplotlib's text fonts, by name; its symbol and display fonts lack digits and stay out."""
    folder = Path(get_data_path()) / "fonts" / "ttf"
    return sorted(f for f in folder.glob("*.ttf") if f.name.startswith(FONTS) and "Display" not in f.name)


def _enlarge(pixels: np.ndarray, size: int) -> np.ndarray:
    """An 8x8 digit with values 0..16 as [size, size] with values 0..255."""
    small = Image.fromarray((pixels.reshape(8, 8) * (255 / 16)).astype(np.uint8))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)


def _patch(scenes: list[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """A random [size, size, 3] cut of one of the photographs."""
    scene = scenes[int(rng.integers(len(scenes)))]
    top, left = (int(rng.integers(side - size)) for side in scene.shape[:2])
    return scene[top : top + size, left : left + size]


def _print(text: str, font: Path, size: int, rng: np.random.Generator) -> np.ndarray:
    """One printed character, [size, size], values 0..255: 60 to 95 % high, up to 10 degrees and 3 pixels off."""
    scale = 4  # drawn larger, so that turning it and scaling it down leaves smooth edges
    canvas = Image.new("L", (size * scale, size * scale))
    face = ImageFont.truetype(str(font), int(size * scale * rng.uniform(0.8, 1.25)))
    middle = tuple(size * scale / 2 + scale * rng.uniform(-3, 3) for _ in range(2))
    left, top, right, bottom = face.getbbox(text)
    corner = (middle[0] - (left + right) / 2, middle[1] - (top + bottom) / 2)
    ImageDraw.Draw(canvas).text(corner, text, fill=int(rng.uniform(200, 255)), font=face)
    canvas = canvas.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC)
    return np.asarray(canvas.resize((size, size), Image.Resampling.LANCZOS), dtype=np.float32)


def _save(root: Path, domain: str, label: int, i: int, pixels: np.ndarray) -> None:
    path = root / domain / str(label) / f"{i:04d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels.round(), 0, 255).astype(np.uint8)).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=500, help="pictures a domain")
    parser.add_argument("--size", type=int, default=40, help="pixels a side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="also draw a contact sheet")
    args = parser.parse_args()
    print(make_data(args.folder, args.images, args.size, args.seed))
    if args.sheet:
        print(contact_sheet(args.folder, args.sheet))
