"""Whether a key for W&B is configured; without one everything stays offline, and nothing asks."""

from __future__ import annotations

import netrc
import os

__all__ = ["has_key"]


def has_key() -> bool:
    """Whether WANDB_API_KEY is set, or ``~/.netrc`` has a key for the server."""
    return bool(os.environ.get("WANDB_API_KEY")) or _in_netrc()


def _in_netrc() -> bool:
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
