"""The page: what it holds, without a browser (``test_page_browser.py`` looks at it in one)."""

from __future__ import annotations

import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reports.folders import write_curves, write_details, write_run, write_sequence

from crossft.reports.charts import Row, curves, intervals, mark, reliability, scatter, ticks
from crossft.reports.details import (
    Bin,
    Curve,
    config_differences,
    learning_curves,
    ledgers,
    reliabilities,
    transfer_matrices,
)
from crossft.reports.frontier import Tradeoff
from crossft.reports.page import write_page
from crossft.reports.records import read_records
from crossft.reports.stats import Interval, interval
from crossft.runs import MetricsCsv


class Reader(HTMLParser):
    """Asserts that every tag is closed, and notes whatever could fetch something."""

    EMPTY = ("meta", "br", "input")

    def __init__(self) -> None:
        super().__init__()
        self.links: list[tuple[str, str, str]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [(tag, n, v or "") for n, v in attrs if n in ("href", "src", "srcset", "action", "data")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_asks_for_nothing(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "pa<cs>"
    for arm, weight in (("full", None), ("<script>alert(1)</script>", 0.1)):
        for seed in range(2):
            folder = write_run(root, arm, seed, 0.8 + seed / 10)
            write_curves(folder)
            write_details(folder, weight)
    write_run(root, "full", 7, None, None, status="failed", error="loss is <nan> at step 3")
    page = write_page([root], tmp_path / "pages" / "index.html", baseline="full")
    html = page.read_text()
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    assert {(tag, name) for tag, name, _ in reader.links} == {("a", "href")}
    links = [value for _, _, value in reader.links if not value.startswith("#")]
    assert len(links) == 5
    assert all((page.parent / re.sub("%(..)", lambda m: chr(int(m[1], 16)), link)).is_dir() for link in links)
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html
    assert "@import" not in html
    assert html.count("<script>") == 1
    assert "pa&lt;cs&gt;: photo → sketch" in html
    assert "loss is &lt;nan&gt; at step 3" in html
    assert "2, 1 failed" in html
    assert not re.search(r"\$(?!\{)", html), "every place of the template is filled"
    for heading in (
        "Target gain against source retention", "Target accuracy by arm", "Source retention by arm",
        "Calibration: target", "Learning curves: training loss", "Learning curves: target validation accuracy",
        "Statistics: differences", "Config differences", "Learning rate and trainability by phase", "<h2>Runs</h2>",
    ):  # fmt: skip
        assert heading in html, heading


def test_page_of_runs_that_left_nothing_but_summaries(tmp_path: Path) -> None:
    write_run(tmp_path / "pacs", "one", 0, 0.8, None)
    html = write_page([tmp_path], tmp_path / "page.html").read_text()
    assert "Target accuracy by arm" in html
    for heading in ("against source retention", "Learning curves", "Calibration", "Config differences", "by phase"):
        assert heading not in html, heading


def test_charts_say_what_the_tables_say(tmp_path: Path) -> None:
    for seed, target in enumerate((0.7, 0.8, 0.9)):
        write_run(tmp_path / "pacs", "full", seed, target, 0.9)
    html = write_page([tmp_path], tmp_path / "page.html").read_text()
    half = interval([0.7, 0.8, 0.9]).half
    assert f"target accuracy: 0.800 ± {half:.3f} (n=3)" in html
    assert f"target gain: after - before: 0.300 ± {half:.3f} (n=3)" in html
    assert f"0.800 ± {half:.3f}</td>" in html


def places(svg: str, of: str = 'class="dot" transform="translate') -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(re.escape(of) + r"\(([\d.]+) ([\d.]+)\)", svg)]


def test_scatter_puts_points_where_its_axes_say(tmp_path: Path) -> None:
    def at(x: float, y: float) -> tuple[Interval, Interval]:
        return Interval(x, math.nan, math.nan, 1), Interval(y, math.nan, math.nan, 1)

    found = Tradeoff({"a": at(0.8, 0.1), "b": at(0.9, 0.3), "c": at(1.0, 0.2)}, "kept", "gained", ("b", "c"), True)
    svg = scatter(found, {"a": 0, "b": 1, "c": 2})
    (ax, ay), (bx, by), (cx, cy) = places(svg)
    assert bx - ax == pytest.approx(cx - bx, abs=0.2)
    assert ay - cy == pytest.approx(cy - by, abs=0.2)
    grid = {
        text: float(x) for x, text in re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">([\d.]+)<', svg)
    }
    assert grid["0.80"] == pytest.approx(ax, abs=0.2)
    assert f'class="front" d="M{bx:g} {by:g}L{cx:g} {cy:g}"' in svg
    assert all(f">{name}</text>" in svg for name in "abc")


def test_names_in_the_scatter_cover_neither_points_nor_each_other() -> None:
    points = {f"a long arm name {i}": (0.5 + (i * 7 % 60) / 600, 0.5 + (i * 11 % 60) / 1200) for i in range(60)}
    nan = math.nan
    found = Tradeoff(
        {arm: (Interval(x, nan, nan, 1), Interval(y, nan, nan, 1)) for arm, (x, y) in points.items()},
        "x",
        "y",
        (),
        True,
    )
    svg = scatter(found, {arm: i for i, arm in enumerate(points)})
    texts = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">(a long[^<]*)<', svg)
    assert 4 < len(texts) < 60, "some fit, and those that do not are left out"
    boxes = []
    for x, y, anchor, text in texts:
        left = float(x) - 6.1 * len(text) * {"start": 0, "middle": 0.5, "end": 1}[anchor]
        boxes.append((left, float(y) - 10, left + 6.1 * len(text), float(y) + 3))
    boxes += [(x - 4, y - 4, x + 4, y + 4) for x, y in places(svg)]
    for a, b in itertools.combinations(boxes[: len(texts)], 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for a, b in itertools.product(boxes[: len(texts)], boxes[len(texts) :]):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_intervals_far_wider_than_the_arms_lie_apart_are_cut_at_the_frame() -> None:
    rows = [Row("a", Interval(0.5, 0.1, 0.01, 2), (0.49, 0.51)), Row("b", Interval(0.6, 0.1, 5.0, 2), (0.59, 0.61))]
    svg = intervals("accuracy", rows, {"a": 0, "b": 1}, 0.5)
    ends = [(float(a), float(b)) for a, b in re.findall(r'class="bar" d="M([\d.]+) [\d.]+H([\d.]+)"', svg)]
    (left, right), (low, high) = ends
    assert right - left < 60
    assert high == 400 - 14, "the frame's end"
    assert low > 0
    assert places(svg)[0][0] == pytest.approx((left + right) / 2, abs=0.1)
    assert svg.count('class="seed"') == 4


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0.231, 0.262) == [0.24, 0.25, 0.26]
    assert ticks(-3, 12_000) == [0, 2500, 5000, 7500, 10000]
    assert ticks(0.5, 0.5) == [0.5]
    for low, high in ((0.1, 0.9), (1e-5, 3e-5), (-7, 5), (99.2, 99.9)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 7
        assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)


def test_curve_that_never_moves_has_readable_ticks() -> None:
    curve = Curve((1, 2), (0.9, 0.9), (0.9, 0.9), (0.9, 0.9), 1)
    svg = curves("accuracy", {"a": curve}, {"a": 0})
    assert max(map(len, re.findall(r'text-anchor="end">([^<]*)<', svg))) <= 5


def test_no_two_of_64_arms_look_alike() -> None:
    assert len({(mark(arm), arm % 8) for arm in range(64)}) == 64


def test_reliability_shows_the_calibration_error() -> None:
    svg = reliability("target", {"a": [Bin(30, 0.5, 0.4), Bin(70, 0.9, 0.95)]}, {"a": 0})
    assert f"calibration error {0.3 * 0.1 + 0.7 * 0.05:.3f}, 100 test rows of all seeds" in svg
    (small, large) = (float(r) for r in re.findall(r'class="bin"[^>]* r="([\d.]+)"', svg))
    assert (large - 1.5) / (small - 1.5) == pytest.approx((7 / 3) ** 0.5, abs=0.05)


# -- what run folders hold ------------------------------------------------------------------------------------------


def test_learning_curves_are_means_over_seeds(tmp_path: Path) -> None:
    for seed in range(2):
        log = MetricsCsv(write_run(tmp_path / "pacs", "full", seed).metrics)
        for step in range(3 if seed else 4):  # one seed stopped early
            log.append(step, 0, {"train/loss": 1.0 - 0.1 * step + seed, "source/val/accuracy": math.nan})
        log.close()
    write_run(tmp_path / "pacs", "silent", 0)
    curves = learning_curves(read_records([tmp_path]))
    assert list(curves) == ["training loss"]
    curve = curves["training loss"]["full"]
    assert curve.steps == (1, 2, 3)
    assert curve.mean == pytest.approx((1.5, 1.4, 1.3))
    assert curve.low == pytest.approx((1.0, 0.9, 0.8))
    assert curve.high == pytest.approx((2.0, 1.9, 1.8))
    assert curve.seeds == 2


def test_long_curves_are_means_over_spans(tmp_path: Path) -> None:
    log = MetricsCsv(write_run(tmp_path / "pacs", "full", 0).metrics)
    for step in range(600):
        log.append(step, 0, {"train/loss": float(step)})
    log.close()
    curve = learning_curves(read_records([tmp_path]))["training loss"]["full"]
    assert len(curve.steps) == 60
    assert curve.steps[:2] == (10, 20)
    assert curve.mean[:2] == (4.5, 14.5)


def test_matrix_of_sequences_is_the_mean_over_their_seeds(tmp_path: Path) -> None:
    for arm in ("ewc", "plain"):
        for seed in range(2):
            write_sequence(write_run(tmp_path / "pacs", arm, seed), shift=0.1 * seed)
    write_run(tmp_path / "pacs", "no-sequence", 0)
    ewc, plain = transfer_matrices(read_records([tmp_path]))
    assert (ewc.arm, plain.arm, ewc.domains, ewc.seeds) == ("ewc", "plain", ("photo", "art", "sketch"), 2)
    assert ewc.values[1] == pytest.approx([0.75, 0.85, math.nan], nan_ok=True)
    html = write_page([tmp_path], tmp_path / "page.html").read_text()
    assert html.count('class="ledger matrix"') == 2
    assert html.count('<td class="just" style="--h:45">0.950</td>') == 4, "the best value has the deepest tone"
    assert html.count("<td>—</td>") == 2
    assert "ewc: accuracy, 2 seeds" in html


def test_reliability_ledger_and_config_of_run_folders(tmp_path: Path) -> None:
    for arm, weight in (("plain", None), ("l2sp", 0.1), ("strong", 1.0)):
        for seed in range(2):
            write_details(write_run(tmp_path / "pacs", arm, seed), weight, shift=0.1 * seed)
    records = read_records([tmp_path])
    found = reliabilities(records)
    assert list(found) == ["target (sketch)", "source (photo)"]
    assert [b.rows for b in found["target (sketch)"]["l2sp"]] == [20, 40, 140]
    assert [b.accuracy for b in found["target (sketch)"]["l2sp"]] == pytest.approx([0.25, 0.45, 0.85])
    (ledger,) = ledgers(records)
    assert set(ledger.arms) == {"plain", "l2sp", "strong"}
    assert not ledger.differs
    assert [row["lr"] for row in ledger.rows] == ["0.001", "0.01", "0.0001", "0.001"]
    keys, values = config_differences(records)
    assert keys == ["methods.l2sp", "methods.l2sp.weight"]
    assert values["l2sp"] == {"methods.l2sp": "L2SP", "methods.l2sp.weight": "0.1"}
    assert values["plain"] == {}
    html = write_page([tmp_path], tmp_path / "page.html").read_text()
    assert 'class="frozen"' in html
    assert ">1.0e-04</td>" in html
    assert html.count("phase 1<br>from step 50") == 1
