import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from reports.folders import write_curves, write_run

from crossft.errors import RunError
from crossft.reports import figures
from crossft.reports.figures import learning_curves, tradeoff
from crossft.reports.frontier import pareto_front
from crossft.reports.records import read_records


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    kept: list[Figure] = []
    save = figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, path: (kept.append(figure), save(figure, path))[1])
    return kept


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of drawn texts whose boxes cross."""
    boxes: list[tuple[str, Bbox]] = []
    draw = Text.draw

    def record(text: Text, renderer: RendererBase) -> None:
        if text.get_visible() and text.get_text().strip():
            boxes.append((text.get_text(), text.get_window_extent(renderer)))
        draw(text, renderer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", record)
        figure.draw_without_rendering()
    assert len(boxes) > 10
    return [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[i + 1 :] if x.overlaps(y)]


def test_learning_curves(tmp_path: Path, drawn: list[Figure]) -> None:
    folder = write_run(tmp_path / "pacs", "dann", 0)
    write_curves(folder)
    path = learning_curves(folder.path)
    assert path == folder.figures / "learning_curves.png"
    with Image.open(path) as picture:
        assert picture.width > 1500
    titles = [axis.get_title(loc="left") for axis in drawn[0].axes]
    assert titles == ["loss", "validation accuracy", "loss terms, weighted", "learning rate"]
    source = next(line for line in drawn[0].axes[1].lines if line.get_label() == "source")
    assert list(source.get_xdata()) == [25, 50, 75, 100]
    assert list(source.get_ydata()) == [0.9] * 4
    assert overlaps(drawn[0]) == []


def test_no_curves(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "pacs", "dann", 0)
    with pytest.raises(RunError, match="logged nothing yet"):
        learning_curves(folder.path)
    folder.metrics.write_text("step,epoch,name,value\n0,0,train/loss,nan\n")
    with pytest.raises(RunError, match="no curve to draw"):
        learning_curves(folder.path)


def test_pareto_front() -> None:
    assert pareto_front([0.9, 0.5, 0.7, 0.6], [0.2, 0.9, 0.7, 0.6]) == [1, 2, 0]
    assert pareto_front([0.5, 0.5], [0.5, 0.5]) == [0, 1]  # equal arms do not beat each other
    assert pareto_front([0.5, 0.6], [0.5, 0.5]) == [1]


@pytest.mark.parametrize("dark", [False, True])
def test_tradeoff(tmp_path: Path, drawn: list[Figure], dark: bool) -> None:
    arms = {"probe": (0.55, 0.99), "full": (0.80, 0.70), "l2sp": (0.79, 0.95), "worse": (0.5, 0.6)}
    for arm, (target, source) in arms.items():
        for seed in range(3):
            write_run(tmp_path / "pacs", arm, seed, target + seed / 100, source + seed / 200)
    write_run(tmp_path / "pacs", "never", 0, None, None, status="failed")
    tradeoff(read_records([tmp_path]), tmp_path / "out.png", title="pacs", dark=dark)
    axis = drawn[0].axes[0]
    legend = axis.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == ["full *", "l2sp *", "probe *", "worse"]
    assert axis.get_xlabel() == "source retention: after / before"
    assert axis.get_ylabel() == "target gain: after - before"
    front = axis.lines[0]
    assert list(front.get_xdata()) == pytest.approx([0.705, 0.955, 0.995])
    assert len(axis.containers) == 4
    assert overlaps(drawn[0]) == []


def test_tradeoff_of_single_seeds_and_of_many_arms(tmp_path: Path, drawn: list[Figure]) -> None:
    for i in range(24):
        write_run(tmp_path / "p", f"arm number {i}", 0, 0.5 + i / 100, 0.9 - i / 100)
    tradeoff(read_records([tmp_path]), tmp_path / "out.png")
    marks = {(line.get_marker(), line.get_color()) for line in drawn[0].axes[0].lines if line.get_marker() != "None"}
    assert len(marks) >= 24  # no two arms look alike
    assert overlaps(drawn[0]) == []


def test_tradeoff_without_retention_or_without_anything(tmp_path: Path, drawn: list[Figure]) -> None:
    write_run(tmp_path / "p", "arm", 0, metrics={"target/test/accuracy": 0.5, "source/test/accuracy": 0.8})
    tradeoff(read_records([tmp_path]), tmp_path / "out.png")
    assert drawn[0].axes[0].get_xlabel() == "source accuracy after fine-tuning"
    assert drawn[0].axes[0].get_ylabel() == "target accuracy after fine-tuning"
    write_run(tmp_path / "q", "arm", 0, target=None)
    with pytest.raises(RunError, match="nothing to draw"):
        tradeoff(read_records([tmp_path / "q"]), tmp_path / "out.png")


def test_reports_import_no_torch() -> None:
    modules = ", ".join(f"crossft.reports.{m}" for m in ("records", "stats", "tables", "figures", "final"))
    code = f"import sys, {modules}; print(sorted({{'torch', 'lightning', 'matplotlib.pyplot'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = "import sys, crossft.reports.page; print(sorted({'torch', 'wandb', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", "the page draws its own charts"
