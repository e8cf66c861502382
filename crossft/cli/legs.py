"""Chains of legs: the source first where the config says so, then the run itself; and their resumption."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from crossft.callbacks.monitoring import Stopping, latest_valid
from crossft.callbacks.monitoring.checkpoint_io import sha256
from crossft.cli.before import adopt_before, shared_before
from crossft.cli.launch import Launch
from crossft.cli.leg import Leg
from crossft.cli.loggers import wandb_id
from crossft.cli.parser import Settings
from crossft.cli.saved import read_splits
from crossft.cli.screen import quiet_lightning
from crossft.cli.selection import checked_metric
from crossft.cli.slurm import restarted
from crossft.cli.source_leg import laid_over
from crossft.cli.weights import checkpoint_of
from crossft.data import DomainData
from crossft.errors import ConfigError, CrossftError, Interrupted, RunError
from crossft.metrics import primary_metric
from crossft.runs import RunFolder, config_hash, run_id, write_atomic, write_json
from crossft.sweeps.state import begun
from crossft.tasks.evaluation import display_names

__all__ = ["NOT_TRAINED", "Chain", "chosen_by_source", "prepared", "source_settings"]

NOT_TRAINED = (
    "run", "wandb", "trial", "before", "diagnose", "watch", "experiment", "arm", "seed_everything", "checkpoints",
    "data.root", "data.num_workers", "data.verify", "data.cache_images", "data.inputs", "trainer.logger",
    "trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.default_root_dir", "trainer.profiler",
    "model.init_args.domains", "init",
)  # fmt: skip
"""Keys that do not change what is trained, or that stand in a run's id or hash by content: left out of the hash."""
_ROWS = (
    "root", "source", "target", "eval", "source_labels", "target_labels", "shots", "fraction", "validation_from_labels",
    "split", "splits", "group", "split_seed", "limit", "reader", "kind", "labels", "text_column", "pair_column",
    "label_column", "image_column", "split_column", "id_column",
)  # fmt: skip
"""Keys of the data that decide which rows a target has, and which of them have labels."""


def prepared(settings: Settings, manifest: dict[str, Any] | None = None) -> DomainData:
    """The config's data, read, checked and split; of domains in ``manifest``, with those splits."""
    data: DomainData = settings.build("data").data
    if manifest:
        names = {n for group in data.roles.values() for n in group}
        data.use_manifest({name: splits for name, splits in manifest.items() if name in names})
    data.prepare()
    return data


def source_settings(settings: Settings) -> Settings:
    """The config of the leg that is fitted first: the same, on the source alone, without methods.

    The target takes no part in it, neither its rows nor its name, so legs to other targets share the result. With
    ``source_leg.data.train_on: target`` it is fitted to the target alone, on the very rows whose labels the run has.

    Raises:
        ConfigError: an override would train on labels that the run does not have.
    """
    plain = settings.plain()
    overrides = plain.pop("source_leg") or {}
    data, probe = plain["data"], _on_target(overrides)
    _check_overrides(overrides, data, plain["sequence"])
    data |= {"eval": None, "mix": None, "epoch": "longest", "train_on": "target" if probe else "source"}
    if not probe:
        data |= {"shots": None, "fraction": None, "target_labels": "all", "validation_from_labels": False}
    data["source" if probe else "target"] = None
    plain |= {"methods": {}, "init": None, "arm": "source", "sequence": None}
    plain["select"] = {"metric": None, "oracle": False}
    plain["trial"] = {}
    merged = laid_over(plain, overrides)
    merged["data"]["source" if probe else "target"] = None
    merged["run"]["dir"] = None
    return Settings(merged, "fit", settings.allowed)


def _on_target(overrides: Mapping[str, Any]) -> bool:
    """Whether the leg is fitted to the target."""
    return (overrides.get("data") or {}).get("train_on") in ("target", ["target"])


def _check_overrides(overrides: Mapping[str, Any], data: Mapping[str, Any], sequence: Any) -> None:
    """Refuse a leg that would see other labels of a target than the run itself."""
    own = overrides.get("data") or {}
    if own.get("train_on", "source") not in ("source", "target", ["source"], ["target"]):
        raise ConfigError(f"source_leg.data.train_on={own['train_on']} must be source or target: the leg has one role")
    if not _on_target(overrides):
        for role in ("target", "eval"):
            if shared := {*_names(own.get("source"))} & {*_names(data[role])}:
                raise ConfigError(
                    f"source_leg.data.source={own['source']}: {min(shared)!r} is a data.{role} of the run, and the leg "
                    "would train on labels that the run may not have; to fit the target's labeled rows first, set "
                    "source_leg.data.train_on=target and leave source_leg.data.source out"
                )
        return
    if sequence is not None:
        raise ConfigError("source_leg.data.train_on=target: a sequence starts from its first domain; leave it out")
    for key in _ROWS:
        if key in own and own[key] != data[key]:
            raise ConfigError(
                f"source_leg.data.{key}={own[key]}: with source_leg.data.train_on=target the leg trains on the rows "
                f"that have labels in the run, and data.{key}={data[key]} chooses them; leave it out"
            )


def _names(value: str | list[str] | None) -> list[str]:
    return [name.strip() for name in (value.split(",") if isinstance(value, str) else value or ())]


def chosen_by_source(data: DomainData) -> str | None:
    """What chooses the checkpoint of a source leg: the primary metric of the first source, on its validation split."""
    first, row = data.domains[0], data.describe()[0]
    names = display_names(data.domains)
    return f"{names[first.name]}/val/{primary_metric(first.kind).name}" if row["val_labels"] else None


class Chain:
    """A run and, where its config has a ``source_leg`` and no ``init``, the run it starts from.

    Args:
        settings: the run's configuration.
        stopping: takes the signals; one that nobody has entered by default.
        folder: the run's folder, where it is resumed.
    """

    def __init__(self, settings: Settings, stopping: Stopping | None = None, folder: RunFolder | None = None) -> None:
        quiet_lightning()
        self.settings, self.folder, self.stopping = settings, folder, stopping or Stopping()
        config = settings.config
        if config.trainer.fast_dev_run:
            raise ConfigError("trainer.fast_dev_run leaves no checkpoint to measure; use --trainer.max_steps 2")
        self.init = checkpoint_of(config.init) if config.init else None
        self.source: Settings | None = None
        first = config.source_leg
        if first is not None and config.init is None and (config.data.source or _on_target(first)):
            self.source = source_settings(settings)
        elif config.run.only_source:
            raise ConfigError("run.only_source=true: this config fits no source first (source_leg, data.source, init)")
        self._lock: FileLock | None = None

    @cached_property
    def launch(self) -> Launch:
        """The processes of this command."""
        return Launch()

    def run(self) -> None:
        """Run what is left of the chain."""
        source_data = None
        if self.source is not None:
            source_data = prepared(self.source)
            self.source.config.select.metric = chosen_by_source(source_data)
        try:
            if self.settings.config.run.only_source and source_data is not None:
                self._run_source(self.launch.agree(partial(self._decide_source, source_data)), source_data, None)
                return
            data = prepared(self.settings, self._inherited(source_data))
            plan = self.launch.agree(lambda: self._decide(data, source_data))
            folder = RunFolder(plan["folder"])
            if plan.get("finished"):
                print(f"{folder.path} is finished: nothing to do")
                return
            init = self.init
            if source_data is not None:
                init = self._run_source(plan, source_data, folder)
            self._train(plan, folder, data, init)
        finally:
            self._release()

    def _train(self, plan: dict[str, Any], folder: RunFolder, data: DomainData, init: Path | None) -> None:
        """Run the leg itself; the run it starts from is done."""
        resume = Path(plan["resume"]) if plan["resume"] else None
        Leg(self.settings, folder, data, init, resume, self.launch, self.stopping).run()

    def _inherited(self, source_data: DomainData | None) -> dict[str, Any] | None:
        """The splits of the leg this one starts from."""
        if source_data is not None:
            return source_data.split_manifest()
        if self.folder is not None:
            return read_splits(self.folder)
        return read_splits(RunFolder(self.init.parent.parent)) if self.init is not None else None

    # -- the first process decides ------------------------------------------------------------------------------

    def _decide(self, data: DomainData, source_data: DomainData | None) -> dict[str, Any]:
        """Make or open the folders, and say what is left to do; in the first process, before any Trainer."""
        source = self._source_folder(source_data) if source_data is not None else None
        start = sha256(self.init) if self.init is not None else None
        digest = config_hash({**self._hashed(self.settings), "data_content": data.fingerprint, "init_content": start})
        run = self.settings.config.run
        if self.folder is None and (restarted() if run.resume is None else run.resume):
            self.folder = begun(self._path(digest))
        if self.folder is None:
            parent = str(source.path) if source is not None else self.settings.config.init
            self.folder = self._create(self.settings, self._path(digest), digest, data, parent)
        elif self.folder.summary().get("config_hash") not in (None, digest):
            raise RunError(
                f"{self.folder.path}: its config.yaml or its data are not those the run began with "
                f"(hash {digest}, was {self.folder.summary()['config_hash']}); a resume would not give the same run"
            )
        if self.folder.summary()["status"] == "finished":
            return {"folder": str(self.folder.path), "finished": True}
        self._check_metrics(self.folder, data)
        plan: dict[str, Any] = {"folder": str(self.folder.path), "resume": _text(latest_valid(self.folder.checkpoints))}
        if source_data is not None:
            plan |= self._decide_source(source_data)
        init = checkpoint_of(source.path) if source is not None and plan["source_done"] else self.init
        if init is not None and self.settings.config.before:
            adopt_before(self.folder, shared_before(self.settings, data, init))
        return plan

    def _check_metrics(self, folder: RunFolder, data: DomainData) -> None:
        """Refuse a metric that the run's validation does not measure, before another run is trained for it."""
        config = self.settings.config
        try:
            for key, metric in (("select", config.select.metric), ("trial.metric", config.trial.metric)):
                checked_metric(key, metric, data.domains, data.describe())
        except ConfigError as error:
            folder.write_summary(status="failed", error=f"ConfigError: {error}")
            raise

    def _decide_source(self, data: DomainData) -> dict[str, Any]:
        """Reuse a finished source, continue an unfinished one, or begin; one process at a time, under a lock."""
        assert self.source is not None
        folder = self._source_folder(data)
        folder.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder.path.parent / f".{folder.path.name}.lock")
        if not _acquired(self._lock):
            print(f"waiting: another process is fitting the source in {folder.path}")
            self._lock.acquire()
        done = folder.summary_file.is_file() and folder.summary()["status"] == "finished"
        if done:
            self._release()
            print(f"source: reusing {folder.path}")
        elif not folder.config.is_file():
            shutil.rmtree(folder.path, ignore_errors=True)  # of a process that died here: this one has the lock
            digest = folder.path.name.removeprefix("source-")
            self._create(self.source, folder.path, digest, data, None)
        return {
            "source": str(folder.path),
            "source_done": done,
            "source_resume": None if done else _text(latest_valid(folder.checkpoints)),
        }

    def _source_folder(self, data: DomainData) -> RunFolder:
        assert self.source is not None
        config = self.source.config
        hashed = self._hashed(self.source)
        digest = config_hash({**hashed, "seed": config.seed_everything, "data_content": data.fingerprint})
        return RunFolder(Path(config.run.root) / config.experiment / f"source-{digest[:8]}")

    def _hashed(self, settings: Settings) -> dict[str, Any]:
        plain = settings.plain()
        if plain["sequence"] is None:
            del plain["sequence"]
        for key in NOT_TRAINED:
            *parents, last = key.split(".")
            place = plain
            for name in parents:
                place = place.get(name) or {}
            place.pop(last, None)
        return plain

    def _path(self, digest: str) -> Path:
        config = self.settings.config
        if config.run.dir is not None:
            return Path(config.run.dir)
        found: Path = Path(config.run.root) / config.experiment / run_id(config.arm, config.seed_everything, digest)
        return found

    def _create(self, settings: Settings, path: Path, digest: str, data: DomainData, parent: str | None) -> RunFolder:
        config = settings.config
        config.data.root = str(Path(config.data.root).absolute())
        config.init = _text(Path(config.init).absolute()) if config.init else None
        _reclaim(path)
        roles: dict[str, list[str]] = {}
        for domain in data.domains:
            roles.setdefault(domain.role, []).append(domain.name)
        folder = RunFolder.create(
            path,
            experiment=config.experiment,
            arm=config.arm,
            seed=config.seed_everything,
            config_hash=digest,
            parent=parent,
            domains=roles,
        )
        folder.write_summary(wandb_id=wandb_id(folder))
        settings.set_domains(data.domains)
        write_atomic(folder.config, settings.text())
        write_json(folder.splits, data.split_manifest())
        if data.quarantined:
            write_json(folder.quarantine, data.quarantined)
        return folder

    # -- the source leg -----------------------------------------------------------------------------------------

    def _run_source(self, plan: dict[str, Any], data: DomainData, target: RunFolder | None) -> Path:
        """Fit the source unless that is done; return the checkpoint the target leg starts from."""
        assert self.source is not None
        folder = RunFolder(plan["source"])
        if not plan["source_done"]:
            if self.launch.first:
                print(f"source: fitting {', '.join(d.name for d in data.domains)} first, in {folder.path}")
            resume = Path(plan["source_resume"]) if plan["source_resume"] else None
            try:
                Leg(self.source, folder, data, None, resume, self.launch, self.stopping).run()
            except (CrossftError, Interrupted) as error:
                if self.launch.first and target is not None:
                    target.write_summary(status=folder.summary()["status"], error=f"in the source leg: {error}")
                raise
            self._release()
        return checkpoint_of(folder.path)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _reclaim(path: Path) -> None:
    """Remove a run that failed before it or a leg in it saved anything: the corrected command can take its place."""
    folder = RunFolder(path)
    if (
        folder.summary_file.is_file()
        and folder.summary()["status"] == "failed"
        and not any(path.glob("**/checkpoints/*"))
    ):
        shutil.rmtree(path)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _acquired(lock: FileLock) -> bool:
    """Take the lock if it is free."""
    try:
        lock.acquire(blocking=False)
    except TimeoutError:
        return False
    return True
