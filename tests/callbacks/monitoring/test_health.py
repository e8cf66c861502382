"""Health: gradients, distances and marginals against numbers worked out by hand; it watches and moves nothing."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from adaptation_cases import data_of, fit
from PIL import Image
from steps import make_task
from tiny import flat, image_domains
from torch import nn

from crossft.callbacks.adaptation import CORAL, DANN
from crossft.callbacks.monitoring import Health
from crossft.callbacks.monitoring.feature_maps import draw_features, project
from crossft.callbacks.monitoring.health import gradient_norms
from crossft.callbacks.monitoring.inside import Inside, look_inside
from crossft.callbacks.monitoring.seen import Seen
from crossft.errors import ConfigError, StageError
from crossft.functional import gaussian_kernel, mmd_unbiased
from crossft.metrics.probes import proxy_a_distance
from crossft.types import Domain

VALIDATES = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
SPLITS = {"splits": (0.4, 0.4, 0.2)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_domains(tmp_path_factory.mktemp("images"), domains=("photo", "sketch", "art"), each=24)


@pytest.fixture(scope="module")
def watched(root: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run with two terms, watched at every third step."""
    folder = tmp_path_factory.mktemp("watched")
    data = data_of(root, False, **SPLITS)
    methods = {"dann": DANN(hidden=8), "coral": CORAL(100.0)}
    health = Health(every_n_steps=3)
    trainer, task = fit(data, methods, extra=(health,), default_root_dir=folder, **VALIDATES)
    assert set(health.gradients) == {"health/gradient/dann", "health/gradient/coral"}
    assert task.attachments.watched is None
    return trainer, task, data, folder


def test_it_moves_no_weight(root: Path, watched) -> None:
    plain = fit(data_of(root, False, **SPLITS), {"dann": DANN(hidden=8), "coral": CORAL(100.0)}, **VALIDATES)[1]
    assert torch.equal(flat(plain), flat(watched[1]))
    assert torch.equal(flat(plain.attachments.terms["dann"]), flat(watched[1].attachments.terms["dann"]))


def test_gradient_norms_in_closed_form() -> None:
    """f(w) = 3 a.w and |w|^2 have the gradients 3 a and 2 w; the graph is left, and ``.grad`` as it was."""
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    a = torch.tensor([0.0, 2.0])
    parts = {"task": 3 * (a * w).sum(), "term": w.square().sum(), "constant": torch.tensor(1.0)}
    norms = gradient_norms(parts, [w])
    assert {k: float(v) for k, v in norms.items()} == {"task": 6.0, "term": 10.0, "constant": 0.0}
    assert w.grad is None
    (parts["task"] + parts["term"]).backward()


def test_a_gradient_is_compared_with_the_tasks(root: Path) -> None:
    """Ten times the weight, ten times the share, at the first step where the weights are still the same."""
    shares = []
    for weight in (10.0, 100.0):
        more = {**VALIDATES, "max_steps": 1, "limit_val_batches": 0}
        health = Health(every_n_steps=1, maps=[])
        fit(data_of(root, False), {"coral": CORAL(weight)}, extra=(health,), **more)
        shares.append(health.gradients["health/gradient/coral"])
    assert shares[0] > 0
    assert shares[1] == pytest.approx(10 * shares[0], rel=1e-4)


def test_distances_are_those_of_the_features(watched) -> None:
    trainer, task, data, _ = watched
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("health/")}
    assert "health/a_distance/middle" in logged
    inside = look_inside(task, data, [], 256)
    x, y = inside["photo"].seen.features, inside["sketch"].seen.features
    assert logged["health/a_distance/features"] == pytest.approx(proxy_a_distance(x, y), abs=1e-5)
    kernel = gaussian_kernel(torch.from_numpy(np.concatenate([x, y])).double())
    assert logged["health/mmd/features"] == pytest.approx(float(mmd_unbiased(kernel, len(x))), rel=1e-3)
    assert (inside["sketch"].seen.labels == -1).all()
    assert (inside["photo"].seen.labels >= 0).all()


def test_the_discriminator_is_measured_against_chance(watched) -> None:
    logged = watched[0].callback_metrics
    assert float(logged["term/dann/above_chance"]) == pytest.approx(float(logged["term/dann/accuracy"]) - 0.5)
    assert float(logged["term/dann/loss_share"]) == pytest.approx(float(logged["term/dann"]) / np.log(2), rel=1e-5)


def test_pictures_are_drawn_before_and_after(watched) -> None:
    for name in ("features-start.png", "features-end.png"):
        pixels = np.asarray(Image.open(watched[3] / "figures" / name).convert("RGB"))
        assert pixels.shape[0] > 600
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, "a blank picture"


def inside(domain: Domain, logits: list[list[float]], labels: list[int] | None = None) -> Inside:
    z = np.array(logits, np.float32)
    given = np.array(labels if labels is not None else [-1] * len(z))
    rng = np.random.default_rng(0)
    return Inside(domain, Seen(rng.normal(size=(len(z), 3)), z, np.full(len(z), np.nan, np.float32), given), {})


def test_marginals_in_closed_form() -> None:
    task = make_task(labels=("a", "b"))
    sure = [[50.0, 0.0]] * 3 + [[0.0, 50.0]]
    one = inside(task.domains[1], sure)
    expected = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(2)
    assert one.marginal_entropy == pytest.approx(expected)
    assert one.largest_class == 0.75
    assert one.class_names() == ["a", "a", "a", "b"]
    assert inside(task.domains[0], sure, [1, 1, 1, 0]).class_names() == ["b", "b", "b", "a"]


def test_a_collapse_is_warned_of_once() -> None:
    task, health = make_task(labels=("a", "b")), Health()
    balanced, collapsed = [[9.0, 0.0], [0.0, 9.0]] * 8, [[9.0, 0.0]] * 16
    health._last = {"photo": inside(task.domains[0], balanced), "sketch": inside(task.domains[1], collapsed)}
    with pytest.warns(UserWarning, match="100% of 'sketch' is predicted as one class"):
        found = health._collapse(task)
    assert found["health/target/largest_class"] == 1.0
    assert found["health/target/marginal_entropy"] < 0.01
    health._last["sketch"] = inside(task.domains[1], balanced)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert health._collapse(task)["health/target/marginal_entropy"] == pytest.approx(1.0, abs=1e-3)


def test_worse_scores_vote_for_negative_transfer() -> None:
    task, health = make_task(labels=("a", "b")), Health()
    balanced = [[9.0, 0.0], [0.0, 9.0]] * 8
    health._last = {
        "photo": inside(task.domains[0], balanced, [0, 1] * 8),
        "sketch": inside(task.domains[1], balanced),
    }
    health._votes = {f"target/val/{name}": name for name in ("infomax", "snd", "reverse")}
    mine = health._compared(task)
    assert set(mine) == {f"health/target/{name}" for name in ("infomax", "snd", "reverse")}, "there is no reference"
    better, worse = ({k: v + by for k, v in mine.items()} for by in (-1, 1))
    mixed = {**better, "health/target/snd": mine["health/target/snd"] + 1}
    for before, share, said in ((better, 0.0, ""), (worse, 1.0, "not by: none"), (mixed, 1 / 3, "by snd")):
        health._before = before
        assert health._compared(task)["health/target/negative_transfer"] == pytest.approx(share)
        assert said in health._verdicts["target"]
        assert bool(health._verdicts["target"]) == bool(share)


def test_unsure_predictions_of_one_class_are_a_collapse() -> None:
    """Probabilities of .34 and twice .33 have an even mean; the class is the same everywhere, and so is the feature."""
    task, health = make_task(), Health()
    health._last = {
        "photo": inside(task.domains[0], [[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]] * 5),
        "sketch": inside(task.domains[1], [[0.03, 0, 0]] * 15),
    }
    health._last["sketch"].seen.features[:] *= 0.01
    with pytest.warns(UserWarning, match="100% of 'sketch'"):
        found = health._collapse(task)
    assert found["health/target/marginal_entropy"] == 0.0
    assert found["health/target/spread"] == pytest.approx(0.01)


def test_a_projection_keeps_clusters_apart(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(40, 6))
    x[20:] += 30
    for by in ("pca", "tsne"):
        points = project(x, by)
        centers = points[:20].mean(0), points[20:].mean(0)
        spread = max(points[:20].std(), points[20:].std())
        assert np.linalg.norm(centers[0] - centers[1]) > 2 * spread, by
    draw_features(tmp_path / "a.png", x, ["a"] * 20 + ["b"] * 20, [f"c{i:02d}" for i in range(40)], ["pca"], "many")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_what_it_needs_is_named_before_training(root: Path) -> None:
    with pytest.raises(ConfigError, match="rows=3 must be at least 10"):
        Health(rows=3)
    with pytest.raises(ConfigError, match="every_n_steps=-1"):
        Health(every_n_steps=-1)
    data = data_of(root, True)
    with pytest.raises(ConfigError, match=r"set data\.source and data\.target"):
        fit(data, {}, extra=(Health(),))
    data = data_of(root, False)
    with pytest.raises(StageError, match="'nowhere' is unknown"):
        fit(data, {}, extra=(Health(stages=["nowhere"]),))
