"""Where a run's metrics go: ``metrics.csv`` always, W&B unless disabled."""

from __future__ import annotations

import netrc
import os
import secrets
import sys
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from crossft.cli.options import WandbOptions
from crossft.runs import RunFolder

__all__ = ["RunIdentity", "close_wandb", "wandb_id", "wandb_logger", "wandb_mode"]


def wandb_mode(options: WandbOptions) -> Literal["online", "offline", "disabled"]:
    """The mode W&B runs in: as asked for, else as WANDB_MODE says, else online exactly where a key is configured."""
    if options.mode != "auto":
        return options.mode
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked in ("disabled", "dryrun", "offline"):
        return "disabled" if asked == "disabled" else "offline"
    return "online" if os.environ.get("WANDB_API_KEY") or _has_netrc_key() else "offline"


def _has_netrc_key() -> bool:
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb_id(folder: RunFolder) -> str:
    """The run's W&B id: made once, kept in ``summary.json``, so a resumed run goes on under it."""
    known = folder.summary().get("wandb_id") if folder.summary_file.is_file() else None
    return str(known) if known else secrets.token_hex(4)


def wandb_logger(folder: RunFolder, options: WandbOptions, run_id: str, config: dict[str, Any]) -> Logger | None:
    """The W&B logger of a run, started; None where it is disabled or cannot start (a log must not stop a run)."""
    mode = wandb_mode(options)
    if mode == "disabled":
        return None
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    folder.path.mkdir(parents=True, exist_ok=True)
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            started = wandb.init(
                name=folder.path.name,
                project=options.project or str(config.get("experiment")),
                entity=options.entity,
                group=options.group or str(config.get("arm")),
                dir=str(folder.path),
                id=run_id,
                resume="allow" if attempt == "online" else None,
                mode=attempt,
                config={"crossft": config},
                reinit="finish_previous",
                settings=wandb.Settings(silent=True),
            )
            started.define_metric("trainer/global_step")
            started.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            return WandbLogger(experiment=started, save_dir=str(folder.path))
        except Exception as error:  # whatever the service does: the run does not depend on it
            print(f"crossft: W&B ({attempt}) did not start: {error}", file=sys.stderr)
    return None


def close_wandb(logger: Any, metrics: dict[str, Any]) -> None:
    """Write the final metrics as the W&B summary, and finish: a second run in this process needs that."""
    if logger is None:
        return
    try:
        logger.experiment.summary.update({k: v for k, v in metrics.items() if v is not None})
        logger.experiment.finish()
    except Exception as error:  # as above
        print(f"crossft: W&B did not finish: {error}", file=sys.stderr)


class RunIdentity(Callback):
    """Keeps the run's name and W&B id in every checkpoint."""

    def __init__(self, folder: Path, wandb_id: str) -> None:
        self.identity = {"run": folder.name, "wandb_id": wandb_id}

    def state_dict(self) -> dict[str, Any]:
        """Name and id."""
        return dict(self.identity)
