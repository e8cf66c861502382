"""The frozen-prefix cache: activations that enter the first trainable stage are computed once a sample."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from crossft.backbones import Backbone
from crossft.backbones.batchnorm import set_domains
from crossft.callbacks.caching.constants import Constants, key_of
from crossft.callbacks.caching.cuts import Cut, Value, cuts
from crossft.callbacks.caching.filling import completed, joined, real_rows
from crossft.callbacks.caching.fingerprint import precision, prefix_tensors
from crossft.callbacks.caching.memory import memory_folder
from crossft.callbacks.caching.store import Budget, Store
from crossft.callbacks.caching.trust import VERIFIED, aside, differs, some, tolerance
from crossft.data import DomainData
from crossft.errors import ConfigError
from crossft.runs import prefix_folder
from crossft.tasks import Task
from crossft.types import Batch, Encoded, LateInputs

__all__ = ["PrefixCache"]

MOST_CHANGES = 3
"""Times that a frozen prefix may change its weights before the cache gives up on it."""
MOST_READS = 8
"""Batches whose postponed inputs are read after all before inputs are loaded ahead again."""


class PrefixCache(Callback):
    """Store what the frozen stages make of each sample, and train and evaluate from there.

    Works wherever the first stages of the backbone are frozen (linear probe, last k stages, phases of gradual
    unfreezing): the cut lies before the first stage that trains or whose input a method reads, and moves when a
    stage thaws. Where all stages are frozen and no term has ``needs_tokens``, the pooled features are stored, and
    ``tokens`` of a step are None.

    Training batches are cached where a sample's input is fixed: text, ``data.augment=none``, or ``data.views=n``
    fixed augmentations. Under random augmentation only evaluation is cached. Inputs of stored samples are neither
    decoded nor transformed unless a method reads them. Under the same rule the outputs of teachers (LwF, feature
    distillation, DELTA) are stored, whatever trains.

    A value is found by what it was made of: weights, buffers, modes and settings of the prefix, sample, transform or
    token ids, precision. So later runs and arms with the same prefix read it, and another prefix never does. What is
    measured before training is measured with nothing frozen, and stores nothing; test rows are stored by the first run
    that tests with this prefix. A later run's first epoch still hashes the prefix and verifies a batch. The
    first batch at each cut runs four rows both ways, in training and in evaluation (two, where the batch is stored
    already); where the features differ by more than 1e-4 of the largest (2e-2 under bfloat16) the full path is used
    and a warning says so. Not noticed are weights changed through ``.data`` within an epoch, and files replaced in
    place under ``data.verify=off``.

    Args:
        where: ``disk`` keeps values under ``$CROSSFT_CACHE`` or ``~/.cache/crossft`` (see ``crossft cache ls``);
            ``memory`` in shared memory until the run ends.
        dtype: how values are stored; ``bfloat16`` takes half the room, and weights are no longer equal to 1e-6.
        budget_gb: 10^9 bytes that all stored prefixes may take together; what does not fit is computed each time.

    Raises:
        ConfigError: the budget is not positive, or the run's data or task is not crossft's.
    """

    def __init__(
        self,
        where: Literal["disk", "memory"] = "disk",
        dtype: Literal["float32", "bfloat16"] = "float32",
        budget_gb: float = 10.0,
    ) -> None:
        if budget_gb <= 0:
            raise ConfigError(f"budget_gb={budget_gb} must be above 0; switch the cache off with methods.cache=null")
        self.where, self.dtype, self.budget_gb = where, dtype, budget_gb
        self.name = "cache"
        self.hits = self.misses = 0
        self._data: DomainData | None = None
        self._rows: Any = None
        self._cut: Cut | None = None
        self._store: Store | None = None
        self._state: Any = None
        self._last: Any = None
        self._reads = 0

    @property
    def state_key(self) -> str:
        """Key of the callback's state."""
        return f"PrefixCache[{self.name}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach to the task and to the data."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, Task) or not isinstance(data, DomainData):
            raise ConfigError(f"methods.{self.name} needs a crossft task on crossft.data.DomainData; set it to null")
        if stage == "predict" or pl_module.prefix is self:
            return
        self._told: set[str] = set()
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
            self._tell(f"{type(trainer.strategy).__name__} cuts weights into pieces; nothing is cached")
            return
        root = prefix_folder() if self.where == "disk" else memory_folder(self, trainer)
        self._budget = Budget(root, int(self.budget_gb * 1e9))
        self._stores: dict[str, Store] = {}
        self._keys: dict[Any, tuple[Any, str]] = {}
        self._bad: set[str] = set()
        self._verified: set[tuple[str, bool]] = set()
        self._changes: dict[Any, set[str]] = {}
        self._constants = Constants(self.dtype, self._opened, self._keep, self._tell)
        self._data = data
        self._bind()
        pl_module.prefix = self

    def _bind(self) -> None:
        """Know the rows of the data; they postpone the inputs of those that are stored."""
        assert self._data is not None
        self._rows = rows = self._data.dataset
        sizes = [len(p.ids) for p in self._data.prepared]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        rows.postponed = torch.zeros(1 + (rows.views or 0), len(rows), dtype=torch.uint8).share_memory_()
        self._stores.clear()
        self._state = None
        if rows.views is None:
            self._tell(
                f"data.augment={self._data.augment} makes a new input at each draw, so only evaluation is cached; "
                "set data.augment=none, or data.views to a number of fixed augmentations, to cache training too"
            )

    # One step

    def encode(self, task: Task, batch: Batch, capture: Collection[str]) -> Encoded:
        """Run the backbone on a batch: the stages above the cut on stored values where there are any."""
        if not self._covers(task, batch):
            found: Encoded = task.backbone(batch.inputs, capture=capture)
            return found
        self._watch(batch)
        state = (task.frozen_stages, task.training, task.current_epoch, precision(batch.domains.device))
        try:
            if (*state, self._versions()) != self._state:
                self._look(task, batch)
                self._state = (*state, self._versions())
            encoded = self._encode(task, batch, capture)
        except OSError as error:
            self._drop(f"the cache cannot be used ({error})")
            encoded = None
        return task.backbone(batch.inputs, capture=capture) if encoded is None else encoded

    def encode_constant(self, task: Task, network: Backbone, batch: Batch, capture: Collection[str]) -> Encoded:
        """Run a network that never changes (a teacher): its outputs on a fixed input are computed once."""
        encoded = None
        if self._covers(task, batch):
            try:
                encoded = self._constants.encode(task, network, batch, tuple(capture))
            except OSError as error:
                self._tell(f"outputs of a teacher cannot be kept ({error}); they are computed each time")
        return network(batch.inputs, capture=capture) if encoded is None else encoded

    def _covers(self, task: Task, batch: Batch) -> bool:
        """Whether the batch is one of the data this cache knows, and its inputs are fixed."""
        if not batch.keys and task.training:
            self._tell("a method mixes the inputs of each step anew, so only evaluation is cached")
        if not batch.keys or task.trainer.datamodule is not self._data or self._data is None:  # type: ignore[attr-defined]
            return False
        if self._data.dataset is not self._rows:
            self._bind()
        return self._rows.view_of(batch.keys[0]) is not None

    def _watch(self, batch: Batch) -> None:
        """Postpone no inputs any more where a method reads them in every step: workers load them faster."""
        last, self._last = self._last, batch.inputs
        if isinstance(last, LateInputs) and last.loaded:
            self._reads += 1
            if self._reads == MOST_READS:
                self._rows.postponed.zero_()

    @property
    def _postponed(self) -> Tensor | None:
        postponed: Tensor | None = self._rows.postponed if self._reads < MOST_READS else None
        return postponed

    def _versions(self) -> int:
        """Grows when a weight or buffer of the prefix is written."""
        return 0 if self._cut is None else sum(t._version for t in self._tensors)

    def _encode(self, task: Task, batch: Batch, capture: Collection[str]) -> Encoded | None:
        while self._cut is not None and self._store is not None and self._cut.allows(capture):
            mark = (self._store.folder.name, task.training)
            if mark not in self._verified:
                problem = self._verify(task, batch, capture)
                self._verified.add(mark)
                if problem is not None:
                    self._drop(problem)
                    self._look(task, batch)
                    continue
            return self._run(task, self._cut, self._store, batch, capture)
        return None

    def _run(self, task: Task, cut: Cut, store: Store, batch: Batch, capture: Collection[str]) -> Encoded:
        known = store.known(batch.keys)
        missing = np.flatnonzero(~known)
        self.hits, self.misses = self.hits + len(batch) - len(missing), self.misses + len(missing)
        if len(missing) == len(batch):
            encoded, value = cut.whole(task.backbone, batch, capture)
            self._keep(store, batch, missing, value, self._postponed)
            return encoded
        return cut.rest(task.backbone, self._complete(task, cut, store, batch, known), batch, capture)

    def _complete(self, task: Task, cut: Cut, store: Store, batch: Batch, known: Any, keep: bool = True) -> Value:
        """The value of a batch: what is stored is read, the rest is computed (and stored)."""
        missing = np.flatnonzero(~known)
        if not len(missing):
            return completed(store, batch, known, None)
        value = cut.value(task.backbone, batch, missing.tolist())
        if keep:
            self._keep(store, batch, missing, value, self._postponed)
        return completed(store, batch, known, value)

    def _keep(self, store: Store, batch: Batch, positions: Any, value: Value, postponed: Tensor | None = None) -> None:
        """Store the values of real rows, and mark those of the task's own prefix as ``postponed``."""
        if store.problem is not None:
            return
        store.shape(value.flat, value.mask is not None)
        store.write(batch.keys, *real_rows(batch, positions, value), postponed)
        if store.problem is not None:
            problem = f"nothing more is stored: {store.problem}; what is not stored is computed each time"
            self._tell(problem, everywhere=True)
        if self._budget.exceeded:
            self._tell(
                f"the budget of {self.budget_gb:g} GB is used up under {self._budget.root}: samples that are not "
                f"stored are computed each time. Raise methods.{self.name}.budget_gb, set dtype to bfloat16, or make "
                "room with `crossft cache ls` and `crossft cache rm`",
                everywhere=True,
            )

    # Where the cut is

    def _look(self, task: Task, batch: Batch) -> None:
        """Find the cut and its store for the prefix as it is now."""
        self._cut, self._store = None, None
        attached = task.attachments
        tokens = any(term.needs_tokens for _, term in attached.named_terms)
        found, reason = cuts(task.backbone, task.frozen_stages, attached.needs_stages, tokens)
        for cut in found:
            if any(module.training for stage in cut.below for module in stage.modules):
                reason = "a frozen stage is in training mode"
                continue
            key = self._key(task, cut, batch.domains.device)
            if key in self._bad or not self._may_change(task, cut, key, batch.domains.device):
                reason = "see the warning above"
                continue
            self._cut, self._store = cut, self._opened(key, task, task.backbone, cut)
            self._tensors = [t for tensors in prefix_tensors(cut.below) for t in tensors]
            break
        else:
            self._tell(f"nothing is cached while {reason}", warn=False)
        if self._store is None:
            self._rows.postponed.zero_()
        elif self._postponed is not None:
            self._store.marks(self._postponed)

    def _key(self, task: Task, cut: Cut, device: torch.device) -> str:
        """Hash of the prefix; taken again only where a weight or buffer may have changed."""
        parameters, buffers = prefix_tensors(cut.below)
        bits = [b.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for b in buffers]
        written = (tuple((p.data_ptr(), p._version) for p in parameters), hash(b"".join(bits)), device)
        place = (cut.name, len(cut.below), precision(device))
        former, key = self._keys.get(place, (None, ""))
        if former != written:
            key = key_of(task, task.backbone, cut, device, self.dtype)
            self._keys[place] = (written, key)
        return key

    def _may_change(self, task: Task, cut: Cut, key: str, device: torch.device) -> bool:
        """Whether weights of a frozen prefix are new for a good reason: a store is not made for each evaluation."""
        seen = self._changes.setdefault((frozenset(s.name for s in cut.below), precision(device)), set())
        if key in seen:
            return True
        if seen and not task.training:
            self._tell("weights or statistics of frozen stages are replaced for evaluation, which is computed in full")
            return False
        if len(seen) > MOST_CHANGES:
            self._tell(f"frozen stages have changed {len(seen)} times; they are computed in full from here on")
            return False
        seen.add(key)
        return True

    def _opened(self, key: str, task: Task, network: Backbone, cut: Cut) -> Store:
        if key not in self._stores:
            name = str(getattr(network, "name", type(network).__name__))
            self._stores[key] = Store(
                self._budget.root / key,
                self._rows,
                self._starts,
                [d.name for d in task.domains],
                self.dtype,
                self._budget,
                {"backbone": name, "stage": cut.name, "storage": self.dtype},
            )
            self._tell(f"what enters {cut.name} is stored in {self._stores[key].folder}", warn=False)
        return self._stores[key]

    def _drop(self, reason: str) -> None:
        """Do without the present cut."""
        self._tell(f"{reason}; what it would hold is computed each time", everywhere=True)
        if self._store is not None:
            self._bad.add(self._store.folder.name)
        self._cut, self._store, self._state = None, None, None
        self._rows.postponed.zero_()

    def _tell(self, message: str, warn: bool = True, everywhere: bool = False) -> None:
        """Say it once: in the first process, or in each that it happens to, whose rows or disk are its own."""
        if message in self._told:
            return
        self._told.add(message)
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        if everywhere and rank:
            warnings.warn(f"methods.{self.name} in process {rank}: {message}", stacklevel=2)
        else:
            (rank_zero_warn if warn else rank_zero_info)(f"methods.{self.name}: {message}")

    # Trust

    def _verify(self, task: Task, batch: Batch, capture: Collection[str]) -> str | None:
        """Run some rows of a batch both ways; return what is wrong, or None.

        Values are computed in two halves of these rows, so a value that depends on the rows beside it is found too.
        """
        cut, store = self._cut, self._store
        assert cut is not None
        assert store is not None
        built = store.form is not None and store.known(batch.keys).all()
        few = some(batch, 2 if built else VERIFIED)  # two show whether what another run has built is this prefix's
        halves = [h.tolist() for h in np.array_split(np.arange(len(few)), 2) if len(h)]
        with aside(task.backbone, batch.domains):
            set_domains(task.backbone, few.domains)
            torch.manual_seed(0)
            full = task.backbone(few.inputs, capture=capture)
            values = [] if built else [cut.value(task.backbone, few, rows) for rows in halves]
            if values:
                store.shape(values[0].flat, values[0].mask is not None)
            known = store.known(few.keys)
            if known.any():
                value = self._complete(task, cut, store, few, known, keep=False)
            else:
                value = joined(store, few, values)
            torch.manual_seed(0)
            mine = cut.rest(task.backbone, value, few, capture)
        return differs(full, mine, few, capture, tolerance(batch.domains.device, self.dtype))
