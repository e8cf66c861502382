"""Every notebook runs from top to bottom."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert any(cell.cell_type == "code" and cell.outputs for cell in notebook.cells)


def test_there_are_notebooks_without_stored_outputs() -> None:
    paths = sorted(FOLDER.glob("*.ipynb"))
    assert paths
    for path in paths:
        assert not any(cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells)
