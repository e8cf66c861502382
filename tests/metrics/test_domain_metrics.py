import itertools
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from torch import Tensor

from crossft.errors import ConfigError, LabelError
from crossft.metrics import confusion, domain_metrics
from crossft.metrics.states import Ranking
from crossft.types import Domain

CLASSES = Domain("photo", "source", labels=("a", "b", "c", "d"))
TAGS = Domain("tags", "target", kind="multilabel", labels=("x", "y", "z"))
SCORE = Domain("stars", "target", kind="regression", labels=("stars",))


def softmax_rows(n: int, k: int = 4, seed: int = 0, ties: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = (torch.randn(n, k, generator=generator) * 2).softmax(1)
    if ties:
        probs = (probs * 5).round() / 5
    return probs, torch.randint(0, k, (n,), generator=generator)


def computed(
    domain: Domain, preds: Tensor, targets: Tensor, cuts: tuple[int, ...] = (), thresholds: int | None = None
) -> dict[str, float]:
    metrics = domain_metrics(domain, thresholds=thresholds)
    for start, stop in itertools.pairwise((0, *cuts, len(preds))):
        metrics.update(preds[start:stop], targets[start:stop])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {name: float(value) for name, value in metrics.compute().items()}


def ece(confidence: np.ndarray, outcome: np.ndarray, bins: int = 15) -> float:
    edges = np.linspace(0, 1, bins + 1)
    total = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - outcome[inside].mean())
    return total


def sk_multiclass(preds: Tensor, targets: Tensor) -> dict[str, float]:
    probs, truth = preds.double().numpy(), targets.numpy()
    guess = probs.argmax(1)
    present = [c for c in range(probs.shape[1]) if (truth == c).any()]
    ranked = [c for c in present if not (truth == c).all()]
    return {
        "accuracy": sk.accuracy_score(truth, guess),
        "balanced_accuracy": np.mean([(guess[truth == c] == c).mean() for c in present]),
        "macro_f1": sk.f1_score(truth, guess, average="macro"),
        "auroc": np.mean([sk.roc_auc_score(truth == c, probs[:, c]) for c in ranked]) if ranked else np.nan,
        "average_precision": np.mean([sk.average_precision_score(truth == c, probs[:, c]) for c in present]),
        "calibration_error": ece(probs.max(1), guess == truth),
    }


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("n", "classes"), [(200, (0, 1, 2, 3)), (60, (0, 2)), (40, (3,)), (5, (0, 1)), (1, (2,))], ids=str
)
def test_multiclass_equals_sklearn(n: int, classes: tuple[int, ...], ties: bool) -> None:
    preds, targets = softmax_rows(n, ties=ties)
    targets = torch.tensor(classes)[targets % len(classes)]  # the other classes are absent from the split
    assert computed(CLASSES, preds, targets, cuts=(n // 3,)) == pytest.approx(
        sk_multiclass(preds, targets), abs=1e-6, nan_ok=True
    )


def test_balanced_accuracy_leaves_out_an_absent_class_that_is_predicted() -> None:
    preds = torch.eye(4)[[0, 0, 1, 3]]
    found = computed(CLASSES, preds, torch.tensor([0, 0, 1, 1]))
    assert found["balanced_accuracy"] == 0.75  # (1 + 1/2) / 2: class 3 does not occur
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)  # as sklearn: predicted, so it counts


@pytest.mark.parametrize("constant", [None, 0, 1])
def test_multilabel_equals_sklearn(constant: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    preds = torch.rand(90, 3, generator=generator)
    targets = (torch.rand(90, 3, generator=generator) < preds * 0.8).long()
    labels = [0, 1, 2]
    if constant is not None:
        targets[:, 1] = constant
        labels = [0, 2]
    probs, truth, guess = preds.double().numpy(), targets.numpy(), (preds > 0.5).long().numpy()
    occurring = labels if constant == 0 else [0, 1, 2]
    expected = {
        "accuracy": (truth == guess).mean(),
        "balanced_accuracy": np.mean([sk.balanced_accuracy_score(truth[:, c], guess[:, c]) for c in labels]),
        "macro_f1": sk.f1_score(truth, guess, average="macro"),
        "auroc": np.mean([sk.roc_auc_score(truth[:, c], probs[:, c]) for c in labels]),
        "average_precision": np.mean([sk.average_precision_score(truth[:, c], probs[:, c]) for c in occurring]),
        "calibration_error": ece(probs.ravel(), truth.ravel()),
    }
    assert computed(TAGS, preds, targets, cuts=(7, 50)) == pytest.approx(expected, abs=1e-6)


def test_a_label_that_neither_occurs_nor_is_predicted_has_no_f1() -> None:
    preds = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.6, 0.1]])
    found = computed(TAGS, preds, torch.tensor([[1, 1, 0], [1, 1, 0]]))
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-4, 0.0), (1.0, 3000.0)])
def test_regression_equals_sklearn(scale: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(2)
    targets = (torch.randn(300, generator=generator) * 4).round() / 4 * scale + shift
    preds = targets + torch.randn(300, generator=generator) * scale * 0.5
    x, y = preds.double().numpy(), targets.double().numpy()
    expected = {
        "mse": sk.mean_squared_error(y, x),
        "mae": sk.mean_absolute_error(y, x),
        "r2": sk.r2_score(y, x),
        "pearson": stats.pearsonr(x, y).statistic,
        "spearman": stats.spearmanr(x, y).statistic,
    }
    assert computed(SCORE, preds, targets, cuts=(3, 3, 200)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_undefined_regression_scores_are_nan_without_warning(n: int) -> None:
    found = computed(SCORE, torch.arange(float(n)), torch.full((n,), 0.1))
    assert {name for name, value in found.items() if np.isnan(value)} == (
        {"r2", "pearson", "spearman"} if n else {*found}
    )
    spread = computed(SCORE, torch.full((5,), 0.1), torch.arange(5.0))
    assert not np.isnan(spread["r2"])
    assert np.isnan([spread["pearson"], spread["spearman"]]).all()


@pytest.mark.parametrize("thresholds", [None, 100])
def test_no_rows_is_nan_without_warning(thresholds: int | None) -> None:
    found = computed(CLASSES, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), thresholds=thresholds)
    assert np.isnan([*found.values()]).all()


def test_a_nan_probability_is_no_ranking() -> None:
    preds, targets = softmax_rows(20)
    preds[3, 2] = float("nan")
    found = computed(CLASSES, preds, targets)
    assert np.isnan([found["auroc"], found["average_precision"]]).all()


def test_binned_ranking_is_exact_on_the_bins_and_close_elsewhere() -> None:
    preds, targets = softmax_rows(500)
    exact, binned = computed(CLASSES, preds, targets), computed(CLASSES, preds, targets, cuts=(100,), thresholds=1000)
    assert binned == pytest.approx(exact, abs=2e-3)
    coarse = (preds * 8).floor() / 8  # scores that lie on 8 bins
    exact, binned = computed(CLASSES, coarse, targets), computed(CLASSES, coarse, targets, thresholds=8)
    assert binned == pytest.approx(exact, abs=1e-6)
    assert computed(CLASSES, preds, targets, thresholds=8)["auroc"] == pytest.approx(exact["auroc"], abs=1e-6)
    states = domain_metrics(CLASSES, thresholds=8)
    states.update(preds, targets)
    assert states["auroc"].preds == []  # constant memory


def test_half_precision_probabilities() -> None:
    preds, targets = softmax_rows(100)
    half = preds.bfloat16()
    assert computed(CLASSES, half, targets) == pytest.approx(computed(CLASSES, half.float(), targets))


def test_confusion_matrices() -> None:
    preds, targets = softmax_rows(50)
    matrix = confusion(CLASSES)
    matrix.update(preds[:20], targets[:20])
    first = matrix.compute()
    matrix.update(preds[20:], targets[20:])
    np.testing.assert_array_equal(matrix.compute(), sk.confusion_matrix(targets, preds.argmax(1), labels=range(4)))
    assert first.sum() == 20  # what was returned does not change afterwards
    tags = confusion(TAGS)
    truth = torch.tensor([[1, 0, 1], [0, 0, 1]])
    tags.update(torch.tensor([[0.9, 0.9, 0.1], [0.1, 0.1, 0.9]]), truth)
    expected = sk.multilabel_confusion_matrix(truth, [[1, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(tags.compute(), expected)


def test_states_are_shared_reset_and_outside_the_state_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[str] = []
    update = Ranking.update
    monkeypatch.setattr(Ranking, "update", lambda self, *rows: (updates.append("x"), update(self, *rows))[1])
    preds, targets = softmax_rows(30)
    metrics = domain_metrics(CLASSES)
    assert [*metrics.compute_groups.values()] == [
        ["accuracy", "balanced_accuracy", "macro_f1"],
        ["auroc", "average_precision"],
        ["calibration_error"],
    ]
    metrics.update(preds[:0], targets[:0])  # an empty first batch must not merge or split groups
    metrics.update(preds, targets)
    assert len(updates) == 2  # auroc and average_precision keep one copy of the rows
    first = metrics.compute()
    metrics.reset()
    metrics.update(preds, targets)
    assert metrics.compute() == first
    assert metrics.state_dict() == {}
    cloned = metrics.clone(prefix="photo/val/")
    assert set(cloned.compute()) == {f"photo/val/{name}" for name in first}


@pytest.mark.parametrize(
    ("domain", "preds", "targets", "message"),
    [
        (CLASSES, torch.rand(5, 3), torch.zeros(5, dtype=torch.int64), r"photo.*\[b, 4\].*got \[5, 3\]"),
        (CLASSES, torch.rand(5, 4), torch.zeros(4, dtype=torch.int64), r"got \[5, 4\] and \[4\]"),
        (CLASSES, torch.rand(5, 4), torch.full((5,), -1), r"photo.*outside 0\.\.3; mask unlabeled"),
        (CLASSES, torch.rand(5, 4), torch.full((5,), 4), r"outside 0\.\.3"),
        (TAGS, torch.rand(5, 3), torch.full((5, 3), 2), r"tags.*outside 0\.\.1"),
        (SCORE, torch.rand(5, 1), torch.rand(5), r"stars.*\[b\].*got \[5, 1\]"),
        (SCORE, torch.rand(2), torch.tensor([1.0, float("nan")]), r"stars.*NaN; mask unlabeled"),
    ],
)
def test_wrong_rows_are_refused(domain: Domain, preds: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        domain_metrics(domain).update(preds, targets)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="thresholds=1"):
        domain_metrics(CLASSES, thresholds=1)
    with pytest.raises(ConfigError, match="no label names"):
        domain_metrics(Domain("photo", "source"))
    with pytest.raises(ConfigError, match="no confusion matrix"):
        confusion(SCORE)
