"""Label-free scores as validation metrics: their numbers, who may follow them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from adaptation_cases import data_of, fit
from lightning.pytorch.callbacks import EarlyStopping
from tiny import flat, image_domains

from crossft.callbacks.monitoring import Scores
from crossft.callbacks.monitoring.scores import SCORES
from crossft.data.passes import one_pass
from crossft.data.prepare import first_rows
from crossft.errors import ConfigError
from crossft.functional.selection import information_maximization, mean_entropy, soft_neighborhood_density
from crossft.metrics.probes import domain_probabilities, reverse_validation

VALIDATES = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
SPLITS = {"splits": (0.4, 0.4, 0.2)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_domains(tmp_path_factory.mktemp("images"), domains=("photo", "sketch", "art"), each=24, signal=10)


@pytest.fixture(scope="module")
def scored(root: Path):
    """A run whose scores were logged, its trainer, task and data."""
    data = data_of(root, False, **SPLITS)
    trainer, task = fit(data, {}, extra=(Scores(),), **VALIDATES)
    return trainer, task, data


def rows_of(task, data, number: int) -> dict[str, np.ndarray]:
    """Features, logits and targets of a domain's validation rows, by a pass of its own, by sample id."""
    start, prepared = first_rows(data.prepared)[number], data.prepared[number]
    steps = []
    with torch.no_grad():
        for batch in one_pass(data, {number: start + prepared.rows("val")}):
            steps.append(task.eval().model_step(batch))
    order = np.argsort(np.concatenate([s.batch.sample_ids for s in steps]))
    columns = {"features": [s.features for s in steps], "logits": [s.logits["photo"] for s in steps]}
    columns["targets"] = [s.batch.targets for s in steps]
    return {k: torch.cat(v).numpy()[order] for k, v in columns.items()}


def test_scores_are_those_of_the_models_predictions(scored) -> None:
    trainer, task, data = scored
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("target/val/")}
    assert set(logged) == {f"target/val/{name}" for name in SCORES}, "an unlabeled target has no other metric"
    source, target = rows_of(task, data, 0), rows_of(task, data, 1)
    assert (target["targets"] == -1).all()
    logits = torch.from_numpy(target["logits"]).double()
    for name, function in (
        ("entropy", mean_entropy), ("infomax", information_maximization), ("snd", soft_neighborhood_density)
    ):  # fmt: skip
        assert logged[f"target/val/{name}"] == pytest.approx(float(function(logits)), rel=1e-4), name
    p = np.exp(target["logits"]) / np.exp(target["logits"]).sum(1, keepdims=True)
    assert logged["target/val/bnm"] == pytest.approx(np.linalg.norm(p, "nuc") / len(p), rel=1e-4)
    odds, _ = domain_probabilities(source["features"], target["features"])
    odds = odds.clip(1e-6, 1 - 1e-6)
    weights = len(source["logits"]) / len(target["logits"]) * odds / (1 - odds)
    errors = (source["logits"].argmax(1) != source["targets"]).astype(float)
    weighted = weights * errors
    assert logged["target/val/iwcv"] == pytest.approx(weighted.mean(), rel=1e-3, abs=1e-6)
    eta = -np.cov(weighted, weights)[0, 1] / weights.var(ddof=1)
    corrected = weighted.mean() + eta * weights.mean() - eta
    assert logged["target/val/dev"] == pytest.approx(corrected, rel=1e-3, abs=1e-6)
    assert abs(corrected - weighted.mean()) > 1e-3
    reverse = reverse_validation(target["features"], target["logits"].argmax(1), source["features"], source["targets"])
    assert logged["target/val/reverse"] == pytest.approx(reverse)


def test_scores_change_no_weight(root: Path, scored) -> None:
    plain = fit(data_of(root, False, **SPLITS), {}, **VALIDATES)[1]
    assert torch.equal(flat(plain), flat(scored[1]))


def test_early_stopping_follows_a_score(root: Path) -> None:
    """Patience 0 on a threshold that is out of reach stops at the second validation."""
    stop = EarlyStopping("target/val/infomax", mode="max", patience=1, min_delta=9.0)
    trainer, _ = fit(data_of(root, False, **SPLITS), {}, extra=(Scores(["infomax"]), stop), max_steps=40, **VALIDATES)
    assert trainer.global_step == 4
    assert "target/val/snd" not in trainer.callback_metrics


def test_what_cannot_be_had_is_named_before_training(root: Path) -> None:
    with pytest.raises(ConfigError, match="'entropi' is unknown; allowed: entropy"):
        Scores(["entropi"])
    with pytest.raises(ConfigError, match="limit=3"):
        Scores(limit=3)
    unlabeled = data_of(root, False, source_labels="none", train_on="target", target_labels="all", **SPLITS)
    with pytest.raises(ConfigError, match="'dev' cannot be had here; allowed: entropy, infomax, snd, bnm"):
        fit(unlabeled, {}, extra=(Scores(["dev"]),))
    with pytest.raises(ConfigError, match="need a target with a validation split"):
        fit(data_of(root, True), {}, extra=(Scores(),))
