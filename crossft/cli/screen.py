"""What the commands print."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["print_table", "quiet_lightning"]


def quiet_lightning() -> None:
    """Leave out Lightning's notes on hardware and on what the command line decided on purpose; warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for note in (
        "The number of training batches",  # small data: the loss is logged less often, epochs are always logged
        ".*does not have many workers",  # batches are made in the main process unless data.num_workers says more
        ".*LeafSpec.*is deprecated",  # Lightning's own use of torch
        "`weights_only` was not set",  # our checkpoint reader never unpickles code, whatever is asked
        r"Found \d+ module\(s\) in eval mode",  # frozen stages and statistics: the task sets modes itself
        "Trying to infer the `batch_size`",
        "The `srun` command is available",  # a command on a login node, or under torchrun, is no mistake
    ):
        warnings.filterwarnings("ignore", message=note)


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> None:
    """Print a title and a table; the first ``text_columns`` columns are text, the others numbers."""
    table = Table(box=SIMPLE_HEAD)
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index < text_columns else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row))
    print(title)
    Console(highlight=False).print(table)
