"""The command line: ``crossft COMMAND ...``.

This module answers ``--help`` and refuses unknown commands without importing torch; a command's own module is
imported when the command runs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module

from crossft import __version__
from crossft.cli.texts import COMMANDS, HELP, USAGE
from crossft.errors import ConfigError, CrossftError, Interrupted

__all__ = ["main"]

_PATIENCE = 5.0
"""Seconds that a process beside the first leaves it to end, when all of them fail alike."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong usage or configuration, 143 stopped.

    Args:
        argv: the arguments after ``crossft``; default: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(commands="\n".join(f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items())))
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"crossft {__version__}")
        return 0
    command = arguments.pop(0)
    if command not in COMMANDS:
        return _complain(f"unknown command {command!r}; commands: {', '.join(COMMANDS)}", 2)
    if arguments[:1] in (["-h"], ["--help"]) and command in HELP:
        print(HELP[command])
        return 0
    try:
        return int(import_module(f"crossft.cli.{COMMANDS[command][0]}").run(command, arguments) or 0)
    except Interrupted as stop:
        return _complain(str(stop), 143)
    except ConfigError as error:
        return _complain(str(error), 2)
    except CrossftError as error:
        return _complain(str(error), 1)


def _complain(message: str, code: int) -> int:
    """Print one message and return the exit code.

    Of several processes the first speaks for all. Where another one ends first, its launcher would end the first
    before that has written what happened: on a signal the others leave without an error, on an error they wait.
    """
    rank = int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)
    if rank and code == 143:
        return 0
    if rank:
        time.sleep(_PATIENCE)
    print(f"crossft: error: {f'process {rank}: ' if rank else ''}{message}", file=sys.stderr)
    return code
