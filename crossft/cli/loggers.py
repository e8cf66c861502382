"""Where a run's metrics go: ``metrics.csv`` always, W&B unless disabled."""

from __future__ import annotations

import os
import re
import secrets
import sys
from typing import Any, Literal

from lightning.pytorch.loggers import Logger

from crossft.cli.options import WandbOptions
from crossft.cli.tracking import log_inputs, log_outputs
from crossft.cli.wandb_key import has_key
from crossft.runs import RunFolder

__all__ = ["close_wandb", "wandb_id", "wandb_logger", "wandb_mode"]


def wandb_mode(options: WandbOptions) -> Literal["online", "offline", "disabled"]:
    """The mode W&B runs in: as asked for, else as WANDB_MODE says, else online exactly where a key is configured."""
    if options.mode != "auto":
        return options.mode
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked in ("disabled", "dryrun", "offline"):
        return "disabled" if asked == "disabled" else "offline"
    return "online" if has_key() else "offline"


def wandb_id(folder: RunFolder) -> str:
    """The run's W&B id: made once, kept in ``summary.json`` and every checkpoint, so a resumed run goes on under it.

    ``wandb agent`` chooses the id of the run it starts.
    """
    known = folder.summary().get("wandb_id") if folder.summary_file.is_file() else None
    return str(known or (_agent() and os.environ.get("WANDB_RUN_ID")) or secrets.token_hex(4))


def _agent() -> bool:
    """Whether ``wandb agent`` started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def wandb_logger(
    folder: RunFolder, options: WandbOptions, run_id: str, config: dict[str, Any], fingerprint: str
) -> Logger | None:
    """The W&B logger of a run, started; None where it is disabled or cannot start (a log must not stop a run).

    Args:
        folder: the run folder.
        options: as configured.
        run_id: the run's W&B id.
        config: the whole resolved config, which becomes that of the W&B run.
        fingerprint: hash over the data's content and splits.
    """
    mode = wandb_mode(options)
    source = config["arm"] == "source" and re.fullmatch(r"source-[0-9a-f]{8}", folder.path.name) is not None
    if mode == "disabled" or (source and _agent()):  # the agent's run is the leg that starts from this one
        return None
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    folder.path.mkdir(parents=True, exist_ok=True)
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            started = wandb.init(
                **_named(folder, options, config, source),
                id=run_id,
                resume="allow" if attempt == "online" else None,
                mode=attempt,
                config=config,
                reinit="finish_previous",
                settings=wandb.Settings(silent=True),
            )
            started.define_metric("trainer/global_step")
            started.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        except Exception as error:  # whatever the service does: the run does not depend on it
            print(f"crossft: W&B ({attempt}) did not start: {error}", file=sys.stderr)
            continue
        try:
            log_inputs(started, folder, fingerprint, options.checkpoints)
        except Exception as error:  # as above
            print(f"crossft: W&B does not know what the run is made from: {error}", file=sys.stderr)
        return WandbLogger(experiment=started, save_dir=str(folder.path))
    return None


def _named(folder: RunFolder, options: WandbOptions, config: dict[str, Any], source: bool) -> dict[str, Any]:
    """What the run is called and found by."""
    return {
        "name": folder.path.name,
        "project": options.project or "crossft",
        "entity": options.entity,
        "group": options.group or str(config["experiment"]),
        "job_type": "source" if source else "fit",
        "tags": _tags(config),
        "dir": str(folder.path),
    }


def _tags(config: dict[str, Any]) -> list[str]:
    """Arm, domains and methods, in W&B's 64 characters each."""
    domains = [config["data"].get(role) for role in ("source", "target")]
    names = [name for value in domains for name in (value if isinstance(value, list) else [value]) if name]
    return list(dict.fromkeys(str(tag)[:64] for tag in (config["arm"], *names, *config["methods"])))


def close_wandb(logger: Any, folder: RunFolder, options: WandbOptions) -> None:
    """Log what the run came to, and finish: a second run in this process needs that. A run may end in any status."""
    if logger is None:
        return
    run, status = logger.experiment, folder.summary()["status"]
    try:
        log_outputs(run, folder, options.checkpoints)
    except Exception as error:  # as above
        print(f"crossft: W&B did not take all of the run: {error}", file=sys.stderr)
    try:
        if status == "interrupted":
            run.mark_preempting()
        run.finish(exit_code=0 if status in ("finished", "pruned") else 1)
    except Exception as error:  # as above
        print(f"crossft: W&B did not finish: {error}", file=sys.stderr)
