"""Write split or permuted MNIST as folders of domains, for ``crossft fit --sequence``.

    python experiments/retention/make_mnist.py MNIST_NPZ DIR --kind split|permuted [--tasks N] [--each N] [--heads own]

split: task i has the digits 2i and 2i + 1, called even and odd (domain-incremental), or by their own names with
``--heads own`` (task-incremental). permuted: ten digits, the pixels of each task in an order of its own, task 0
unchanged. MNIST_NPZ holds x_train, y_train, x_test, y_test; the train and test images are those of MNIST.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("npz", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=("split", "permuted"), required=True)
    parser.add_argument("--tasks", type=int, help="default: 5 of split, 10 of permuted")
    parser.add_argument("--each", type=int, help="training images a task; default: all")
    parser.add_argument("--heads", choices=("shared", "own"), default="shared", help="of split: label names")
    options = parser.parse_args()
    with np.load(options.npz) as file:
        splits = {split: (file[f"x_{split}"], file[f"y_{split}"]) for split in ("train", "test")}
    for task in range(options.tasks or (5 if options.kind == "split" else 10)):
        order = np.arange(784) if task == 0 else np.random.default_rng(task).permutation(784)
        for split, (images, labels) in splits.items():
            rows = np.flatnonzero(labels // 2 == task) if options.kind == "split" else np.arange(len(labels))
            if options.each is not None:
                limit = options.each if split == "train" else max(1, options.each // 6)
                rows = np.random.default_rng(0).permutation(rows)[:limit]
            for row in rows:
                pixels, label = images[row].reshape(28, 28), int(labels[row])
                name = str(label)
                if options.kind == "permuted":
                    pixels = pixels.reshape(-1)[order].reshape(28, 28)
                elif options.heads == "shared":
                    name = ("even", "odd")[label % 2]
                path = options.folder / f"task{task}" / split / name / f"{row:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path)


if __name__ == "__main__":
    main()
