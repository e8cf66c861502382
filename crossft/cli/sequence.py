"""Fine-tuning through an ordered list of domains: one leg each, every leg a normal run that starts from the last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import seed_everything

from crossft.callbacks.monitoring import Stopping, latest_valid
from crossft.cli.before import read_before
from crossft.cli.leg import Leg, build_task, measure
from crossft.cli.legs import Chain, prepared
from crossft.cli.parser import Settings
from crossft.cli.results import final_metrics, primary_of
from crossft.cli.screen import print_table
from crossft.cli.weights import checkpoint_of
from crossft.data import DomainData
from crossft.errors import ConfigError, CrossftError, Interrupted
from crossft.metrics import primary_metric
from crossft.metrics.transfer import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)
from crossft.runs import RunFolder, config_hash, higher_is_better, read_json, write_json
from crossft.tasks.evaluation import display_names
from crossft.types import Domain

__all__ = ["Sequence", "leg_settings", "transfer_of"]

Matrix = list[list[float | None]]
UNTRAINED = "untrained.json"
"""In the folder of a sequence: test metrics of the starting backbone under an untrained head."""
FORGETTING = "Chaudhry et al. 2018, eq. 3: best row before the last minus the last, mean over all domains but the last"
FORWARD = "Lopez-Paz & Ranzato 2017, eq. 4; baseline: the starting backbone with an untrained head"


def leg_settings(
    settings: Settings, number: int, domains: tuple[Domain, ...], init: Path | str, folder: Path
) -> Settings:
    """The config of one leg: its domain is the target, those before are sources, those after are only measured.

    A later domain with labels that no domain so far has is left out: nothing has trained a head for it.

    Args:
        settings: of the sequence.
        number: place of the leg's domain in the sequence, from 1.
        domains: of the sequence, in its order.
        init: the run before.
        folder: the leg's run folder.
    """
    plain = settings.plain()
    known = {d.space for d in domains[: number + 1]}
    later = [d.name for d in domains[number + 1 :] if d.space in known]
    plain |= {"sequence": None, "source_leg": None, "init": str(init), "trial": {}}
    plain["data"] |= {"source": [d.name for d in domains[:number]], "target": domains[number].name}
    plain["data"] |= {"eval": later or None, "train_on": "target"}
    plain["run"]["dir"] = str(folder)
    plain["model"]["init_args"]["domains"] = None
    return Settings(plain, "fit", settings.allowed)


def transfer_of(matrix: Matrix, baseline: list[float | None], metric: str) -> dict[str, float | None]:
    """Summary numbers of a full matrix; of an error the signs are such that more is better, but for ``acc``.

    Args:
        matrix: [t, t]: row i after learning domain i, None where not measured.
        baseline: [t] of the untrained model.
        metric: its name.
    """
    sign = 1.0 if higher_is_better(metric) else -1.0
    R, start = sign * np.array(matrix, np.float64), sign * np.array(baseline, np.float64)
    return {
        "acc": sign * average_accuracy(R),
        "bwt": backward_transfer(R),
        "fwt": forward_transfer(R, start),
        "forgetting": forgetting(R),
        "learning_accuracy": sign * learning_accuracy(R),
    }


class Sequence(Chain):
    """A chain of any number of legs, ``FOLDER/NUMBER-DOMAIN``, and what they say together: ``FOLDER/sequence.json``.

    The first domain is the source leg of :class:`Chain` (shared between arms), or ``init``. What a method carries
    (importance, memories) it finds in the run its leg starts from; heads come with the model, by label space.
    """

    def __init__(self, settings: Settings, stopping: Stopping | None = None, folder: RunFolder | None = None) -> None:
        super().__init__(settings, stopping, folder)
        if self.source is None and self.init is None:
            raise ConfigError(
                f"sequence={','.join(settings.config.sequence)} with source_leg=null has no model to start from; give "
                "source_leg (a mapping, also an empty one) to fit the first domain, or --init RUN that knows it"
            )

    # -- the first process decides ------------------------------------------------------------------------------

    def _decide(self, data: DomainData, source_data: DomainData | None) -> dict[str, Any]:
        """As a chain does; and what is done of each leg. A leg whose predecessor is done has its folder made here."""
        kinds = {primary_metric(d.kind).name for d in data.domains}
        if len(kinds) > 1:
            raise ConfigError(f"sequence: the domains are measured by {', '.join(sorted(kinds))}; one matrix takes one")
        plan = super()._decide(data, source_data)
        if plan.get("finished"):
            return plan
        folder = RunFolder(plan["folder"])
        start = Path(plan["source"] if source_data is not None else str(self.settings.config.init))
        plan |= {"start": str(start.absolute()), "legs": []}
        ready = source_data is None or plan["source_done"]
        for number in range(1, len(data.domains)):
            leg = self._leg_folder(folder, data, number)
            state = _state(leg)
            if state == "missing" and ready:
                self._make(folder, data, number, plan["start"])
                state = "begun"
            ready = state == "finished"
            resume = latest_valid(leg.checkpoints) if state == "begun" else None
            plan["legs"].append({"state": state, "resume": None if resume is None else str(resume)})
        write_json(folder.sequence, self._result(plan, folder, data), sort_keys=False)
        return plan

    def _check_metrics(self, folder: RunFolder, data: DomainData) -> None:
        """Each leg checks its own: what a domain is called in metrics changes from leg to leg."""

    def _leg_folder(self, folder: RunFolder, data: DomainData, number: int) -> RunFolder:
        return RunFolder(folder.path / f"{number}-{data.domains[number].name}")

    def _leg(self, folder: RunFolder, data: DomainData, number: int, start: str) -> tuple[Settings, DomainData]:
        init = start if number == 1 else str(self._leg_folder(folder, data, number - 1).path.absolute())
        own = self._leg_folder(folder, data, number)
        settings = leg_settings(self.settings, number, data.domains, init, own.path)
        return settings, prepared(settings, data.split_manifest())

    def _make(self, folder: RunFolder, data: DomainData, number: int, start: str) -> None:
        """Make the folder of a leg; remove what is left of one that died while it was made."""
        leg = self._leg_folder(folder, data, number)
        shutil.rmtree(leg.path, ignore_errors=True)
        settings, own = self._leg(folder, data, number, start)
        digest = config_hash({"sequence": folder.summary()["config_hash"], "leg": number})
        self._create(settings, leg.path, digest, own, settings.config.init)

    # -- training -----------------------------------------------------------------------------------------------

    def _train(self, plan: dict[str, Any], folder: RunFolder, data: DomainData, init: Path | None) -> None:
        """Run the legs that are left, one after the other, and write what they say together."""
        if self.launch.first:
            folder.write_summary(status="running", error=None)
        try:
            self._measure_untrained(folder, data)
            for number, state in enumerate(plan["legs"], 1):
                if state["state"] != "finished":
                    self._run_leg(plan, folder, data, number, state)
        except BaseException as stop:
            self._stopped(folder, data, stop)
            raise
        if self.launch.first:
            self._finish(plan, folder, data)
        self.launch.wait()

    def _run_leg(
        self, plan: dict[str, Any], folder: RunFolder, data: DomainData, number: int, state: Mapping[str, Any]
    ) -> None:
        if state["state"] == "missing" and self.launch.first:
            self._make(folder, data, number, plan["start"])
        self.launch.wait()
        settings, own = self._leg(folder, data, number, plan["start"])
        leg = self._leg_folder(folder, data, number)
        resume = Path(state["resume"]) if state["resume"] else None
        if self.launch.first:
            print(f"leg {number} of {len(plan['legs'])}: {data.domains[number].name}, in {leg.path}")
        Leg(settings, leg, own, checkpoint_of(settings.config.init), resume, self.launch, self.stopping).run()
        if self.launch.first:
            write_json(folder.sequence, self._result(plan, folder, data), sort_keys=False)

    def _measure_untrained(self, folder: RunFolder, data: DomainData) -> None:
        """What forward transfer is counted from: the starting backbone under an untrained head, once a sequence."""
        if (folder.path / UNTRAINED).is_file():
            return
        seed_everything(self.settings.config.seed_everything, workers=True, verbose=False)
        task = build_task(self.settings, data)
        found = measure(self.settings, task, data)
        if self.launch.first:
            write_json(folder.path / UNTRAINED, {"metrics": found})
        self.launch.wait()

    def _stopped(self, folder: RunFolder, data: DomainData, stop: BaseException) -> None:
        """Say in the sequence's summary what became of it, as the leg says of itself."""
        if not self.launch.first:
            return
        states = [_state(leg) for leg in self._leg_folders(folder, data)]
        number = next((i for i, state in enumerate(states, 1) if state != "finished"), len(states))
        leg = self._leg_folder(folder, data, number)
        status = leg.summary()["status"] if leg.summary_file.is_file() else "failed"
        if not isinstance(stop, (CrossftError, Interrupted)) and status not in ("failed", "interrupted"):
            status = "interrupted" if isinstance(stop, (KeyboardInterrupt, SystemExit)) else "failed"
        status = status if status in ("failed", "interrupted", "pruned") else "failed"
        folder.write_summary(status=status, error=f"in leg {number}, {data.domains[number].name}: {stop}")

    # -- what the legs say together -----------------------------------------------------------------------------

    def _leg_folders(self, folder: RunFolder, data: DomainData) -> list[RunFolder]:
        return [self._leg_folder(folder, data, number) for number in range(1, len(data.domains))]

    def _rows(self, folder: RunFolder, data: DomainData) -> list[dict[str, dict[str, float]]]:
        """After each domain: every measured value, by domain and metric; of legs that are not done nothing."""
        rows: list[dict[str, dict[str, float]]] = []
        for leg in self._leg_folders(folder, data):
            if not rows and leg.before.is_file():
                rows.append(_by_domain(leg, read_before(leg.before)))
            if _state(leg) != "finished":
                break
            rows.append(_by_domain(leg, leg.summary()["metrics"]))
        return rows

    def _result(self, plan: Mapping[str, Any], folder: RunFolder, data: DomainData) -> dict[str, Any]:
        metric = primary_metric(data.domains[0].kind).name
        names, rows = [d.name for d in data.domains], self._rows(folder, data)
        matrix: Matrix = [[row.get(name, {}).get(metric) for name in names] for row in rows]
        baseline: list[float | None] = [None] * len(names)
        if (folder.path / UNTRAINED).is_file():
            keys, found = display_names(data.domains), read_json(folder.path / UNTRAINED)["metrics"]
            baseline = [found.get(f"{keys[name]}/test/{metric}") for name in names]
        full = len(matrix) == len(names)
        numbers = transfer_of(matrix, baseline, metric) if full else {}
        config = self.settings.config
        runs = [plan["start"], *(str(leg.path.absolute()) for leg in self._leg_folders(folder, data))]
        return {
            "schema": 1,
            "experiment": config.experiment,
            "arm": config.arm,
            "seed": config.seed_everything,
            "domains": names,
            "metric": metric,
            "matrix": matrix + [[None] * len(names)] * (len(names) - len(matrix)),
            "baseline": baseline,
            **{key: numbers.get(key) for key in ("acc", "bwt", "fwt", "forgetting", "learning_accuracy")},
            "variants": {"forgetting": FORGETTING, "fwt": FORWARD},
            "runs": [os.path.relpath(run, folder.path.absolute()) for run in runs],
        }

    def _finish(self, plan: Mapping[str, Any], folder: RunFolder, data: DomainData) -> None:
        """Write the summary: the last leg's values, what was gained and kept on each domain, the numbers of the matrix.

        "Before" is the model of the first domain.
        """
        result, rows = self._result(plan, folder, data), self._rows(folder, data)
        write_json(folder.sequence, result, sort_keys=False)
        names = display_names(data.domains)

        def keyed(row: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
            return {f"{names[d]}/test/{m}": v for d, own in row.items() for m, v in own.items()}

        numbers = {f"sequence/{k}": result[k] for k in ("acc", "bwt", "fwt", "forgetting", "learning_accuracy")}
        seconds = sum(float(leg.summary()["seconds"] or 0.0) for leg in self._leg_folders(folder, data))
        folder.write_summary(
            status="finished",
            error=None,
            seconds=round(seconds, 2),
            metrics={**final_metrics(data.domains, keyed(rows[0]), keyed(rows[-1])), **numbers},
            primary=primary_of(data.domains),
        )
        cells = [[n, *("" if v is None else f"{v:.4f}" for v in row)] for n, row in zip(names, result["matrix"])]
        print_table(f"{result['metric']} after each domain (rows), test splits", ["after", *names], cells)
        print("  ".join(f"{k.removeprefix('sequence/')} {v:.4f}" for k, v in numbers.items() if v is not None))
        print(f"run folder: {folder.path}")


def _state(leg: RunFolder) -> str:
    """``finished``, ``begun`` (all that a resume needs is there) or ``missing``."""
    if not (leg.summary_file.is_file() and leg.config.is_file() and leg.splits.is_file()):
        return "missing"
    return "finished" if leg.summary()["status"] == "finished" else "begun"


def _by_domain(leg: RunFolder, metrics: Mapping[str, float | None]) -> dict[str, dict[str, float]]:
    """A leg's test metrics by the domains' own names."""
    roles = leg.summary()["domains"]
    own = {(r if r != "eval" and len(names) == 1 else n): n for r, names in roles.items() for n in names}
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        parts = key.split("/")
        if len(parts) == 3 and parts[1] == "test" and value is not None:
            found.setdefault(own[parts[0]], {})[parts[2]] = value
    return found
