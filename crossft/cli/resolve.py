"""``python -m crossft.cli.resolve``: checks many command lines in one process, for the plan of a sweep.

Reads ``{"lines": [[flags of crossft fit]], "allow": [packages]}`` from standard input and writes a list of one object a
line: the resolved ``config``, its ``hash``, of its source leg a hash (``source``) and the seed where it is fixed
(``source_seed``), and the test and validation metrics of the run (``metrics``) as far as they can be known; with
``error``, or that alone, where the config is refused. No image is read, and no weights are loaded.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import Any

from crossft.cli.dry_run import DryRun
from crossft.cli.legs import NOT_TRAINED, Chain
from crossft.cli.parser import Settings
from crossft.errors import CrossftError
from crossft.runs import config_hash

__all__ = ["main", "resolve"]

_READ = {"data.root", "before", "init"}
"""Left out of a run's own hash, where the content of the data and of the model count; here no file is read."""


def resolve(line: list[str], allow: list[str], dry_run: DryRun | None = None) -> dict[str, Any]:
    """Check one command line as ``crossft fit`` would, up to where it reads data.

    Args:
        line: flags of ``crossft fit``.
        allow: packages from ``--allow``.
        dry_run: what checks the rest: devices, domains, model, stages and metrics.
    """
    found: dict[str, Any] = {}
    try:
        settings = Settings(line, "sweep", allow)
        settings.build("data", "methods")
        chain = Chain(settings)
        config = settings.plain()
        found |= {"config": config, "source": None, "source_seed": None, "metrics": None}
        ignored = set(NOT_TRAINED) - _READ
        found["hash"] = config_hash(config, ignored)
        source = chain.source.plain() if chain.source is not None else None
        if source is not None:
            found["source"] = config_hash(source, ignored)
            found["source_seed"] = config["source_leg"].get("seed_everything")
        if dry_run is not None:
            found["metrics"] = dry_run.check(settings, config)
            if chain.source is not None and source is not None:
                _check_source(dry_run, chain.source, source)
    except CrossftError as error:
        found["error"] = str(error)
    except Exception as error:  # a class of the config's own: the plan still names the arm
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def _check_source(dry_run: DryRun, settings: Settings, plain: dict[str, Any]) -> None:
    try:
        dry_run.check(settings, plain)
    except CrossftError as error:
        raise type(error)(f"in the source leg: {error}") from error


def main() -> None:
    """Answer one request."""
    asked = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):
        dry_run = DryRun()
        found = [resolve(line, asked["allow"], dry_run) for line in asked["lines"]]
    json.dump(found, sys.stdout, default=str)


if __name__ == "__main__":
    main()
