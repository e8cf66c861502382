"""``python -m crossft.cli.resolve``: checks many command lines in one process, for the plan of a sweep.

Reads ``{"lines": [[flags of crossft fit]], "allow": [packages]}`` from standard input and writes a list of one object a
line: ``{"error": text}``, or the resolved ``config``, its ``hash``, and of its source leg a hash (``source``) and the
seed where it is fixed (``source_seed``). No data is read and no backbone is built.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import Any

from crossft.cli.legs import NOT_TRAINED, Chain
from crossft.cli.parser import Settings
from crossft.errors import CrossftError
from crossft.runs import config_hash

__all__ = ["main", "resolve"]

_READ = {"data.root", "before", "init"}
"""Left out of a run's own hash, where the content of the data and of the model count; here no file is read."""


def resolve(line: list[str], allow: list[str]) -> dict[str, Any]:
    """Check one command line as ``crossft fit`` would, up to where it reads data."""
    try:
        settings = Settings(line, "sweep", allow)
        settings.build("data", "methods")
        chain = Chain(settings)
        config = settings.plain()
        found: dict[str, Any] = {"config": config, "source": None, "source_seed": None}
        ignored = set(NOT_TRAINED) - _READ
        found["hash"] = config_hash(config, ignored)
        if chain.source is not None:
            source = chain.source.plain()
            found["source"] = config_hash(source, ignored)
            found["source_seed"] = config["source_leg"].get("seed_everything")
        return found
    except CrossftError as error:
        return {"error": str(error)}
    except Exception as error:  # a class of the config's own: the plan still names the arm
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer one request."""
    asked = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):
        found = [resolve(line, asked["allow"]) for line in asked["lines"]]
    json.dump(found, sys.stdout, default=str)


if __name__ == "__main__":
    main()
