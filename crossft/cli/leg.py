"""One leg: a model is started, measured, trained, measured again, and its run folder written."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from crossft.callbacks.monitoring import (
    AtomicCheckpointIO,
    Checkpoints,
    Drift,
    FiniteCheck,
    Ledger,
    Pruning,
    RunLog,
    Stopping,
    load_checkpoint,
)
from crossft.callbacks.monitoring.oracle import Oracle
from crossft.callbacks.monitoring.scores import Scores
from crossft.cli.before import keep_before, read_before, shared_before
from crossft.cli.diagnosis import PARTS, Diagnosis, diagnose, sentence
from crossft.cli.launch import Launch
from crossft.cli.loggers import close_wandb, wandb_logger, wandb_mode
from crossft.cli.parser import Settings
from crossft.cli.profiling import NoProfiler
from crossft.cli.progress import ProgressBar, progress
from crossft.cli.results import final_metrics, finish, primary_of, write_calibrations, write_confusions
from crossft.cli.selection import (
    checked_metric,
    oracle_folder,
    oracle_metrics,
    remove_oracle_files,
    scores_followed,
)
from crossft.cli.slurm import environment, refuse_strays
from crossft.cli.weights import load_weights
from crossft.data import DomainData
from crossft.errors import ConfigError, Interrupted, Pruned
from crossft.runs import RunFolder, higher_is_better, write_json
from crossft.sweeps.early import EarlyTerminate
from crossft.sweeps.study import TrialReports
from crossft.tasks import FSDP2, Task
from crossft.tasks.sharding import is_sharded

__all__ = ["Leg", "build_methods", "build_task", "build_trainer", "measure", "refuse_other_sharding"]


def build_task(settings: Settings, data: DomainData) -> Task:
    """Build the task over the data's label spaces, which become plain values of the config."""
    settings.set_domains(data.domains)
    task: Task = settings.build("model").model
    return task


def build_trainer(settings: Settings, **overrides: Any) -> Trainer:
    """Build a Trainer from the config; inside a SLURM job without Lightning's own requeue.

    Raises:
        ConfigError: Lightning refuses the combination, or would load a checkpoint that nobody named; or the strategy
            shards in another way than ``crossft.tasks.FSDP2``.
    """
    arguments = {**dict(settings.build("trainer").trainer), **overrides}
    arguments["profiler"] = arguments.get("profiler") or NoProfiler()
    if (launcher := environment()) is not None:
        plugins = _listed(arguments.get("plugins"))
        if not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
            arguments["plugins"] = [*plugins, launcher]
        refuse_strays(arguments.get("default_root_dir"))
    try:
        trainer = Trainer(**arguments)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ConfigError(f"trainer: {error}") from error
    refuse_other_sharding(type(trainer.strategy))
    return trainer


def refuse_other_sharding(strategy: type) -> None:
    """Refuse strategies that shard in another way than ``crossft.tasks.FSDP2``.

    Raises:
        ConfigError: it is one of them.
    """
    shards = issubclass(strategy, (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy))
    if shards and not issubclass(strategy, FSDP2):
        raise ConfigError(
            f"trainer.strategy={strategy.__name__}: the command line loads and writes a sharded model through "
            "crossft.tasks.FSDP2 alone; add --config configs/trainer/fsdp2.yaml, or set "
            "trainer.strategy.class_path=crossft.tasks.FSDP2, or trainer.strategy=ddp"
        )


def build_methods(settings: Settings) -> list[Callback]:
    """The methods in name order, each knowing its name."""
    methods: dict[str, Any] = dict(settings.build("methods").methods or {})
    for name, method in methods.items():
        method.name = name
    return [methods[name] for name in sorted(methods)]


def measure(
    settings: Settings, task: Task, data: DomainData, split: str = "test", methods: Sequence[Callback] = ()
) -> dict[str, float]:
    """Evaluate the task as it is: ``DOMAIN/SPLIT/METRIC`` of every domain that has labels there.

    Of ``methods`` those take part that act at test time (Tent), or score without labels. A strategy that shards takes a
    copy of a task that is whole, as a fit's methods are to see whole weights when they are set up.
    """
    acting = [m for m in methods if getattr(m, "acts_at_test", False) or isinstance(m, Scores)]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = build_trainer(settings, logger=False, callbacks=acting, enable_checkpointing=False, **quiet)
    if isinstance(trainer.strategy, FSDP2) and not is_sharded(task):
        task = copy.deepcopy(task)
    run = trainer.test if split == "test" else trainer.validate
    run(task, datamodule=data, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


@dataclass
class Leg:
    """One run: one fit on one mixture of domains from one starting model.

    Attributes:
        settings: its configuration.
        folder: its run folder, which exists.
        data: its data, prepared.
        init: checkpoint of the model it starts from, or None for the pretrained backbone.
        resume: its own checkpoint that training continues from, or None.
        launch: the processes that run it.
        stopping: takes the signals.
        wandb: the W&B logger while it runs.
    """

    settings: Settings
    folder: RunFolder
    data: DomainData
    init: Path | None
    resume: Path | None
    launch: Launch
    stopping: Stopping
    wandb: Any = None

    def run(self) -> None:
        """Run the leg to its end; its summary says ``failed``, ``interrupted`` or ``pruned`` where it ends before."""
        started = time.monotonic()
        former = float(self.folder.summary().get("seconds") or 0.0)
        if self.launch.first:
            self.folder.write_summary(status="running", error=None)
        try:
            self._run()
        except Pruned as end:
            self._end("pruned", former + time.monotonic() - started, str(end))
            if self.launch.first:
                print(f"{end}\nrun folder: {self.folder.path}")
            return
        except Interrupted as stop:
            self._end("interrupted", former + time.monotonic() - started, str(stop))
            raise
        except (KeyboardInterrupt, SystemExit) as stop:
            self._end("interrupted", former + time.monotonic() - started, type(stop).__name__)
            raise
        except BaseException as error:
            self._end("failed", former + time.monotonic() - started, f"{type(error).__name__}: {error}")
            raise
        self._end("finished", former + time.monotonic() - started, None)
        Launch.wait()

    def _end(self, status: str, seconds: float, error: str | None) -> None:
        if self.launch.first:
            self.folder.write_summary(status=status, seconds=round(seconds, 2), error=error)
            close_wandb(self.wandb, self.folder, self.settings.config.wandb)

    def _run(self) -> None:
        config = self.settings.config
        first_step, run_id = self._position()
        self._start_wandb(run_id)
        seed_everything(config.seed_everything, workers=True, verbose=False)
        task = build_task(self.settings, self.data)
        task.known_heads = trained = frozenset[str]()
        if self.init is not None:
            load_weights(task, self.init)
            trained = task.known_heads
        rows = self.data.describe()
        select = checked_metric("select", config.select.metric, task.domains, rows)
        checked_metric("trial.metric", config.trial.metric, task.domains, rows)
        methods = build_methods(self.settings)
        before = self._before(task, trained) if config.before else {}
        self._fit(task, methods, select, first_step, run_id)
        if not self.folder.best.is_file():
            select = None  # no choice was asked for, or the fit ended before any validation
        chosen = self.folder.last if select is None else self.folder.best
        load_weights(task, chosen)
        validated = self._validated(task)
        after = measure(self.settings, task, self.data, methods=[*methods, self.stopping])
        metrics: dict[str, float | None] = {**validated, **final_metrics(task.domains, before, after, config.before)}
        if config.select.oracle and self.launch.first:
            metrics |= oracle_metrics(self.folder, task, self.data, after, select)
        split = self._diagnosed(task, chosen, before, after)
        metrics |= {f"{n}/batchnorm/{k}": v for n, d in split.items() for k, v in asdict(d).items() if k in PARTS}
        if self.launch.first:
            self.folder.write_summary(
                metrics=metrics,
                checkpoint=str(chosen.relative_to(self.folder.path)),
                selected_by=select,
                primary=primary_of(task.domains),
            )
            write_confusions(self.folder, task.evaluation.confusion_matrices, task.domains)
            write_calibrations(self.folder, task.evaluation.calibration_bins)
            remove_oracle_files(self.folder)
            finish(self.folder)
            for name, found in split.items():
                print(sentence(name, found))

    def _diagnosed(
        self, task: Task, chosen: Path, before: Mapping[str, float], after: Mapping[str, float]
    ) -> dict[str, Diagnosis]:
        """What BatchNorm's statistics have to do with what was forgotten, where they moved; ``batchnorm.json``."""
        if not self.settings.config.diagnose or self.init is None or not before:
            return {}
        seen = task.evaluation
        confusions, bins = dict(seen.confusion_matrices), dict(seen.calibration_bins)
        again = partial(measure, self.settings, task, self.data)
        found = diagnose(task, self.data, self.init, chosen, before, after, again)
        seen.confusion_matrices.update(confusions)
        seen.calibration_bins.update(bins)
        if found and self.launch.first:
            write_json(self.folder.path / "batchnorm.json", {name: asdict(d) for name, d in found.items()})
        return found

    def _before(self, task: Task, trained: frozenset[str]) -> dict[str, float]:
        """The starting model on the test splits, measured once a run; only of domains whose head is trained."""
        if self.folder.before.is_file():
            return read_before(self.folder.before)
        names = task.evaluation.names
        known = tuple(f"{names[d.name]}/test/" for d in task.domains if task.head_keys[d.name] in trained)
        found = measure(self.settings, task, self.data, methods=[self.stopping]) if known else {}
        before = {key: value for key, value in found.items() if key.startswith(known)}
        if self.launch.first:
            untrained = [d.name for d in task.domains if task.head_keys[d.name] not in trained]
            write_json(self.folder.before, {"metrics": before, "untrained": untrained})
            if self.init is not None:
                keep_before(self.folder, shared_before(self.settings, self.data, self.init))
        return before

    def _start_wandb(self, run_id: str) -> None:
        """Start the W&B run before anything can fail, so that it tells of a run that fails early, too."""
        if self.launch.first and wandb_mode(self.settings.config.wandb) != "disabled":
            self.settings.set_domains(self.data.domains)
            plain, content = self.settings.plain(), self.data.fingerprint
            self.wandb = wandb_logger(self.folder, self.settings.config.wandb, run_id, plain, content)

    def _fit(self, task: Task, methods: list[Callback], select: str | None, first_step: int, run_id: str) -> None:
        """Train to the end, from the start or from the checkpoint to resume, whose step and W&B id these are."""
        config = self.settings.config
        seed_everything(config.seed_everything, workers=True, verbose=False)
        own: dict[str, Any] = dict(self.settings.build("trainer").trainer)
        bar = progress(own["enable_progress_bar"])
        chosen = [*_listed(own["callbacks"]), *methods]
        chosen += scores_followed(select, task, self.data, chosen, config.trial.metric)
        chosen += [Oracle(oracle_folder(self.folder))] if config.select.oracle else []
        chosen += _pruning(config.trial)
        trainer = build_trainer(
            self.settings,
            logger=[RunLog(self.folder.path, first_step), *_listed(self.wandb), *_listed(own["logger"])],
            plugins=[*_listed(own["plugins"]), AtomicCheckpointIO()],
            callbacks=[
                *chosen,
                Drift(**dict(config.watch)),
                Ledger(self.folder.path),
                FiniteCheck(),
                bar,
                self.stopping,
                Checkpoints(
                    self.folder.path,
                    **dict(config.checkpoints),
                    monitor=select,
                    mode="max" if select is None or higher_is_better(select) else "min",
                    wandb_id=run_id,
                    stopping=self.stopping,
                ),
            ],
            default_root_dir=str(self.folder.path),
            enable_progress_bar=isinstance(bar, ProgressBar),
            enable_model_summary=False,
        )
        try:
            trainer.fit(task, datamodule=self.data, ckpt_path=self.resume, weights_only=True)
            self.stopping.check()
        except MisconfigurationException as error:
            raise ConfigError(f"trainer: {error}") from error
        except ValueError as error:
            if "`val_check_interval`" not in str(error):
                raise
            raise ConfigError(
                f"trainer.val_check_interval={config.trainer.val_check_interval} is more than the micro-batches of an "
                f"epoch: {error}. Set it to at most that number, or to a share of an epoch (0.5), or set "
                "trainer.check_val_every_n_epoch=null to count over epochs"
            ) from error

    def _validated(self, task: Task) -> dict[str, float]:
        """The chosen model on the validation splits: labeled domains, and the score without labels that chose it."""
        config = self.settings.config
        scores = scores_followed(config.select.metric, task, self.data, (), config.trial.metric)
        if not scores and not any(row["val_labels"] for row in self.data.describe()):
            return {}
        return measure(self.settings, task, self.data, "val", [*scores, self.stopping])

    def _position(self) -> tuple[int, str]:
        """The optimizer step to begin at, and the run's W&B id: as the checkpoint says, where one is resumed."""
        known = str(self.folder.summary().get("wandb_id"))
        if self.resume is None:
            return 0, known
        saved = load_checkpoint(self.resume)
        state = saved["callbacks"].get("Checkpoints") or {}
        return int(saved["global_step"]), str(state.get("wandb_id") or known)


def _pruning(trial: Any) -> list[Callback]:
    """What ends the run early, where its search may."""
    if trial.study is None:
        return []
    early = EarlyTerminate(**trial.early_terminate)
    reports = TrialReports(Path(trial.storage), trial.study, int(trial.number), early)
    return [Pruning(trial.metric, reports.worse)]


def _listed(value: Any) -> list[Any]:
    """What a Trainer argument that takes one or many holds; switches (true, false, null) hold nothing."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
