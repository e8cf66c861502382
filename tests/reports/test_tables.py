import csv
import io
import re
from pathlib import Path

import pytest
from reports.folders import write_run
from rich.console import Console

from crossft.errors import ConfigError
from crossft.reports.final import final_rows, final_table
from crossft.reports.records import read_records
from crossft.reports.tables import ArmTable, compare, label, text_of

NOISE = (0.00, 0.01, -0.01, 0.02, -0.02, 0.005, -0.005, 0.0)


@pytest.fixture
def table(tmp_path: Path) -> ArmTable:
    root = tmp_path / "pacs"
    for seed, noise in enumerate(NOISE):
        write_run(root, "base", seed, 0.7 + noise, 0.8)
        write_run(root, "better_one", seed, 0.8 + noise / 2, 0.7)
        write_run(root, "same", seed, 0.7 - noise, 0.8)
    write_run(root, "same", 99, None, None, status="failed", error="loss is nan")
    return compare(read_records([root]), baseline="base")[0]


def test_means_and_marks(table: ArmTable) -> None:
    assert list(table.runs.items()) == [("base", "8"), ("better_one", "8"), ("same", "8, 1 failed")]
    cell = table.cells["better_one", "target/test/accuracy"]
    assert cell.value.mean == pytest.approx(0.8)
    assert cell.value.n == 8
    assert cell.comparison is not None
    assert cell.comparison.p == 2 / 256
    assert cell.p_holm == 4 / 256  # two arms are compared
    assert cell.better is True
    assert table.cells["better_one", "source/retention"].better is False
    assert table.cells["same", "target/test/accuracy"].better is None
    assert table.cells["base", "target/test/accuracy"].comparison is None


def test_lower_is_better_for_errors(tmp_path: Path) -> None:
    for seed in range(8):
        write_run(tmp_path / "p", "base", seed, metrics={"target/test/mae": 2.0 + seed / 10}, primary={"target": "mae"})
        write_run(tmp_path / "p", "arm", seed, metrics={"target/test/mae": 1.0 + seed / 10}, primary={"target": "mae"})
    table = compare(read_records([tmp_path]), "base")[0]
    assert table.metrics[0] == "target/test/mae"
    assert table.cells["arm", "target/test/mae"].better is True
    assert label("target/test/mae") == "target mae ↓"
    assert label("source/retention") == "source retention"
    assert label("source/test/accuracy/before") == "source accuracy before"


def test_markdown(table: ArmTable) -> None:
    lines = table.markdown().splitlines()
    assert lines[0] == "**pacs: photo → sketch**"
    assert lines[2] == "| arm | runs | target accuracy | target gain | source accuracy | source retention |"
    assert lines[4].startswith("| base (baseline) | 8 | 0.700 ± 0.010 | 0.200 ± 0.010 | 0.800 ± 0.000 |")
    assert lines[5].startswith("| better_one | 8 | 0.800 ± 0.005 ▲ |")
    assert lines[6].startswith("| same | 8, 1 failed | 0.700 ± 0.010 |")


def test_latex_is_escaped_and_complete(table: ArmTable) -> None:
    text, statistics = table.latex().split("\\end{tabular}\n")[:2]
    assert r"better\_one & 8 & 0.800 $\pm$ 0.005$^{+}$ &" in text
    assert text.count(r"\\") == 4
    body = text[text.index(r"\begin") :]
    assert body.isascii()
    assert all(line.count("&") == 5 for line in body.splitlines() if "&" in line)
    rows = [line for line in statistics.splitlines() if "&" in line and not line.startswith("%")]
    assert len(rows) == 1 + 3 * 4
    assert all(line.count("&") == 12 for line in rows)
    mean, sd, half, n = table.cells["better_one", "target/test/accuracy"].value
    assert rf"target accuracy & better\_one & {mean:.4f} & {sd:.4f} & {half:.4f} & {n} & +0.1000 &" in statistics
    assert statistics[statistics.index(r"\begin") :].isascii()


def test_csv_is_at_full_precision(table: ArmTable) -> None:
    rows = list(csv.DictReader(io.StringIO(text_of([table], "csv"))))
    assert len(rows) == 3 * 4
    row = next(r for r in rows if r["arm"] == "better_one" and r["metric"] == "target/test/accuracy")
    assert float(row["mean"]) == table.cells["better_one", "target/test/accuracy"].value.mean
    assert float(row["p_holm"]) == 4 / 256
    assert next(r for r in rows if r["arm"] == "base")["p"] == ""


@pytest.mark.parametrize("width", [70, 80, 120])
def test_terminal_table_loses_no_digit(table: ArmTable, width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    console.print(table.rich())
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    assert shown.count("0.010") == 4
    assert len(re.findall(r"▲", shown)) == 2 + 1  # two columns, and the note that explains the mark


def test_statistics_say_what_they_are_and_what_the_cells_hold(table: ArmTable) -> None:
    heads, rows = table.statistics_heads(), list(table.statistics())
    assert all(len(row) == len(heads) for row in rows)
    found = dict(zip(heads[6:], next(row for row in rows if row[:2] == ["target accuracy", "better_one"])[6:]))
    cell = table.cells["better_one", "target/test/accuracy"]
    assert cell.comparison is not None
    assert found["p"] == f"{2 / 256:.4f}"
    assert found["p Holm"] == f"{4 / 256:.4f}"
    assert found["d_z"] == f"{cell.comparison.d_z:+.1f}" if cell.comparison.d_z >= 10 else f"{cell.comparison.d_z:+.4f}"
    assert float(found["g"]) < float(found["d_z"])
    assert next(row for row in rows if row[1] == "base")[6:] == [""] * 7
    text = table.markdown()
    for word in ("standard deviation", "Student t", "sign-flip permutation", "Holm", "Cohen's d", "Hedges'"):
        assert word in text, word
    console = Console(width=100, file=io.StringIO())
    console.print(table.rich_statistics())
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "…" not in shown
    assert f"{2 / 256:.4f}" in shown


def test_statistics_without_a_baseline_have_no_differences(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / "p", "arm", seed, 0.5 + seed / 10)
    table = compare(read_records([tmp_path]))[0]
    assert table.statistics_heads() == ["metric", "arm", "mean", "sd", "±", "n"]
    assert next(table.statistics()) == ["target accuracy", "arm", "0.5500", "0.0707", "0.6353", "2"]


def test_few_seeds_are_told_what_they_cannot_show(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path / "p", "base", seed, 0.5)
        write_run(tmp_path / "p", "arm", seed, 0.9)
    table = compare(read_records([tmp_path]), "base")[0]
    assert table.cells["arm", "target/gain"].better is None
    assert any("With 3 paired seeds no mark is possible; 6 are needed for 1 arm" in note for note in table.notes)


def test_shared_source_repeated_seed_and_missing_baseline_are_noted(tmp_path: Path) -> None:
    root = tmp_path / "p"
    for seed in range(2):
        write_run(root, "arm", seed, 0.6, parent="runs/p/source-1f3a")
    write_run(tmp_path / "again", "arm", 0, 0.9, experiment="p")
    write_run(root, "base", 0, None, None, status="failed")
    table = compare(read_records([tmp_path]), "base")[0]
    notes = " ".join(table.notes)
    assert "share their source model: the intervals are conditional" in notes
    assert "several runs of one seed" in notes
    assert "No run of the baseline base finished" in notes
    assert table.cells["arm", "target/test/accuracy"].value.mean == pytest.approx((0.9 + 0.6) / 2)


def test_gain_against_the_baseline_is_noted(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / "p", "base", seed, metrics={"target/test/accuracy": 0.5})
        write_run(tmp_path / "p", "dann", seed, metrics={"target/test/accuracy": 0.6})
    table = compare(read_records([tmp_path]), "base")[0]
    assert table.metrics == ("target/test/accuracy", "target/gain")
    assert table.cells["dann", "target/gain"].value.mean == pytest.approx(0.1)
    assert any("gain and retention are against base" in note for note in table.notes)
    assert not any("against base" in n for n in compare(read_records([tmp_path]))[0].notes)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "p", "arm", 0)
    records = read_records([tmp_path])
    with pytest.raises(ConfigError, match=r"baseline='nobody' is not an arm of these runs; they have arm"):
        compare(records, "nobody")
    with pytest.raises(ConfigError, match=r"no run has 'target/test/f1'; they have .*target/test/accuracy"):
        compare(records, metrics=["target/test/f1"])


def test_final_table(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "pacs", "full", 0, 0.81, 0.97)
    rows = final_rows(folder.summary())
    assert [r[:2] for r in rows] == [("target", "accuracy"), ("source", "accuracy")]
    assert rows[0][2:] == pytest.approx((0.5, 0.81, 0.31, 1.62))
    assert rows[1][2:] == pytest.approx((1.0, 0.97, -0.03, 0.97))
    folder.write_summary(metrics={"target/test/accuracy/before": None, "target/test/loss": 0.4})
    console = Console(width=100, file=io.StringIO())
    console.print(final_table(folder.summary(), every=True))
    assert isinstance(console.file, io.StringIO)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert "target (sketch) accuracy — 0.810 — —" in lines
    assert "target (sketch) loss ↓ — 0.400 — —" in lines
    assert "source (photo) accuracy 1.000 0.970 -0.030 0.970" in lines
