"""Pictures of features in two dimensions, by domain and by class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crossft.runs import replacing

__all__ = ["Projection", "draw_features", "project"]

Projection = Literal["pca", "tsne"]
_DOMAINS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
_MOST_CLASSES = 20


def project(features: NDArray[Any], by: Projection) -> NDArray[np.float64]:
    """[n, d] to [n, 2]: principal components, or t-SNE (van der Maaten & Hinton 2008) from them; nothing is drawn.

    Args:
        features: [n, d], n >= 3.
        by: ``pca`` or ``tsne``.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x = np.asarray(features, np.float64)
    if by == "pca":
        return np.asarray(PCA(2, svd_solver="full").fit_transform(x))
    perplexity = max(1.0, min(30.0, (len(x) - 1) / 3))
    return np.asarray(TSNE(2, init="pca", perplexity=perplexity, random_state=0).fit_transform(x))


def draw_features(
    path: Path,
    features: NDArray[Any],
    domains: Sequence[str],
    classes: Sequence[str],
    by: Sequence[Projection],
    title: str,
) -> Path:
    """Draw each projection twice, colored by domain and by class.

    Args:
        path: the PNG to write.
        features: [n, d].
        domains: [n] domain of each row; each has its own marker in both pictures.
        classes: [n] class of each row.
        by: one row of pictures for each projection.
        title: of the whole picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6 * len(by)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(by), 2, squeeze=False)
    for (left, right), projection in zip(axes, by):
        points = project(features, projection)
        name = {"pca": "PCA", "tsne": "t-SNE"}[projection]
        _scatter(left, points, domains, domains, f"{name}, by domain")
        _scatter(right, points, classes, domains, f"{name}, by class")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png", metadata={"Software": ""})
    return path


def _scatter(axis: Any, points: NDArray[Any], groups: Sequence[str], domains: Sequence[str], title: str) -> None:
    import matplotlib as mpl

    names, markers = list(dict.fromkeys(groups)), list(dict.fromkeys(domains))
    if names != markers:
        names.sort()
    group, domain = np.array(groups, object), np.array(domains, object)
    palette = mpl.colormaps["tab10" if len(names) <= 10 else "tab20" if len(names) <= _MOST_CLASSES else "turbo"]
    for i, name in enumerate(names):
        color: Any = palette(i / max(1, len(names) - 1) if len(names) > _MOST_CLASSES else i)
        if names == markers:
            color = _DOMAINS[i % len(_DOMAINS)]
        for j, own in enumerate(markers):
            rows = (group == name) & (domain == own)
            if rows.any():
                first = own == next(d for d, g in zip(domains, groups) if g == name)
                axis.scatter(
                    *points[rows].T, s=14, color=color, marker=_MARKERS[j % len(_MARKERS)], linewidths=0, alpha=0.7,
                    label=name if first else None,
                )  # fmt: skip
    axis.set_title(title, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])
    if len(names) <= _MOST_CLASSES:
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
