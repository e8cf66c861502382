"""What can be said of a config before anything is trained: without a network, weights, or a look at images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer

from crossft.backbones import Timm, Transformer
from crossft.callbacks.adaptation.features import layer_of
from crossft.callbacks.freezing import DomainGap, Freeze, GradualUnfreezing
from crossft.callbacks.freezing.course import check_lengths
from crossft.cli.leg import build_methods, build_trainer, refuse_other_sharding
from crossft.cli.parser import Settings
from crossft.cli.selection import checked_metric, validation_metrics
from crossft.data import DomainData
from crossft.data.readers import TABLE_SUFFIXES, Auto, ImageFolder, TableFile
from crossft.data.settings import requested
from crossft.errors import BackboneError, ConfigError, CrossftError
from crossft.metrics import domain_metrics
from crossft.runs import config_hash
from crossft.tasks import Task
from crossft.tasks.evaluation import display_names
from crossft.types import Domain, Kind

__all__ = ["DryRun", "Foreseen"]

_CHEAP = 16 << 20
"""Bytes of a table that is read for its labels and splits."""
_MANY = 1000
"""Stands for a number of rows that is not known."""
_OURS = ("crossft.", "lightning.")
_UNTRAINED = ("seed", "batch_size", "eval_batch_size", "num_workers", "cache_images", "augment", "views", "mix",
              "sampler", "epoch", "train_on", "image_size", "max_length", "length_window", "inputs")  # fmt: skip
"""Settings of the data that change neither splits nor labels."""

T = TypeVar("T")


@dataclass(frozen=True)
class Foreseen:
    """A run's domains, as far as they can be known.

    Attributes:
        domains: with their label spaces, or with two labels of the task's kind that stand for them.
        rows: as `DomainData.describe` gives them; numbers that are not known are large.
        kind_known: False where the domains' kind may be another.
    """

    domains: tuple[Domain, ...]
    rows: tuple[Mapping[str, Any], ...]
    kind_known: bool = True


class DryRun:
    """Checks configs one after the other; what several of them share is built once.

    The Trainer is built, which starts no process. Domains are listed; tables of text are read and split. The model is
    built without weights, on no device where its classes allow that. So stages and metrics are known by name.
    """

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def check(self, settings: Settings, plain: Mapping[str, Any]) -> list[str] | None:
        """Refuse what would fail when the run starts, as far as that can be known here.

        Args:
            settings: a parsed config; it is of no use afterwards.
            plain: its plain values.

        Returns:
            The test and validation metrics of the run, or None where classes from elsewhere may log others.

        Raises:
            CrossftError: as the run itself would.
        """
        config = settings.config
        data: DomainData = settings.build("data").data
        trainer = self._once("trainer", plain["trainer"], lambda: _trainer(settings))
        seen = self._domains(data, plain["data"]) or _stand_ins(data, config)
        task = self._task(settings, plain["model"], seen, data.root.is_dir())
        methods = build_methods(settings)
        callbacks: list[Any] = [*trainer.callbacks, *methods]  # type: ignore[attr-defined]
        if task is not None:
            for method in methods:
                _check_stages(method, task)
            _check_choices(methods, task, config.trainer)
            callbacks.append(task.schedule)
        if not seen.kind_known:
            return None
        whole = seen  # a sequence is measured on all its domains in the end, and validated leg by leg
        if config.get("sequence"):
            seen = _first_leg(seen)
        checked_metric("select", config.select.metric, seen.domains, seen.rows)
        checked_metric("trial.metric", config.trial.metric, seen.domains, seen.rows)
        if not str(config.model.class_path).startswith(_OURS):
            return None
        if not all(type(c).__module__.startswith(_OURS) for c in (task, *callbacks) if c is not None):
            return None
        known = validation_metrics(seen.domains, seen.rows)
        for callback in callbacks:
            _check_monitor(callback, known, callbacks)
        names = display_names(whole.domains)
        tests = [
            f"{names[d.name]}/test/{m}" for d in whole.domains for m in ("loss", *domain_metrics(d, sync=False).keys())
        ]
        return [*known, *tests]

    def _once(self, what: str, part: Any, find: Callable[[], T]) -> T:
        """What ``find`` gives or raises, found once for each ``part`` of a config."""
        key = f"{what} {config_hash({what: part}, set())}"
        if key not in self._found:
            try:
                self._found[key] = find()
            except CrossftError as error:
                self._found[key] = error
        found = self._found[key]
        if isinstance(found, CrossftError):
            raise found
        return found  # type: ignore[no-any-return]

    def _domains(self, data: DomainData, plain: Mapping[str, Any]) -> Foreseen | None:
        """The domains as they are, where that is cheap: tables of text; of others only that they are there."""
        reader = data.reader or Auto()
        if not data.root.is_dir() or type(reader) not in (Auto, ImageFolder, TableFile):
            return None
        listed = {key: plain[key] for key in ("root", "reader", "source", "target", "eval")}
        self._once("domains", listed, lambda: requested(reader, data.root, data.roles, {}))

        def find() -> Foreseen | None:
            names = [n for group in data.roles.values() for n in group]
            if not all(_is_small_text(data, reader, n) for n in names):
                return None
            data.prepare()
            return Foreseen(data.domains, tuple(data.describe()))

        return self._once("data", {k: v for k, v in plain.items() if k not in _UNTRAINED}, find)

    def _task(self, settings: Settings, plain: Mapping[str, Any], seen: Foreseen, here: bool) -> Task | None:
        """The task without weights; None where it may be that only another machine can build it."""
        settings.set_domains(seen.domains)
        model = settings.config.model
        if "optimizer" in model.init_args:  # checked by the parser already, and what arms differ in most
            model.init_args.optimizer = None

        def find() -> Task | None:
            unsure = [_without_weights(part, here) for part in _parts(model)]
            try:
                return _built(settings)
            except Exception:
                if any(unsure):
                    return None
                raise

        arguments = {**(plain.get("init_args") or {}), "optimizer": None, "domains": repr(seen.domains), "here": here}
        return self._once("model", {"class_path": plain["class_path"], "init_args": arguments}, find)


def _trainer(settings: Settings) -> Trainer:
    """The config's Trainer; where it asks for devices that this machine lacks, one for a single CPU."""
    config = settings.config.trainer
    config.logger = False  # some loggers make a run of theirs when they are built
    try:
        return build_trainer(settings)
    except ConfigError:
        kind = _strategy_class(config.strategy)
        if kind is not None:
            refuse_other_sharding(kind)
        if config.accelerator == "cpu" or (kind is None and config.strategy != "auto"):
            raise
        return build_trainer(settings, accelerator="cpu", devices=1, num_nodes=1, strategy="auto", precision=None)


def _strategy_class(strategy: Any) -> type | None:
    """The class that a name or an object's config stands for; None for ``auto`` and for unknown names."""
    if not isinstance(strategy, str):
        module, _, name = str(strategy.class_path).rpartition(".")
        return cast("type", getattr(import_module(module), name))
    from lightning.pytorch.strategies import StrategyRegistry

    known = strategy in StrategyRegistry.available_strategies()
    return cast("type", StrategyRegistry[strategy]["strategy"]) if known else None


def _is_small_text(data: DomainData, reader: Any, name: str) -> bool:
    """Whether the domain is one table of text that is read at once."""
    suffix = getattr(reader, "suffix", None)
    suffixes = (suffix,) if suffix else TABLE_SUFFIXES if type(reader) is not ImageFolder else ()
    files = [f for s in suffixes if (f := data.root / f"{name}{s}").is_file()]
    if len(files) != 1 or files[0].stat().st_size > _CHEAP:
        return False
    return bool(reader.read(data.root, name, data.columns).modality == "text")


def _stand_ins(data: DomainData, config: Any) -> Foreseen:
    """Domains of unknown labels: two of the kind that the config or its task says, and labels wherever some may be."""
    module, _, name = str(config.model.class_path).rpartition(".")
    kinds: tuple[Kind, ...] = getattr(import_module(module), name).kinds
    kind: Kind = data.kind if data.kind != "auto" else kinds[0] if kinds else "multiclass"
    labels = () if kind == "regression" else ("0", "1")
    domains = tuple(Domain(n, role, kind, labels) for role, names in data.roles.items() for n in names)
    few = data.shots is not None or data.fraction is not None
    unlabeled = {"source": data.source_labels == "none", "target": data.target_labels == "none"}
    unlabeled["target"] |= few and not data.validation_from_labels
    rows = [{"domain": d.name, "val": _MANY, "val_labels": 0 if unlabeled.get(d.role) else _MANY} for d in domains]
    known = data.kind != "auto" or "regression" not in kinds or len(kinds) == 1
    return Foreseen(domains, tuple(rows), known)


def _first_leg(seen: Foreseen) -> Foreseen:
    """The roles that the domains of a sequence have in its first leg."""
    first = [Domain(d.name, d.role if i < 2 else "eval", d.kind, d.labels) for i, d in enumerate(seen.domains)]
    return Foreseen(tuple(first), seen.rows)


def _parts(model: Any) -> list[Any]:
    """Every object that a model's config names, the model first."""
    if not isinstance(model, Namespace):
        return []
    inner = model.get("init_args")
    return [model, *(p for value in (vars(inner).values() if inner else ()) for p in _parts(value))]


def _without_weights(part: Any, here: bool) -> bool:
    """Leave out the weights of a backbone; return whether it may be one that can be built elsewhere alone.

    That is a name on the hub, and any class that is not ours: what it reads is not known.

    Args:
        part: an object's config.
        here: whether this is a machine with the run's files.

    Raises:
        BackboneError: weights that cannot be had: no such file, or timm has none for this name.
    """
    module, _, name = str(part.class_path).rpartition(".")
    kind = getattr(import_module(module), name)
    if kind not in (Timm, Transformer):
        return not str(kind.__module__).startswith(("crossft.", "torch."))
    arguments = part.init_args
    name, weights = str(arguments.name), arguments.weights
    arguments.weights = None
    if weights not in (None, "auto") and here and not Path(str(weights)).is_file():
        raise BackboneError(f"weights={str(weights)!r} is no file; give a .safetensors or .pth file, 'auto' or null")
    if Path(name).is_dir() or name.startswith("packaged:"):
        return False
    if kind is Transformer:
        return not (here and name.startswith((".", "/", "~")))
    if ":" not in name and "/" not in name:
        _check_pretrained(name, weights)
        return False
    return not (here and ":" not in name and name.startswith((".", "/", "~")))


def _check_pretrained(name: str, weights: Any) -> None:
    import timm

    if weights == "auto" and timm.is_model(name) and not timm.models.is_model_pretrained(name):
        raise BackboneError(
            f"timm has no pretrained weights for name={name!r}; use weights=null, or the path of a file"
        )


def _built(settings: Settings) -> Task:
    """On no device where that works, which costs neither memory nor random numbers; else on the CPU."""
    try:
        with torch.device("meta"):
            task: Task = settings.build("model").model
    except Exception:  # whatever a class does that needs numbers; what is wrong with it is seen again
        task = settings.build("model").model
    return task


def _check_stages(method: Callback, task: Task) -> None:
    """Refuse stages and depths that the backbone lacks, in what a method of ours is given."""
    name = str(getattr(method, "name", ""))
    try:
        if isinstance(method, Freeze):
            method.selection.names(task.backbone)
        elif isinstance(method, GradualUnfreezing):
            method.plan_for(task)
        elif type(method).__module__.startswith("crossft."):
            for stage in getattr(method, "stages", None) or ():
                layer_of(task, str(stage), allowed=("features",))
            for layer in getattr(method, "layers", ()):
                layer_of(task, str(layer))
            layer_of(task, str(getattr(method, "layer", "features")), allowed=("features",))
    except CrossftError as error:
        raise type(error)(f"methods.{name}: {error}") from error


def _check_choices(methods: Sequence[Callback], task: Task, trainer: Any) -> None:
    """Refuse two methods that choose what trains, and phases that are longer than the fit."""
    chosen: dict[str, frozenset[str]] = {}
    for method in methods:
        if isinstance(method, GradualUnfreezing):
            plan = method.plan_for(task)
            check_lengths(plan, trainer.max_epochs, trainer.max_steps, method.name)
            chosen[method.name] = frozenset().union(*(phase.names(task.backbone) for phase in plan))
        elif isinstance(method, Freeze):
            chosen[method.name] = method.selection.names(task.backbone)
    if len(set(chosen.values())) > 1:
        raise ConfigError(
            f"methods.{' and methods.'.join(chosen)} choose differently what trains; leave that to one method"
        )


def _check_monitor(callback: Any, known: Sequence[str], callbacks: Sequence[Any]) -> None:
    """Refuse a validation metric that a callback or schedule waits for in vain."""
    monitor = getattr(callback, "monitor", None)
    if not isinstance(monitor, str) or "/val/" not in monitor or getattr(callback, "strict", True) is False:
        return
    allowed = [*known, *(["gap/val/mmd"] if any(isinstance(c, DomainGap) for c in callbacks) else [])]
    if monitor not in allowed:
        raise ConfigError(
            f"{type(callback).__name__}.monitor={monitor!r} is not measured in validation; allowed: "
            f"{', '.join(allowed) or 'nothing'}"
        )
