"""Figures as data: what to draw, the sentence that it shows, and the same in a table."""

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from longspan.report import summary
from longspan.report.summary import Comparison, Row, Series, listing

# Up to this many, each mechanism has a look of its own; above, each family has one.
MOST_LOOKS = 12
MOST_LABELS = 6
COLOURS = 7
SYMBOLS = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "triangle-down",
    "cross",
    "x",
    "star",
)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
INK = -1


@dataclass(frozen=True)
class Look:
    """One entry of the key: never a colour alone."""

    label: str
    members: Sequence[str]
    colour: int
    symbol: str
    dash: str


@dataclass(frozen=True)
class Figure:
    """One plot; `drawing` is what report.js draws, the rest is read without it."""

    id: str
    title: str
    takeaway: str
    drawing: Mapping[str, Any]
    header: Sequence[str]
    body: Sequence[Sequence[str]]
    wide: bool = False


def looks(comparison: Comparison) -> list[Look]:
    """The key: dense attention in the colour of the text, then the others in their order."""
    dense = comparison.dense
    others = [row for row in comparison.ranked if row.done and row is not dense]
    groups: dict[str, list[str]] = {}
    for row in others:
        by_family = len(others) >= MOST_LOOKS
        groups.setdefault(row.family if by_family else row.label, []).append(row.label)
    key = [] if dense is None else [Look(dense.label, [dense.label], INK, "hexagon", "solid")]
    for i, (label, members) in enumerate(groups.items()):
        # Seven and eight have no common factor: no pair of colour and symbol returns before 56.
        symbol = SYMBOLS[i % len(SYMBOLS)]
        key.append(Look(label, members, i % COLOURS, symbol, DASHES[(i + 1) % len(DASHES)]))
    return key


def figures(comparison: Comparison, choice: str | None) -> dict[str, list[Figure]]:
    """The figures that have something to show, by section."""
    sections = {
        "Quality against cost": [
            _pareto_training(comparison, choice),
            _pareto_state(comparison, choice),
            _pareto_peak(comparison, choice),
        ],
        "Cost against length": [
            _prefill(comparison, choice),
            _step(comparison, choice),
            _state(comparison, choice),
        ],
        "Use of context, and learning": [
            _by_position(comparison, choice),
            _learning(comparison, choice),
        ],
    }
    shown = {title: [f for f in found if f is not None] for title, found in sections.items()}
    return {title: found for title, found in shown.items() if found}


Unit = Literal["length", "seconds", "bytes", "rate", "tokens"]
_WRITTEN: Mapping[Unit, Callable[[float], str]] = {
    "length": summary.length,
    "seconds": summary.seconds,
    "bytes": summary.size,
    "rate": lambda v: _short(v),
    "tokens": lambda v: _short(v),
}


def _short(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _tick(value: float, unit: Unit) -> str:
    """A round value without the noughts that a measured one is written with."""
    return re.sub(r"\.0+(?= |$)", "", _WRITTEN[unit](value))


def _size_beside(value: float, other: float) -> str:
    """A size in the unit that `other` is written in."""
    scale = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}
    name = summary.size(other).rsplit(" ", 1)[1]
    return f"{value / scale[name]:,g} {name}"


def _log_axis(title: str, unit: Unit, values: Sequence[float], *, line: bool) -> dict[str, Any]:
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.04 if line else 0.08, (0.03 if line else 0.09) * (high - low))
    low, high = low - margin, high + margin
    written = None
    if unit != "length" and high - low < 0.6:
        ticks = _even(10.0**low, 10.0**high, 1024 if unit == "bytes" else 1000)
        # Close together, sizes are read in one unit: 800, 1,000, 1,200 MiB.
        written = [_size_beside(tick, ticks[0]) for tick in ticks] if unit == "bytes" else None
    elif unit in ("length", "bytes"):
        first, last = math.ceil(low / math.log10(2)), math.floor(high / math.log10(2))
        every = max(1, math.ceil((last - first + 1) / 6))
        ticks = [2.0**k for k in range(first, last + 1, every)]
    else:
        decades = range(math.floor(low), math.ceil(high) + 1)
        leading = (1,) if high - low > 2.5 else (1, 3) if high - low > 1.2 else (1, 2, 3, 5, 7)
        ticks = [d * 10.0**k for k in decades for d in leading if low <= math.log10(d) + k <= high]
    return {
        "title": title,
        "type": "log",
        "range": [low, high],
        "tickvals": ticks,
        "ticktext": written or [_tick(tick, unit) for tick in ticks],
    }


def _even(low: float, high: float, base: int) -> list[float]:
    """Four to nine evenly spaced values between two that lie close together."""
    unit = float(base) ** math.floor(math.log(low, base))
    rough = (high - low) / unit / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = unit * max(m * power for m in (1, 2, 5) if m * power <= rough)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _linear_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return {"title": title, "type": "linear", "range": [low - margin, high + margin]}


def _notable(comparison: Comparison, choice: str | None, first: Sequence[str]) -> set[str]:
    """Which are named in the plot itself: all while they are few."""
    rows = comparison.finished
    if len(rows) <= MOST_LOOKS:
        return {row.label for row in rows}
    named = [choice] if choice else []
    named += [comparison.dense.label] if comparison.dense else []
    named += [label for label in first if label not in named]
    return set(named[:MOST_LABELS])


def _pareto(
    comparison: Comparison,
    choice: str | None,
    *,
    id: str,
    title: str,
    axis: str,
    unit: Unit,
    better: Literal["low", "high"],
    adjective: str,
    costs: Mapping[str, float | None],
    wide: bool = False,
) -> Figure | None:
    points = [(row, x, row.bits) for row in comparison.scored if (x := costs.get(row.label))]
    if not points:
        return None
    sign = -1.0 if better == "high" else 1.0
    frontier: list[tuple[Row, float, float]] = []
    for row, x, bits in sorted(points, key=lambda p: (sign * p[1], p[2] or 0.0)):
        if not frontier or (bits or 0.0) < frontier[-1][2]:
            frontier.append((row, x, bits or 0.0))
    names = [row.label for row, _, _ in frontier]
    # Left to right, so that the corners of the steps lie where nothing is dominated.
    across = sorted(frontier, key=lambda p: p[1])
    write = summary.figures if unit == "rate" else _WRITTEN[unit]
    drawing = {
        "kind": "points",
        "x": _log_axis(axis, unit, [x for _, x, _ in points], line=False),
        "y": _linear_axis("bits per byte", [end for row, _, _ in points for end in row.extremes]),
        "better": better,
        "frontier": {
            "x": [x for _, x, _ in across],
            "y": [bits for _, _, bits in across],
            "shape": "vh" if better == "high" else "hv",
        },
        "series": [
            {
                "of": row.label,
                "x": [x],
                "y": [bits],
                "text": [
                    f"<b>{html.escape(row.label)}</b><br>{summary.bits(bits or 0)} bits per byte"
                    f"<br>{axis}: {write(x)}"
                ],
                "error": [row.extremes[1] - (bits or 0), (bits or 0) - row.extremes[0]],
            }
            for row, x, bits in points
        ],
        "named": sorted(_notable(comparison, choice, names)),
        "chosen": choice,
    }
    if len(points) == 1:
        takeaway = f"Only {names[0]} has both figures."
    else:
        takeaway = (
            f"Nothing is both better and {adjective} than {listing(names)}: "
            f"{len(names)} of {len(points)} {'is' if len(names) == 1 else 'are'} on the frontier."
        )
    body = [
        [row.label, summary.bits(bits or 0), write(x),
         "yes" if row.label in names else "no"]
        for row, x, bits in points
    ]  # fmt: skip
    header = ["Mechanism", "Bits per byte", axis[0].upper() + axis[1:], "On the frontier"]
    return Figure(id, title, takeaway, drawing, header, body, wide)


def _pareto_training(comparison: Comparison, choice: str | None) -> Figure | None:
    return _pareto(
        comparison,
        choice,
        id="quality-training",
        title="Quality against training speed",
        axis="training tokens a second",
        unit="rate",
        better="high",
        adjective="faster to train",
        costs={r.label: r.mean("speed", "train_tokens_per_second") for r in comparison.scored},
        wide=True,
    )


def _pareto_state(comparison: Comparison, choice: str | None) -> Figure | None:
    shared = comparison.shared_length(lambda r: r.state)
    return _pareto(
        comparison,
        choice,
        id="quality-state",
        title="Quality against state",
        axis=f"state after {summary.length(shared or 0.0)} tokens",
        unit="bytes",
        better="low",
        adjective="smaller in state",
        costs=comparison.at_shared_length(lambda r: r.state),
    )


def _pareto_peak(comparison: Comparison, choice: str | None) -> Figure | None:
    return _pareto(
        comparison,
        choice,
        id="quality-peak",
        title="Quality against peak memory",
        axis="peak memory of the run",
        unit="bytes",
        better="low",
        adjective="lighter in memory",
        costs={row.label: row.mean("memory", "peak_bytes") for row in comparison.scored},
    )


def _curves(
    comparison: Comparison,
    choice: str | None,
    curve: Callable[[Row], Series],
    *,
    id: str,
    title: str,
    takeaway: Callable[[list[tuple[Row, Series]]], str],
    x: tuple[str, Unit],
    y: tuple[str, Unit | None],
    wide: bool = False,
    extra: tuple[str, Callable[[Row], str]] | None = None,
) -> Figure | None:
    write = _WRITTEN[y[1]] if y[1] else summary.bits
    positive = [
        (row, [(a, b) for a, b in curve(row) if a > 0 and (b > 0 or y[1] is None)])
        for row in comparison.ranked
    ]
    drawn = [(row, points) for row, points in positive if points]
    if not drawn:
        return None
    xs = sorted({a for _, points in drawn for a, _ in points})
    ys = [b for _, points in drawn for _, b in points]
    best_last = [row.label for row, points in sorted(drawn, key=lambda d: d[1][-1][1])]
    drawing = {
        "kind": "lines",
        "x": _log_axis(x[0], x[1], xs, line=True),
        "y": _log_axis(y[0], y[1], ys, line=True) if y[1] else _linear_axis(y[0], ys),
        "series": [
            {
                "of": row.label,
                "x": [a for a, _ in points],
                "y": [b for _, b in points],
                "text": [
                    f"<b>{html.escape(row.label)}</b><br>{write(b)} at {_WRITTEN[x[1]](a)}"
                    for a, b in points
                ],
                "after": extra[1](row) if extra else "",
            }
            for row, points in drawn
        ],
        "named": sorted(_notable(comparison, choice, best_last)),
        "chosen": choice,
    }
    # Curves of training are recorded where each run happened to look: too many to be columns.
    columns = xs if len(xs) <= 24 else [xs[round(i * (len(xs) - 1) / 11)] for i in range(12)]
    header = ["Mechanism", *(_WRITTEN[x[1]](a) for a in columns), *([extra[0]] if extra else [])]
    body = [
        [row.label, *(_nearest(points, a, columns is xs, write) for a in columns),
         *([extra[1](row)] if extra else [])]
        for row, points in drawn
    ]  # fmt: skip
    return Figure(id, title, takeaway(drawn), drawing, header, body, wide)


def _nearest(points: Series, at: float, exact: bool, write: Callable[[float], str]) -> str:
    """The value at a column: that point, or the last one before it."""
    before = [b for a, b in points if (a == at if exact else a <= at)]
    return write(before[-1]) if before else "–"


def _exponent(row: Row) -> str:
    return str(row.fit) if row.fit else "–"


def _prefill(comparison: Comparison, choice: str | None) -> Figure | None:
    def takeaway(drawn: list[tuple[Row, Series]]) -> str:
        fitted = sorted((row for row, _ in drawn if row.fit), key=lambda r: r.fit.exponent)  # pyright: ignore
        if not fitted:
            return "Too few lengths were measured to fit how the time grows."
        dense, slowest = comparison.dense, fitted[0]
        if dense is None or not dense.fit:
            return f"{slowest.label} grows slowest, as {slowest.fit}."
        if slowest is dense:
            return f"Nothing grows more slowly than dense attention, which grows as {dense.fit}."
        return (
            f"Dense attention grows as {dense.fit}; {slowest.label} grows slowest, "
            f"as {slowest.fit}."
        )

    return _curves(
        comparison,
        choice,
        lambda row: row.prefill,
        id="prefill",
        title="Time to read a sequence (prefill)",
        takeaway=takeaway,
        x=("length in tokens (k = 1,024)", "length"),
        y=("time to read it", "seconds"),
        wide=True,
        extra=("Fitted growth, longer half", _exponent),
    )


def _growth(what: str) -> Callable[[list[tuple[Row, Series]]], str]:
    def takeaway(drawn: list[tuple[Row, Series]]) -> str:
        long = [(row, points[-1][1] / points[0][1]) for row, points in drawn if len(points) > 1]
        if not long:
            return f"{what} was measured at one length only."
        flat = [row.label for row, growth in long if growth < 1.25]
        if not flat:
            return f"{what} grows with the length for all of them."
        if len(flat) == len(long):
            return f"{what} stays the same at every length for all of them."
        return (
            f"{what} stays the same at every length for {listing(flat)}; for the others it grows."
        )

    return takeaway


def _step(comparison: Comparison, choice: str | None) -> Figure | None:
    return _curves(
        comparison,
        choice,
        lambda row: row.step,
        id="step",
        title="Time for one more token (step)",
        takeaway=_growth("The time of a step"),
        x=("tokens before it (k = 1,024)", "length"),
        y=("time of one step", "seconds"),
    )


def _state(comparison: Comparison, choice: str | None) -> Figure | None:
    return _curves(
        comparison,
        choice,
        lambda row: row.state,
        id="state",
        title="State carried while decoding",
        takeaway=_growth("The state"),
        x=("tokens seen (k = 1,024)", "length"),
        y=("size of the state", "bytes"),
    )


def _by_position(comparison: Comparison, choice: str | None) -> Figure | None:
    def takeaway(drawn: list[tuple[Row, Series]]) -> str:
        gains = [(row, points[0][1] - points[-1][1]) for row, points in drawn if len(points) > 1]
        if not gains:
            return "The loss was measured over one span of positions only."
        row, gain = max(gains, key=lambda g: g[1])
        if gain <= 0:
            return "None predicts late positions better than early ones: none uses its context."
        best = min(drawn, key=lambda d: d[1][-1][1])[0]
        return (
            f"{row.label} gains most from context, {summary.bits(gain)} bits from the first "
            f"positions to the last"
            + ("; it" if best is row else f"; {best.label}")
            + " predicts the last best."
        )

    return _curves(
        comparison,
        choice,
        lambda row: row.by_position,
        id="by-position",
        title="Loss by position",
        takeaway=takeaway,
        x=("position in the sequence (k = 1,024)", "length"),
        y=("bits per byte", None),
    )


def _learning(comparison: Comparison, choice: str | None) -> Figure | None:
    def takeaway(drawn: list[tuple[Row, Series]]) -> str:
        fell = [
            row.label
            for row, p in drawn
            if len(p) >= 4 and p[-1][1] < (1 - summary.NOISE) * p[-1 - len(p) // 4][1]
        ]
        if not fell:
            return "By the end of the budget none improved by more than 2 % over its last quarter."
        return f"Still improving when the budget ended: {listing(fell)}."

    return _curves(
        comparison,
        choice,
        lambda row: row.curve,
        id="learning",
        title="Learning curves",
        takeaway=takeaway,
        x=("tokens trained on", "tokens"),
        y=("bits per byte", None),
    )
