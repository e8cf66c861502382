"""The data module: named domains with roles, mixed batches for training, one loader a domain for evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader

from crossft.data.binding import make_rows, same_spec
from crossft.data.checks import Verify
from crossft.data.collate import Collate
from crossft.data.dataset import InOrder, Item, Rows
from crossft.data.drafts import Options, Splitting
from crossft.data.images import Augment
from crossft.data.inputs import read_inputs
from crossft.data.loader import TrainLoader, eval_loaders, make_loader, place
from crossft.data.memory import Memory, memory_pools
from crossft.data.mix import Balance, leader_of, pools
from crossft.data.prepare import Prepared, first_rows, prepare
from crossft.data.readers import Auto, Reader
from crossft.data.sampler import Order, Pool, StepSampler
from crossft.data.settings import check_settings, names_of_role, requested
from crossft.data.summary import class_counts, describe, fingerprint
from crossft.data.table import Columns
from crossft.errors import ConfigError
from crossft.types import Domain, ImageSpec, Kind, Role, TextSpec

__all__ = ["DomainData"]

CACHE_BYTES = 1 << 30
"""Decoded images kept in memory at most, over all workers of a process."""


class DomainData(pl.LightningDataModule):
    """Named domains under one root, as one mixed `Batch` in training and one loader a domain in evaluation.

    The constructor stores its arguments and checks what needs no file; `prepare` reads, checks and splits; `setup`
    adds what the backbone needs (transforms, tokens); `bind` does so without a trainer.

    Splits are given (a ``split`` column or train/val/test folders), stratified by class, or by group; they depend on
    ``split_seed`` and content alone, and rows of equal content never stand in two splits. ``dev`` and ``validation``
    mean ``val``; a validation or test split that a given split lacks is carved from train, and `describe` says so.
    An unlabeled domain is split without a look at its labels.

    Args:
        root: folder with one folder (``DOMAIN/CLASS/file``, ``DOMAIN/{train,val,test}/CLASS/file``) or one file
            (``DOMAIN.csv``, ``.tsv``, ``.jsonl``, ``.parquet``) a domain.
        source: name or names of the source domains (also ``"a,b"``).
        target: name or names of the target domains.
        eval: name or names of domains that are only measured.
        train_on: role or roles whose rows train; methods add roles through `include`.
        source_labels: ``none`` drops the labels of the source's train and validation splits.
        target_labels: ``none`` drops the labels of the target's train and validation splits.
        shots: labels per class of each target's train split; the other rows count as unlabeled. Default: all.
        fraction: share of each class of each target's train split that keeps its label. Default: all.
        validation_from_labels: with ``shots`` or ``fraction``, move a share of the label budget to the validation
            split, as large as its part in ``splits``; otherwise that split has no labels then.
        mix: share of each role or domain in a batch. Default: equal for each role, within a role by size.
        batch_size: rows of a micro-batch of one process, all domains together.
        eval_batch_size: rows of an evaluation batch. Default: twice ``batch_size``.
        sampler: ``class`` draws the classes of a domain evenly, ``domain`` gives every domain an equal share.
        epoch: which domain's pass makes an epoch: the one that needs ``longest`` or ``shortest``, or a name.
        split: ``given``, ``stratified``, ``random`` (as unlabeled domains under ``stratified``) or ``group``; ``auto``
            takes the first that the data offers (given, then group where ``group`` is set, then stratified).
        splits: shares of train, validation and test where they are not given; they add up to 1.
        group: column whose equal values stay in one split.
        split_seed: seed of splits, shots and fractions. Not the run's seed.
        seed: seed of order and augmentation.
        limit: at most so many rows of each domain (the first by sample id), for quick runs.
        verify: which files are read before training: all (``full``), those that ``changed`` since they were last
            read, or none (``off``).
        on_error: ``raise`` on the first bad row, or ``quarantine`` bad rows: drop and list them.
        max_bad: largest share of a domain's rows that may be quarantined.
        reader: a `Reader` for any other layout. Default: detected.
        kind: kind of the labels. ``auto``: lists and ``a|b`` are multilabel, many distinct non-integers regression.
        labels: label names in index order, for all domains. Default: those found, sorted (numbers by value).
        text_column: column of the text. Default: detected, as all columns.
        pair_column: column of the second text of a pair.
        label_column: column of the label.
        image_column: column of the image path, relative to its file.
        split_column: column of the split.
        id_column: column that names rows in messages.
        augment: image augmentation: ``none``, ``light`` (random crop of 80 to 100 %), ``flip`` (and a horizontal
            flip), ``randaugment``, ``trivialaugment`` of torchvision v2, ``timm``'s RandAugment (each after ``flip``).
        views: fixed augmentations of each image, drawn in turn. Default: a new one each time.
        image_size: height and width of images. Default: the backbone's.
        max_length: most tokens of a text. Default: the backbone's.
        length_window: optimizer steps whose texts are sorted by length together; 0 keeps the plain order.
        cache_images: keep images in memory, up to 1 GiB a process: decoded, or ready if nothing augments and all fit.
        inputs: files or folders to predict: images, or tables with the same columns. No other command reads it.
        num_workers: processes that load data; batches do not depend on it.

    Attributes:
        quarantined: the rows dropped so far: domain, where, reason.
        memories: rows rehearsed beside the mix, by the method that asks for them.

    Raises:
        ConfigError: an argument that cannot work.

    Example:
        >>> data = DomainData("pacs", source="photo", target="sketch", shots=10)  # doctest: +SKIP
        >>> data.prepare()  # doctest: +SKIP
    """

    def __init__(
        self,
        root: str | Path,
        source: str | list[str] | None = None,
        target: str | list[str] | None = None,
        eval: str | list[str] | None = None,
        *,
        train_on: Role | list[Role] = "target",
        source_labels: Literal["all", "none"] = "all",
        target_labels: Literal["all", "none"] = "all",
        shots: int | None = None,
        fraction: float | None = None,
        validation_from_labels: bool = False,
        mix: dict[str, float] | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        sampler: Balance = "none",
        epoch: str = "longest",
        split: Splitting = "auto",
        splits: tuple[float, float, float] = (0.7, 0.1, 0.2),
        group: str | None = None,
        split_seed: int = 0,
        seed: int = 0,
        limit: int | None = None,
        verify: Verify = "changed",
        on_error: Literal["raise", "quarantine"] = "raise",
        max_bad: float = 0.01,
        reader: Reader | None = None,
        kind: Kind | Literal["auto"] = "auto",
        labels: list[str | int] | None = None,
        text_column: str | None = None,
        pair_column: str | None = None,
        label_column: str | None = None,
        image_column: str | None = None,
        split_column: str | None = None,
        id_column: str | None = None,
        augment: Augment = "light",
        views: int | None = None,
        image_size: int | None = None,
        max_length: int | None = None,
        length_window: int = 32,
        cache_images: bool = True,
        inputs: str | list[str] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.roles: dict[Role, list[str]] = names_of_role(source, target, eval)
        self.train_on: list[Role] = [train_on] if isinstance(train_on, str) else list(train_on)
        self.source_labels, self.target_labels = source_labels, target_labels
        self.shots, self.fraction, self.validation_from_labels = shots, fraction, validation_from_labels
        self.mix, self.sampler, self.epoch = mix, sampler, epoch
        self.batch_size = batch_size
        self.eval_batch_size = 2 * batch_size if eval_batch_size is None else eval_batch_size
        self.split, self.splits, self.split_seed, self.seed, self.limit = split, splits, split_seed, seed, limit
        self.verify, self.on_error, self.max_bad = verify, on_error, max_bad
        self.reader, self.kind, self.labels = reader, kind, labels
        self.columns = Columns(text_column, pair_column, label_column, image_column, split_column, id_column, group)
        self.augment, self.views, self.image_size, self.max_length = augment, views, image_size, max_length
        self.length_window, self.cache_images, self.num_workers = length_window, cache_images, num_workers
        self.quarantined: list[dict[str, str]] = []
        self._prepared: tuple[Prepared, ...] = ()
        self._included: dict[Role, set[bool]] = {}
        self.memories: dict[str, Memory] = {}
        self._manifest: dict[str, Any] = {}
        self._known: dict[str, Domain] = {}  # of an earlier leg, by name
        self._dataset: Rows | None = None
        self._spec: ImageSpec | TextSpec | None = None
        self.inputs, self._next_step = inputs, 0
        self._predicted: Prepared | None = None
        self._train_sampler: StepSampler | None = None
        check_settings(self)

    # Reading: before any trainer, without a backbone

    def prepare(self) -> None:
        """Read, check and split all domains; does nothing the second time.

        Raises:
            DataError, LabelError, SplitError, ConfigError: what is wrong with which file, row or setting.
        """
        if self._prepared:
            return
        reader = self.reader or Auto()
        unlabeled = {"source": self.source_labels == "none", "target": self.target_labels == "none"}
        requests = requested(reader, self.root, self.roles, unlabeled)
        self._prepared, bad = prepare(requests, self._options(reader))
        self.quarantined += bad

    def _options(self, reader: Reader) -> Options:
        labels = None if self.labels is None else tuple(str(n) for n in self.labels)
        return Options(
            self.root, reader, self.columns, self.kind, labels, self.split, self.splits, self.split_seed, self.shots,
            self.fraction, self.validation_from_labels, self.verify, self.on_error, self.max_bad, self.limit,
            self._manifest, self._known,
        )  # fmt: skip

    @property
    def domains(self) -> tuple[Domain, ...]:
        """The domains in the order of their ids: sources, targets, evals."""
        self.prepare()
        return tuple(p.domain for p in self._prepared)

    @property
    def prepared(self) -> tuple[Prepared, ...]:
        """Rows, splits and targets of each domain."""
        self.prepare()
        return self._prepared

    @property
    def fingerprint(self) -> str:
        """Hash (16 hex digits) over label spaces, sample ids, splits and labels (of unlabeled domains: none)."""
        return fingerprint(self.prepared)

    def split_manifest(self) -> dict[str, dict[str, list[int]]]:
        """Domain -> split (or ``dropped``) -> sample ids, as plain values."""
        return {p.domain.name: p.manifest() for p in self.prepared}

    def use_manifest(self, manifest: Mapping[str, Mapping[str, Sequence[int]]], known: Sequence[Domain] = ()) -> None:
        """Take an earlier leg's splits, and label spaces; `prepare` raises where the data does not fit them.

        Raises:
            ConfigError: `prepare` was called already.
        """
        if self._prepared:
            raise ConfigError("use_manifest comes too late: the splits are made; call it before prepare()")
        self._manifest = {name: dict(splits) for name, splits in manifest.items()}
        self._known = {d.name: d for d in known}

    def describe(self) -> list[dict[str, Any]]:
        """One row a domain, for printing (see `crossft.data.summary.describe`)."""
        return describe(self.prepared)

    def eval_domains(self, split: Literal["val", "test"]) -> list[str]:
        """Names of the domains that have rows in a split, in the order of that split's loaders."""
        return [p.domain.name for p in self.prepared if len(p.rows(split))]

    # Mixing

    def include(self, role: Role, labels: bool = True) -> None:
        """Ask for rows of a role in the training mix, as a method that needs them does.

        Args:
            role: ``source`` or ``target``.
            labels: take its labeled rows, and let their labels train. False takes all rows without a look at labels:
                where the role trains anyway, only those that ``shots`` or ``fraction`` left without a label are new.

        Raises:
            ConfigError: the run has no such domain.
        """
        if role == "eval" or not self.roles[role]:
            raise ConfigError(
                f"a method needs {role} rows, and the run has no domain that trains as {role}; set data.{role}"
            )
        self._included.setdefault(role, set()).add(labels)

    @property
    def training_domains(self) -> tuple[str, ...]:
        """Names of the domains whose labels train."""
        return tuple(dict.fromkeys(self.domains[p.domain].name for p in self.pools() if p.labeled))

    def pools(self) -> tuple[Pool, ...]:
        """What the training mix draws from, with the rows per micro-batch of each.

        Raises:
            ConfigError: the mix cannot be made (see `crossft.data.mix.pools`).
        """
        roles = {*self.train_on, *(r for r, asked in self._included.items() if True in asked)}
        extra = {r for r, asked in self._included.items() if False in asked}
        tokens = None if self._spec is None else self.dataset.tokens
        lengths = tokens.lengths if tokens is not None and self.length_window else None
        kept, rest = memory_pools(self.memories, self.prepared, self.batch_size, lengths)
        return (*pools(self.prepared, roles, extra, self.mix, self.sampler, rest, lengths), *kept)

    def order(self) -> Order:
        """The order of the training rows for the trainer's processes and accumulation (1 and 1 without a trainer)."""
        world = 1 if self.trainer is None else self.trainer.world_size
        accumulation = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        mixed = self.pools()
        epoch = leader_of(self.epoch, self.domains, mixed)
        return Order(mixed, len(self.domains), world, accumulation, self.seed, self.length_window or 1, epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.order().steps_per_epoch

    def class_counts(self, domain: str | None = None) -> list[int]:
        """Labeled training rows of each class (positives of each label where multilabel), by default of the mix."""
        names = self.training_domains if domain is None else (domain,)
        return class_counts([p for p in self.prepared if p.domain.name in names])

    def label_moments(self) -> tuple[float, float]:
        """Mean and standard deviation (population) of the labeled training rows' values in the mix."""
        names = self.training_domains
        values = np.concatenate([p.known("train") for p in self.prepared if p.domain.name in names])
        return float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))

    # Loading: needs the backbone's preprocessing

    def setup(self, stage: str) -> None:
        """Lightning's hook: `bind` to the preprocessing of the trainer's backbone, and make the dataset once."""
        model: Any = None if self.trainer is None else self.trainer.lightning_module
        if model is not None:
            self.bind(model.backbone.input_spec)
        if stage != "predict":
            self.dataset  # noqa: B018

    def bind(self, spec: ImageSpec | TextSpec) -> None:
        """Say what the backbone takes, as `setup` does where there is a trainer; the same again changes nothing."""
        if self._spec is None or not same_spec(spec, self._spec):
            self._spec, self._dataset = spec, None

    @property
    def dataset(self) -> Rows:
        """All rows, keyed by the samplers; texts are tokenized when it is first asked for.

        Raises:
            ConfigError: neither `setup` nor `bind` was called, or the backbone takes another kind of input.
        """
        if self._dataset is None:
            self._dataset = self._rows(self.prepared)
        return self._dataset

    def _rows(self, parts: Sequence[Prepared]) -> Rows:
        if self._spec is None:
            raise ConfigError("the data lacks the backbone's preprocessing; call bind(backbone.input_spec) first")
        return make_rows(
            parts, self._spec, seed=self.seed, augment=self.augment, views=self.views, image_size=self.image_size,
            max_length=self.max_length, cache_bytes=CACHE_BYTES // max(1, self.num_workers) if self.cache_images else 0,
        )  # fmt: skip

    def train_dataloader(self) -> DataLoader[Item]:
        """Micro-batches of this process, from the trainer's step to the end of its epoch."""
        rank, _ = place(self.trainer)
        trainer = self.trainer
        clock = None if trainer is None else (lambda: int(trainer.global_step))
        self._train_sampler = StepSampler(self.order(), rank, clock)
        self._train_sampler.next_step = self._next_step
        return make_loader(
            TrainLoader, self.dataset, self._train_sampler, Collate(self.dataset.tokens), self.num_workers
        )

    def val_dataloader(self) -> list[DataLoader[Item]]:
        """One loader a domain, in the order of ``eval_domains("val")``."""
        return self._eval_loaders("val")

    def test_dataloader(self) -> list[DataLoader[Item]]:
        """One loader a domain, in the order of ``eval_domains("test")``."""
        return self._eval_loaders("test")

    def _eval_loaders(self, split: str) -> list[DataLoader[Item]]:
        rank, world = place(self.trainer)
        starts = first_rows(self.prepared)
        rows = [(number, start + p.rows(split)) for number, (p, start) in enumerate(zip(self.prepared, starts))]
        return eval_loaders(self.dataset, rows, self.eval_batch_size, self.num_workers, rank, world)

    def predict_dataloader(self) -> DataLoader[Item]:
        """One loader over ``inputs``, in their order.

        Raises:
            ConfigError: ``inputs`` is not set.
        """
        rows = self._rows([self.predicted])
        return DataLoader(InOrder(rows), batch_size=self.eval_batch_size, collate_fn=Collate(rows.tokens, False))

    @property
    def predicted(self) -> Prepared:
        """The rows of ``inputs``; ``predicted.where`` names them in order.

        Raises:
            ConfigError: ``inputs`` is not set.
        """
        if self.inputs is None:
            raise ConfigError("nothing to predict: set data.inputs to image files, folders of images, or tables")
        if self._predicted is None:
            self._predicted = read_inputs([self.inputs] if isinstance(self.inputs, str) else self.inputs, self.columns)
        return self._predicted

    # Position

    def state_dict(self) -> dict[str, int]:
        """The next optimizer step; the order of everything after it is computed."""
        if self.trainer is not None:
            return {"step": int(self.trainer.global_step)}
        return {"step": self._next_step if self._train_sampler is None else self._train_sampler.next_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a step."""
        self._next_step = int(state_dict["step"])
        if self._train_sampler is not None:
            self._train_sampler.next_step = self._next_step
