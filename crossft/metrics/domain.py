"""The metrics of one domain, by the kind of its labels."""

from __future__ import annotations

from torchmetrics import Metric, MetricCollection

from crossft.errors import ConfigError
from crossft.metrics import scores
from crossft.metrics.states import Calibration, Confusion, Ranking, Regression
from crossft.types import Domain

__all__ = ["confusion", "domain_metrics"]


def domain_metrics(domain: Domain, *, thresholds: int | None = None, sync: bool = True) -> MetricCollection:
    """The scalar metrics of a domain, under unprefixed names.

    ``update(preds, targets)`` wants only rows that count: the caller masks padding and unlabeled rows; a batch of no
    rows is fine. ``compute()`` joins all processes, and is where the cost lies: nothing is computed in ``update``.
    A score that is undefined is NaN, without a warning, and becomes null in ``summary.json``.

    ==================  ================================================  ==============================================
    name                multiclass: softmax [b, k], targets [b]           multilabel: sigmoid [b, k], targets [b, k]
    ==================  ================================================  ==============================================
    accuracy            share of right rows                               share of right label decisions, at 0.5
    balanced_accuracy   mean recall over the classes that occur           mean of (recall + specificity) / 2 over labels
                                                                          that occur with both values
    macro_f1            mean over classes that occur or are predicted     the same over labels
    auroc               mean of one-vs-rest over classes that occur and   mean over labels that occur with both values
                        are not alone
    average_precision   mean of one-vs-rest over classes that occur       mean over labels that occur
    calibration_error   15 bins of the highest probability, l1            15 bins of all probabilities, l1
    ==================  ================================================  ==============================================

    Binary labels are multiclass with two names, so their macro scores average over both classes.
    Regression, [b] and [b]: mse, mae, r2, pearson, spearman; the last three are NaN for constant targets.

    Args:
        domain: its kind and label names decide; its name stands in errors.
        thresholds: None keeps all probabilities for ``auroc`` and ``average_precision``, which is exact and takes
            4 k bytes a row; a number (say 1000) bins them, in constant memory.
        sync: join all processes in ``compute()``; False computes from this process's rows alone.

    Raises:
        ConfigError: the domain has no labels, or ``thresholds`` is below 2.

    Example:
        >>> import torch
        >>> metrics = domain_metrics(Domain("photo", "source", labels=("cat", "dog")))
        >>> metrics.update(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
        >>> metrics.compute()["accuracy"]
        tensor(0.5000)
    """
    own = {"sync_on_compute": sync}
    if domain.kind == "regression":
        values = ("mse", "mae", "r2", "pearson", "spearman")
        of_values: dict[str, Metric | MetricCollection] = {
            n: Regression(domain, getattr(scores, n), **own) for n in values
        }
        return MetricCollection(of_values, compute_groups=[[*values]])
    _need_labels(domain)
    prefix = "multilabel_" if domain.kind == "multilabel" else ""
    names = ("accuracy", "balanced_accuracy", "macro_f1")
    decided = {n: Confusion(domain, getattr(scores, prefix + n), **own) for n in names}
    ranked = {n: Ranking(domain, getattr(scores, n), thresholds, **own) for n in ("auroc", "average_precision")}
    metrics: dict[str, Metric | MetricCollection] = {
        **decided,
        **ranked,
        "calibration_error": Calibration(domain, scores.calibration_error, **own),
    }
    return MetricCollection(metrics, compute_groups=[[*decided], [*ranked], ["calibration_error"]])


def confusion(domain: Domain) -> Metric:
    """The confusion matrix of a domain, kept out of the scalar logs.

    ``update`` as for ``domain_metrics``; ``compute()`` is [k, k] int64 with the truth in rows (multiclass) or
    [k, 2, 2] as [label, truth, prediction] (multilabel).

    Raises:
        ConfigError: a regression domain, or one without labels.
    """
    if domain.kind == "regression":
        raise ConfigError(f"domain {domain.name!r} is a regression: it has no confusion matrix; use domain_metrics")
    _need_labels(domain)
    return Confusion(domain)


def _need_labels(domain: Domain) -> None:
    if not domain.labels:
        raise ConfigError(f"domain {domain.name!r} has no label names (labels=()); resolve them from the data first")
