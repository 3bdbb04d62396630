"""Records → rows: one a mechanism, averaged over its seeds; whatever is missing stays missing."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

BASELINE = "multi-head-attention"
# Quality closer than this is called a tie even where the seeds agree better by luck.
NOISE = 0.02

Series = list[tuple[float, float]]


def part(record: object, *path: str) -> Any:
    """What lies at `path` in nested mappings, or None where anything on the way is missing."""
    for name in path:
        record = record.get(name) if isinstance(record, Mapping) else None
    return record


def number(value: object) -> float | None:
    """`value` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def numbers(values: Iterable[object]) -> list[float]:
    """Those of `values` that are finite numbers."""
    return [x for value in values if (x := number(value)) is not None]


def entries(record: object, *path: str) -> list[Mapping[str, Any]]:
    """The mappings in the list that lies at `path`."""
    found = part(record, *path)
    return [e for e in found if isinstance(e, Mapping)] if isinstance(found, list) else []


STRAIGHT = 0.9


@dataclass(frozen=True)
class Fit:
    """seconds ∝ length^exponent over the longer half of the lengths."""

    exponent: float
    r2: float
    points: int

    def __str__(self) -> str:
        sure = f"R² {self.r2:.3f}, {self.points} points" if self.points > 2 else "2 points only"
        return f"L^{self.exponent:.2f} ({sure})"


def fit(series: Series) -> Fit | None:
    """Least squares of log y on log x over the longer half of the points, at least two.

    None too where the points lie on no line (R² below `STRAIGHT`): noise has no exponent.
    """
    positive = [(math.log(x), math.log(y)) for x, y in sorted(series) if x > 0 and y > 0]
    half = positive[min(len(positive) // 2, max(len(positive) - 2, 0)) :]
    if len(half) < 2 or half[0][0] == half[-1][0]:
        return None
    xs, ys = zip(*half, strict=True)
    slope, _ = statistics.linear_regression(xs, ys)
    constant = max(ys) - min(ys) < 1e-12
    r2 = 1.0 if constant else statistics.correlation(xs, ys) ** 2
    return Fit(slope, r2, len(half)) if r2 >= STRAIGHT else None


@dataclass(frozen=True)
class Row:
    """One mechanism with one set of arguments; `records` holds the last record of each seed."""

    id: str
    label: str
    records: Sequence[Mapping[str, Any]]

    @cached_property
    def done(self) -> list[Mapping[str, Any]]:
        return [r for r in self.records if r.get("status") == "done"]

    @property
    def status(self) -> str:
        if self.done:
            return "done"
        return "failed" if any(r.get("status") == "failed" for r in self.records) else "refused"

    @property
    def reason(self) -> str:
        """Why it did not finish."""
        given = [str(r["reason"]) for r in self.records if r.get("reason")]
        return given[-1] if given else "no reason was recorded"

    @cached_property
    def card(self) -> Mapping[str, Any]:
        return next((c for r in self.records if isinstance(c := r.get("card"), Mapping)), {})

    @property
    def family(self) -> str:
        return str(self.card.get("family") or "unknown family")

    @property
    def causality(self) -> str | None:
        stated = self.card.get("causality")
        return stated if isinstance(stated, str) else None

    @property
    def seeds(self) -> list[Any]:
        return [r.get("seed") for r in self.done]

    def mean(self, *path: str) -> float | None:
        """The mean over the seeds of one figure."""
        found = numbers(part(r, *path) for r in self.done)
        return statistics.fmean(found) if found else None

    @cached_property
    def bits(self) -> float | None:
        """Held-out bits per byte."""
        return self.mean("quality", "bits_per_byte")

    @cached_property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest bits per byte of a seed."""
        found = numbers(part(r, "quality", "bits_per_byte") for r in self.done)
        return min(found, default=0.0), max(found, default=0.0)

    @property
    def spread(self) -> float:
        low, high = self.extremes
        return high - low

    def series(self, *path: str, x: str, y: str) -> Series:
        """The points of a measured curve, averaged over the seeds."""
        found: dict[float, list[float]] = {}
        for record in self.done:
            for entry in entries(record, *path):
                at, value = number(entry.get(x)), number(entry.get(y))
                if at is not None and value is not None:
                    found.setdefault(at, []).append(value)
        return sorted((at, statistics.fmean(values)) for at, values in found.items())

    @cached_property
    def prefill(self) -> Series:
        return self.series("speed", "prefill", x="length", y="seconds")

    @cached_property
    def step(self) -> Series:
        return self.series("speed", "step", x="length", y="seconds")

    @cached_property
    def state(self) -> Series:
        return self.series("memory", "state", x="length", y="bytes")

    @cached_property
    def curve(self) -> Series:
        return self.series("quality", "curve", x="tokens", y="bits_per_byte")

    @cached_property
    def by_position(self) -> Series:
        """Bits per byte against the middle of each span of positions."""
        found: dict[float, list[float]] = {}
        for record in self.done:
            for entry in entries(record, "quality", "by_position"):
                start, end = number(entry.get("from")), number(entry.get("to"))
                bits = number(entry.get("bits_per_byte"))
                if start is not None and end is not None and bits is not None:
                    found.setdefault((start + end) / 2, []).append(bits)
        return sorted((at, statistics.fmean(values)) for at, values in found.items())

    @cached_property
    def fit(self) -> Fit | None:
        return fit(self.prefill)

    @cached_property
    def laws(self) -> dict[str, tuple[str, str]]:
        """law → result and reason, the worst over the seeds."""
        worst = {"pass": 0, "skip": 1, "fail": 2}
        found: dict[str, tuple[str, str]] = {}
        for record in self.records:
            for entry in entries(record, "certificate"):
                law, result = str(entry.get("law")), str(entry.get("result"))
                before = found.get(law, ("", ""))[0]
                if result in worst and worst[result] > worst.get(before, -1):
                    found[law] = result, str(entry.get("reason") or "")
        return found

    def laws_with(self, result: str) -> list[str]:
        return [law for law, (found, _) in self.laws.items() if found == result]

    @property
    def sound(self) -> bool:
        """No law failed and the causal form cannot see the future."""
        return not self.laws_with("fail") and self.causality in (None, "strict")

    @property
    def crossover(self) -> tuple[float | None, float | None]:
        """The length from which it is faster than dense, and the length up to which it never is."""
        for record in self.done:
            length = number(part(record, "crossover", "length"))
            beyond = number(part(record, "crossover", "beyond"))
            if length is not None or beyond is not None:
                return length, beyond
        return None, None


@dataclass(frozen=True)
class Comparison:
    """The rows of one comparison, in the order in which they were first recorded."""

    rows: Sequence[Row]
    records: Sequence[Mapping[str, Any]]

    @cached_property
    def finished(self) -> list[Row]:
        return [row for row in self.rows if row.done]

    @cached_property
    def scored(self) -> list[Row]:
        """The rows with a figure for quality, best first."""
        return sorted((r for r in self.rows if r.bits is not None), key=lambda r: r.bits or 0.0)

    @cached_property
    def dense(self) -> Row | None:
        return next((row for row in self.finished if row.id == BASELINE), None)

    @cached_property
    def ranked(self) -> list[Row]:
        """Best quality first, then what has none, then what did not finish."""
        unscored = [row for row in self.finished if row.bits is None]
        return [*self.scored, *unscored, *(row for row in self.rows if not row.done)]

    def distinct(self, *path: str) -> list[Any]:
        """The different values at `path` over the records, in order."""
        values = [v for record in self.records if (v := part(record, *path)) is not None]
        return list({json.dumps(v, sort_keys=True, default=str): v for v in values}.values())

    @cached_property
    def length(self) -> float | None:
        """The training length, where there is one."""
        return next(iter(numbers(self.distinct("settings", "length"))), None)

    def shared_length(self, curve: Callable[[Row], Series]) -> float | None:
        """The greatest length that at least two thirds of the rows with such a curve reached."""
        curves = [c for row in self.finished if (c := curve(row))]
        reached = Counter(length for c in curves for length, _ in c)
        return max(
            (n for n, times in reached.items() if 3 * times >= 2 * len(curves)), default=None
        )

    def at_shared_length(self, curve: Callable[[Row], Series]) -> dict[str, float]:
        """label → the value of a curve at the shared length."""
        shared = self.shared_length(curve)
        return {row.label: y for row in self.finished for x, y in curve(row) if x == shared}


def gather(records: Sequence[Mapping[str, Any]]) -> Comparison:
    """Group records by id and arguments; a later record of the same seed replaces an earlier."""
    groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for record in records:
        arguments = json.dumps(_arguments(record), sort_keys=True, default=str)
        # A run under other settings is another measurement, not a better one of the same.
        settings = part(record, "settings", "digest") or ""
        group = groups.setdefault((str(record.get("id")), arguments), {})
        group[f"{record.get('seed')} {settings}"] = record
    variants = Counter(id for id, _ in groups)
    rows = []
    for (id, _), group in groups.items():
        members = list(group.values())
        given = _arguments(members[0]).items()
        named = ", ".join(f"{name}={value!r}" for name, value in given)
        label = f"{id}({named})" if variants[id] > 1 and named else id
        rows.append(Row(id, label, members))
    return Comparison(rows, [record for row in rows for record in row.records])


def _arguments(record: Mapping[str, Any]) -> Mapping[str, Any]:
    given = record.get("arguments")
    return given if isinstance(given, Mapping) else {}


def count(value: float) -> str:
    return f"{value:,.0f}"


def length(value: float) -> str:
    """Tokens with k = 1,024 and M = 1,048,576 where they come out whole."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if value >= size and value % size == 0:
            return f"{value / size:.0f}{unit}"
    return count(value)


def figures(value: float) -> str:
    """Three significant figures, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{figures(value / size)} {unit}"
    return f"{figures(value / 1e-6)} µs"


def size(value: float) -> str:
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= bytes_:
            return f"{figures(value / bytes_)} {unit}"
    return f"{value:,.0f} B"


def bits(value: float) -> str:
    return f"{value:.3f}"


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


def listing(names: Sequence[str], most: int = 4) -> str:
    """`a`, `a and b`, `a, b and c`, `a, b, c, d and 7 more`."""
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


@dataclass(frozen=True)
class Column:
    """One column of the summary: its figure by row label, and how it is written."""

    title: str
    unit: str
    better: str
    values: Mapping[str, float]
    show: Callable[[float], str]
    notes: Mapping[str, str]

    @cached_property
    def best(self) -> float | None:
        if not self.values or not self.better:
            return None
        return (min if self.better == "low" else max)(self.values.values())

    def is_best(self, row: Row) -> bool:
        return self.best is not None and self.values.get(row.label) == self.best

    def text(self, row: Row) -> str:
        """The figure as it is shown; a dash where there is none."""
        if row.label in self.values:
            return self.show(self.values[row.label])
        return self.notes.get(row.label, "–")


def columns(comparison: Comparison) -> list[Column]:
    """The columns of the summary that hold at least one figure."""

    def column(
        title: str,
        unit: str,
        better: str,
        show: Callable[[float], str],
        values: Mapping[str, float | None],
        notes: Mapping[str, str] | None = None,
    ) -> Column:
        found = {label: v for label, v in values.items() if v is not None}
        return Column(title, unit, better, found, show, notes or {})

    def at(curve: Callable[[Row], Series]) -> str:
        shared = comparison.shared_length(curve)
        return f"at {length(shared)}" if shared is not None else ""

    rows = comparison.finished
    prefill, step, state = (lambda r: r.prefill), (lambda r: r.step), (lambda r: r.state)
    crossovers = {row.label: row.crossover for row in rows}
    never = {
        label: f"not up to {length(beyond)}"
        for label, (_, beyond) in crossovers.items()
        if beyond is not None
    }
    parameters = {r.label: r.mean("parameters") for r in rows}
    counts = numbers(parameters.values())
    # Where sizes were matched the column would say one number over and over.
    differ = bool(counts) and max(counts) > (1 + NOISE) * min(counts)
    found = [
        column("Quality", "bits per byte", "low", bits, {r.label: r.bits for r in rows}),
        column(
            "Recall", "found", "high", share, {r.label: r.mean("quality", "recall") for r in rows}
        ),
        column(
            "Training",
            "tokens/s",
            "high",
            figures,
            {r.label: r.mean("speed", "train_tokens_per_second") for r in rows},
        ),
        column("Prefill", at(prefill), "low", seconds, comparison.at_shared_length(prefill)),
        column(
            "Growth",
            "exponent",
            "low",
            lambda v: f"{v:.2f}",
            {r.label: r.fit and r.fit.exponent for r in rows},
        ),
        column(
            "Beats dense",
            "from tokens",
            "low",
            count,
            {label: pair[0] for label, pair in crossovers.items()},
            never,
        ),
        column("Step", at(step), "low", seconds, comparison.at_shared_length(step)),
        column("State", at(state), "low", size, comparison.at_shared_length(state)),
        column(
            "Peak", "memory", "low", size, {r.label: r.mean("memory", "peak_bytes") for r in rows}
        ),
    ]
    if differ:
        found.append(column("Parameters", "", "", count, parameters))
    return [c for c in found if c.values or c.notes]
