"""Networks that never change, teachers: what they make of a sample is computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from crossft.backbones import Backbone
from crossft.backbones.batchnorm import set_domains
from crossft.callbacks.caching.cuts import Cut, Value, values
from crossft.callbacks.caching.filling import completed, joined
from crossft.callbacks.caching.fingerprint import precision, prefix_key
from crossft.callbacks.caching.store import Store
from crossft.callbacks.caching.trust import VERIFIED, aside, differs, some, tolerance
from crossft.tasks import Task
from crossft.types import Batch, Encoded

__all__ = ["Constants", "key_of"]

OUTPUT = "output"
"""Name of what comes out of the last stage, before pooling."""


def key_of(task: Task, network: Backbone, cut: Cut, device: torch.device, storage: str) -> str:
    """Hash of what a network holds below a cut."""
    domains = tuple(d.name for d in task.domains) if task.batchnorm == "per_domain" else ()
    return prefix_key(network, cut.below, device, cut.name, storage, domains)


@dataclass
class _Network:
    """A constant network: its weights' version, the keys of its outputs, the sets of them that were verified."""

    version: int
    keys: dict[Any, str] = field(default_factory=dict)
    cuts: dict[tuple[str, ...], list[Cut]] = field(default_factory=dict)
    verified: set[Any] = field(default_factory=set)
    refused: bool = False


class Constants:
    """Pooled features and stage outputs of constant networks, in stores of the prefix cache.

    A network with the weights of a frozen prefix shares its stores. The first batch runs four rows both ways, as for
    the prefix itself.

    Args:
        dtype: how values are stored.
        opened: opens the store of a key, for a network and a cut.
        keep: stores values of some rows of a batch.
        tell: warns, once for each message.
    """

    def __init__(
        self,
        dtype: str,
        opened: Callable[[str, Task, Backbone, Cut], Store],
        keep: Callable[[Store, Batch, object, Value], None],
        tell: Callable[[str], None],
    ) -> None:
        self._dtype, self._opened, self._keep, self._tell = dtype, opened, keep, tell
        self._networks: WeakKeyDictionary[Backbone, _Network] = WeakKeyDictionary()

    def encode(self, task: Task, network: Backbone, batch: Batch, capture: tuple[str, ...]) -> Encoded | None:
        """Features and captured outputs of the batch, tokens left out; None where the network has to run."""
        mine = self._known(network)
        if mine.refused:
            return None
        if capture not in mine.cuts:
            mine.cuts[capture] = _outputs(network, capture)
        cuts = mine.cuts[capture]
        stores = [self._store(mine, task, network, cut, batch.domains.device) for cut in cuts]
        mark = (capture, precision(batch.domains.device))
        if mark not in mine.verified:
            problem = self._verify(network, cuts, stores, batch, capture)
            mine.verified.add(mark)
            if problem is not None:
                mine.refused = True
                self._tell(f"outputs of a teacher: {problem}; they are computed each time")
                return None
        return self._read(network, cuts, stores, batch, keep=True)

    def _known(self, network: Backbone) -> _Network:
        version = sum(p._version for p in network.parameters())
        mine = self._networks.setdefault(network, _Network(version))
        if mine.version != version:
            if mine.verified and not mine.refused:
                mine.refused = True
                self._tell("a teacher has changed its weights; its outputs are computed each time")
            mine.version = version
            mine.keys.clear()
        return mine

    def _store(self, mine: _Network, task: Task, network: Backbone, cut: Cut, device: torch.device) -> Store:
        place = (cut.name, precision(device))
        if place not in mine.keys:
            mine.keys[place] = key_of(task, network, cut, device, self._dtype)
        return self._opened(mine.keys[place], task, network, cut)

    def _read(
        self, network: Backbone, cuts: Sequence[Cut], stores: Sequence[Store], batch: Batch, keep: bool
    ) -> Encoded:
        known = np.logical_and.reduce([store.known(batch.keys) for store in stores])
        missing = np.flatnonzero(~known)
        fresh: Sequence[Value | None] = [None] * len(cuts)
        if len(missing):
            fresh = values(cuts, network, batch, missing.tolist())
        found = []
        for store, value in zip(stores, fresh, strict=True):
            if keep and value is not None:
                self._keep(store, batch, missing, value)
            found.append(completed(store, batch, known, value))
        return _encoded(cuts, found)

    def _verify(
        self,
        network: Backbone,
        cuts: Sequence[Cut],
        stores: Sequence[Store],
        batch: Batch,
        capture: tuple[str, ...],
    ) -> str | None:
        """Run some rows of a batch both ways, the stored or separate one in two halves; say what is wrong, or None."""
        few = some(batch, VERIFIED)
        halves = [h.tolist() for h in np.array_split(np.arange(len(few)), 2) if len(h)]
        with aside(network, batch.domains):
            set_domains(network, few.domains)
            full = network(few.inputs, capture=capture)
            parts = [values(cuts, network, few, rows) for rows in halves]
            for store, value in zip(stores, parts[0], strict=True):
                store.shape(value.flat, value.mask is not None)
            if any(store.known(few.keys).any() for store in stores):
                mine = self._read(network, cuts, stores, few, keep=False)
            else:
                whole = [joined(store, few, part) for store, part in zip(stores, zip(*parts), strict=True)]
                mine = _encoded(cuts, whole)
        return differs(full, mine, few, capture, tolerance(batch.domains.device, self._dtype))


def _outputs(network: Backbone, capture: Sequence[str]) -> list[Cut]:
    """Where the pooled features and the outputs of these stages are taken; the pooled features come first."""
    stages = network.stages
    names = [*(stage.name for stage in stages[1:]), OUTPUT]
    after = {stage.name: Cut(stages[: i + 1], names[i]) for i, stage in enumerate(stages)}
    return [Cut(stages, None), *(after[name] for name in capture)]


def _encoded(cuts: Sequence[Cut], found: Sequence[Value]) -> Encoded:
    pairs = zip(cuts[1:], found[1:], strict=True)
    return Encoded(found[0].flat, stages={cut.below[-1].name: value.padded() for cut, value in pairs})
