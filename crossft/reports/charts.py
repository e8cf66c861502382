"""Charts as SVG text for the page: they take its colors, need no script, and show their numbers when pointed at.

A chart is 400 units wide, and as wide as its card on the screen. What belongs to an arm is a group with ``data-arm``
and ``data-tip``; the page's script shows, hides and highlights by the first and shows the second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from crossft.reports.details import Bin, Curve
from crossft.reports.frontier import Tradeoff
from crossft.reports.stats import Interval

__all__ = ["Row", "curves", "intervals", "mark", "reliability", "scatter", "ticks"]

WIDTH = 400
_SHAPES = (
    "M{r} 0A{r} {r} 0 1 1 -{r} 0A{r} {r} 0 1 1 {r} 0Z",
    "M-{r} -{r}H{r}V{r}H-{r}Z",
    "M0 -{l}L{l} {r}H-{l}Z",
    "M0 -{l}L{l} 0L0 {l}L-{l} 0Z",
    "M0 {l}L{l} -{r}H-{l}Z",
    "M-{t} -{l}H{t}V-{t}H{l}V{t}H{t}V{l}H-{t}V{t}H-{l}V-{t}H-{t}Z",
    "M0 -{l}L{t} -{t}L{l} 0L{t} {t}L0 {l}L-{t} {t}L-{l} 0L-{t} -{t}Z",
    "M-{r} -{l}H{r}L-{r} {l}H{r}Z",
)
_LETTER = 6.1
"""Mean width of a letter of the labels, in units."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Row:
    """One arm of an interval chart: its mean with interval, each seed's value, and its mark (▲, ▼ or nothing)."""

    arm: str
    value: Interval
    seeds: tuple[float, ...]
    mark: str = ""


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most ``most`` + 1 of them."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def mark(arm: int, radius: float = 4.5) -> str:
    """The shape of arm number ``arm`` as an SVG path around the origin; no two of 64 arms share shape and color."""
    shape = _SHAPES[(arm + arm // 8) % 8]
    sizes = {"r": radius * 0.9, "l": radius * 1.2, "t": radius * 0.4}
    return shape.format(**{name: _n(size) for name, size in sizes.items()})


class _Plot:
    """A frame with linear scales; text is collected and put into one SVG element."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], height: int, box: Box) -> None:
        self.x, self.y, self.height = _spread(x), _spread(y), height
        self.left, self.top, self.right, self.bottom = box
        self.parts: list[str] = []

    def px(self, value: float) -> float:
        return self.left + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - self.left - self.right)

    def py(self, value: float) -> float:
        place = (value - self.y[0]) / (self.y[1] - self.y[0])
        return self.height - self.bottom - place * (self.height - self.top - self.bottom)

    def add(self, *parts: str) -> None:
        self.parts += parts

    def x_axis(self, title: str) -> None:
        low, high = self.top, self.height - self.bottom
        shown = ticks(*self.x)
        for value in shown:
            at = _n(self.px(value))
            self.add(f'<path class="grid" d="M{at} {_n(low)}V{_n(high)}"/>')
            self.add(f'<text x="{at}" y="{_n(high + 17)}" text-anchor="middle">{_tick(value, shown)}</text>')
        middle = _n((self.left + WIDTH - self.right) / 2)
        self.add(f'<text class="axis" x="{middle}" y="{_n(high + 34)}" text-anchor="middle">{escape(title)}</text>')

    def y_axis(self, title: str) -> None:
        shown = ticks(*self.y)
        for value in shown:
            at = self.py(value)
            self.add(f'<path class="grid" d="M{_n(self.left)} {_n(at)}H{_n(WIDTH - self.right)}"/>')
            self.add(f'<text x="{_n(self.left - 6)}" y="{_n(at + 4)}" text-anchor="end">{_tick(value, shown)}</text>')
        self.add(f'<text class="axis" x="2" y="12">{escape(title)}</text>')

    def svg(self, words: str, kind: str = "") -> str:
        body = f'<g class="{kind}">{"".join(self.parts)}</g>' if kind else "".join(self.parts)
        return f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(words)}">{body}</svg>'


def _spread(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = limits
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _limits(values: Iterable[float], halves: Iterable[float], low: float = 0.08) -> tuple[float, float]:
    """A range that holds the values, and their intervals unless these are far wider than the values lie apart."""
    kept = [v for v in values if math.isfinite(v)]
    bottom, top = min(kept), max(kept)
    room = max(top - bottom, 0.02 * max(abs(top), abs(bottom), 1e-9)) * 1.2
    reach = min(max((h for h in halves if math.isfinite(h)), default=0.0), room)
    span, size = top - bottom + 2 * reach, max(abs(top), abs(bottom))
    pad = low * span if span > 1e-6 * size else max(0.05 * size, 1e-3)
    return bottom - reach - pad, top + reach + pad


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _tick(value: float, shown: Sequence[float]) -> str:
    step = shown[1] - shown[0] if len(shown) > 1 else abs(value) or 1.0
    if step >= 1000:
        return f"{value / 1000:g}k"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    digits += abs(round(step * 10**digits) - step * 10**digits) > 1e-6
    return f"{value:.{digits}f}"


def _said(value: Interval) -> str:
    half = f" ± {value.half:.3f}" if math.isfinite(value.half) else ""
    return f"{value.mean:.3f}{half} (n={value.n})"


def _group(arm: int, tip: str, body: str) -> str:
    return f'<g class="arm c{arm % 8}" data-arm="{arm}" data-tip="{escape(tip)}">{body}</g>'


def _dot(arm: int, x: float, y: float, radius: float = 4.5) -> str:
    return f'<path class="dot" transform="translate({_n(x)} {_n(y)})" d="{mark(arm, radius)}"/>'


def scatter(found: Tradeoff, number: Mapping[str, int]) -> str:
    """Target against source retention: points with intervals, the Pareto front as a line, names where they fit.

    Args:
        found: the arms.
        number: each arm's number on the page, which gives its color and shape.
    """
    xs, ys = [x for x, _ in found.points.values()], [y for _, y in found.points.values()]
    box = _Plot(
        _limits([x.mean for x in xs], [x.half for x in xs]),
        _limits([y.mean for y in ys], [y.half for y in ys]),
        min(520, max(320, 180 + 44 * len(xs))),
        (44.0, 24.0, 12.0, 40.0),
    )
    box.x_axis(found.x_label)
    box.y_axis(found.y_label)
    front = [found.points[arm] for arm in found.front]
    line = "L".join(f"{_n(box.px(x.mean))} {_n(box.py(y.mean))}" for x, y in front)
    box.add(f'<path class="front" d="M{line}"/>')
    points = {arm: (box.px(x.mean), box.py(y.mean)) for arm, (x, y) in found.points.items()}
    names = _placed(points, found.front, (box.left, box.top, WIDTH - box.right, box.height - box.bottom))
    for arm, (x, y) in found.points.items():
        at = points[arm]
        bars = _bar(box.px, x, at[1], (box.left, WIDTH - box.right), "M{0} {2}H{1}")
        bars += _bar(box.py, y, at[0], (box.height - box.bottom, box.top), "M{2} {0}V{1}")
        tip = f"{arm}\n{found.x_label}: {_said(x)}\n{found.y_label}: {_said(y)}"
        tip += "\nPareto front: no arm is better in both" if arm in found.front else ""
        box.add(_group(number[arm], tip, bars + _dot(number[arm], *at)))
    box.add(*(_group(number[arm], arm, text) for arm, text in names.items()))
    return box.svg(f"{found.y_label} against {found.x_label}, one point an arm", "cross")


def _bar(scale: object, value: Interval, across: float, ends: tuple[float, float], path: str) -> str:
    """An error bar, cut at the frame."""
    if not math.isfinite(value.half) or not callable(scale):
        return ""
    low, high = sorted(ends)
    a, b = sorted((float(scale(value.mean - value.half)), float(scale(value.mean + value.half))))
    text = path.format(_n(min(max(a, low), high)), _n(min(max(b, low), high)), _n(across))
    return f'<path class="bar" d="{text}"/>'


def _placed(points: Mapping[str, tuple[float, float]], first: Sequence[str], frame: Box) -> dict[str, str]:
    """Names beside their points, the front's first; a name that would cover another thing is left out."""
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in points.values()]
    found = {}
    for arm in [*reversed(first), *(a for a in points if a not in first)]:
        x, y = points[arm]
        width = _LETTER * len(arm)
        for left, base, anchor in (
            (x + 9, y + 4, "start"),
            (x - 9, y + 4, "end"),
            (x, y - 10, "middle"),
            (x, y + 18, "middle"),
        ):
            start = left - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
            area = (start, base - 10, start + width, base + 3)
            inside = area[0] >= frame[0] and area[2] <= frame[2] and area[1] >= frame[1] and area[3] <= frame[3]
            if inside and not any(_cross(area, other) for other in taken):
                taken.append(area)
                found[arm] = f'<text x="{_n(left)}" y="{_n(base)}" text-anchor="{anchor}">{escape(arm)}</text>'
                break
    return found


def _cross(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def intervals(title: str, rows: Sequence[Row], number: Mapping[str, int], reference: float | None = None) -> str:
    """One metric by arm: mean, 95 % interval, and a faint dot a seed; ``reference`` is the baseline's mean."""
    values = [v for row in rows for v in (row.value.mean, *row.seeds)]
    longest = max(len(row.arm) + 2 * bool(row.mark) for row in rows)
    left = min(150.0, 14 + _LETTER * longest)
    letters = int((left - 14) / _LETTER)
    height = 58 + 22 * len(rows)
    box = _Plot(_limits(values, [r.value.half for r in rows]), (0, len(rows)), height, (left, 10.0, 14.0, 40.0))
    box.x_axis(title)
    if reference is not None:
        at = _n(box.px(reference))
        box.add(f'<path class="reference" d="M{at} {_n(box.top)}V{_n(height - box.bottom)}"/>')
    for place, row in enumerate(rows):
        y = box.py(len(rows) - place - 0.5)
        name = row.arm if len(row.arm) + 2 * bool(row.mark) <= letters else row.arm[: letters - 3] + "…"
        text = (
            f'<text class="name" x="{_n(left - 8)}" y="{_n(y + 4)}" text-anchor="end">{escape(name)} {row.mark}</text>'
        )
        seeds = "".join(f'<circle class="seed" cx="{_n(box.px(v))}" cy="{_n(y)}" r="2.5"/>' for v in row.seeds)
        bar = _bar(box.px, row.value, y, (left, WIDTH - box.right), "M{0} {2}H{1}")
        tip = f"{row.arm}\n{title}: {_said(row.value)}"
        tip += {"▲": "\nbetter than the baseline (Holm)", "▼": "\nworse than the baseline (Holm)"}.get(row.mark, "")
        box.add(_group(number[row.arm], tip, text + bar + seeds + _dot(number[row.arm], box.px(row.value.mean), y)))
    return box.svg(f"{title} by arm, with 95 % intervals")


def curves(title: str, found: Mapping[str, Curve], number: Mapping[str, int]) -> str:
    """A learning curve an arm: the mean over seeds, in the band of their smallest and largest value."""
    steps = [s for c in found.values() for s in c.steps]
    values = [v for c in found.values() for v in (*c.low, *c.high)]
    x, y = (0.0, float(max(steps))), _limits(values, [], 0.05)
    box = _Plot(x, y, 260, (44.0, 24.0, 12.0, 40.0))
    box.x_axis("optimizer step")
    box.y_axis(title)
    for arm, curve in found.items():
        over = [f"{_n(box.px(s))} {_n(box.py(v))}" for s, v in zip(curve.steps, curve.high)]
        under = [f"{_n(box.px(s))} {_n(box.py(v))}" for s, v in zip(curve.steps, curve.low)]
        band = f'<path class="band" d="M{"L".join(over + under[::-1])}Z"/>' if curve.seeds > 1 else ""
        line = "L".join(f"{_n(box.px(s))} {_n(box.py(v))}" for s, v in zip(curve.steps, curve.mean))
        ends = _dot(number[arm], box.px(curve.steps[-1]), box.py(curve.mean[-1]), 3.5)
        tip = f"{arm}\n{title} at step {curve.steps[-1]}: {curve.mean[-1]:.3f}, mean of {curve.seeds} seeds"
        box.add(_group(number[arm], tip, f'{band}<path class="line" d="M{line}"/>{ends}'))
    return box.svg(f"{title} over training, one line an arm")


def reliability(title: str, found: Mapping[str, Sequence[Bin]], number: Mapping[str, int]) -> str:
    """Accuracy against confidence, one line an arm; a dot's area is its share of the rows, the diagonal is perfect."""
    box = _Plot((0.0, 1.0), (0.0, 1.0), 330, (44.0, 24.0, 12.0, 40.0))
    box.x_axis(f"confidence, {title}")
    box.y_axis("accuracy")
    box.add(f'<path class="reference" d="M{_n(box.px(0))} {_n(box.py(0))}L{_n(box.px(1))} {_n(box.py(1))}"/>')
    for arm, bins in found.items():
        total = sum(b.rows for b in bins)
        places = [(box.px(b.confidence), box.py(b.accuracy), 1.5 + 9 * math.sqrt(b.rows / total)) for b in bins]
        line = "L".join(f"{_n(x)} {_n(y)}" for x, y, _ in places)
        dots = "".join(f'<circle class="bin" cx="{_n(x)}" cy="{_n(y)}" r="{_n(r)}"/>' for x, y, r in places)
        error = sum(b.rows * abs(b.confidence - b.accuracy) for b in bins) / total
        tip = f"{arm}\ncalibration error {error:.3f}, {total} test rows of all seeds"
        box.add(_group(number[arm], tip, f'<path class="line" d="M{line}"/>{dots}'))
    return box.svg(f"Reliability on {title}: accuracy against confidence")
