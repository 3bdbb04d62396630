"""Patterns as values: who may see whom, known before any content is.

A pattern is a predicate on positions (i of the query, j of the key), joined by `|`, `&` and, where
the parts are known to share no pair, `+`. `(Window(1, 1) | Hubs((0, -1))).blocks(64)` reads its
positions in blocks of 64. Queries are aligned with the last keys: with S > L keys, row 0 stands at
position S − L.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from longspan.errors import LongspanError

ALL = 2**40
"""A reach beyond every sequence."""

Intervals = tuple[Tensor, Tensor]


class Pattern(ABC):
    """Who may see whom.

    `sees` is the definition. `meets` and `reach` bound it over whole blocks, so that masks and
    edges of long sequences cost no more than the blocks that hold any.
    """

    @abstractmethod
    def sees(self, i: Tensor, j: Tensor, keys: int) -> Tensor:
        """Whether the query at i sees the key at j, of `keys`; i and j broadcast."""

    @abstractmethod
    def meets(self, i: Intervals, j: Intervals, keys: int) -> tuple[Tensor, Tensor]:
        """(any pair may meet, all pairs do) for the closed intervals i and j, side by side.

        The first may be True in vain, the second False in vain.
        """

    @abstractmethod
    def reach(self, i: Intervals, keys: int) -> Intervals:
        """Closed intervals of keys, (rows, m), that hold all that the queries of i see."""

    def head(self, h: int) -> "Pattern":
        """The pattern of head h; most are the same for all."""
        del h
        return self

    def __or__(self, other: "Pattern") -> "Pattern":
        return Union((self, other))

    def __and__(self, other: "Pattern") -> "Pattern":
        return Both((self, other))

    def __add__(self, other: "Pattern") -> "Pattern":
        return Sum((self, other))

    def blocks(self, size: int) -> "Pattern":
        """The same among blocks of `size` tokens: whole blocks see whole blocks."""
        return Coarse(self, size)

    def mask(self, queries: int, keys: int) -> Bool[Tensor, "L S"]:
        """True where query (row) sees key (column)."""
        rows = torch.arange(keys - queries, keys)[:, None]
        return self.sees(rows, torch.arange(keys), keys).expand(queries, keys)

    def edges(self, queries: int, keys: int, *, block: int = 64) -> int:
        """How many pairs it lets meet, borders exact, from the blocks that hold any."""
        found = listing(self, queries, keys, block, block)
        first = keys - queries
        i = (found.rows * block)[:, None] + torch.arange(block)
        j = (found.cols * block)[:, None] + torch.arange(block)
        inside = (i >= first) & (i < keys), j < keys
        whole = (inside[0].sum(1) * inside[1].sum(1))[found.full].sum()
        total = int(whole)
        some = (~found.full).nonzero()[:, 0]
        for at in some.split(1024):
            seen = self.sees(i[at][:, :, None], j[at][:, None], keys)
            total += int((seen & inside[0][at][:, :, None] & inside[1][at][:, None]).sum())
        return total


@dataclass(frozen=True)
class Window(Pattern):
    """Query i sees the keys j = i − t·dilation for −after ≤ t ≤ before.

    A negative reach leaves out what is nearest: after = −1 sees only what lies before.

    Raises:
        LongspanError: a window that sees nothing, a dilation below 1.
    """

    before: int
    after: int = 0
    dilation: int = 1

    def __post_init__(self) -> None:
        if self.before + self.after < 0 or self.dilation < 1:
            raise LongspanError(
                f"a window sees before={self.before}, after={self.after} tokens at "
                f"dilation={self.dilation}; expected reaches ≥ 0 and a dilation ≥ 1 "
                "(one reach may be negative, to leave out the nearest)."
            )

    def sees(self, i: Tensor, j: Tensor, keys: int) -> Tensor:
        steps = i - j
        inside = (steps >= -self.after * self.dilation) & (steps <= self.before * self.dilation)
        return inside if self.dilation == 1 else inside & (steps % self.dilation == 0)

    def meets(self, i: Intervals, j: Intervals, keys: int) -> tuple[Tensor, Tensor]:
        low, high = i[0] - j[1], i[1] - j[0]
        least, most = -self.after * self.dilation, self.before * self.dilation
        inside = (low >= least) & (high <= most) & ((low == high) | (self.dilation == 1))
        inside &= low % self.dilation == 0
        top = high.clamp(max=most)
        return top // self.dilation * self.dilation >= low.clamp(min=least), inside

    def reach(self, i: Intervals, keys: int) -> Intervals:
        low, high = i[0] - self.before * self.dilation, i[1] + self.after * self.dilation
        return low[:, None], high[:, None]

    def edges(self, queries: int, keys: int, *, block: int = 64) -> int:
        total, far = 0, (queries + keys) // self.dilation
        for t in range(max(-self.after, -far), min(self.before, far) + 1):
            shift = keys - queries - t * self.dilation  # query i meets key i + shift
            total += max(0, min(queries, keys - shift) - max(0, -shift))
        return total


causal = Window(ALL)
everything = Window(ALL, ALL)


@dataclass(frozen=True)
class Hubs(Pattern):
    """Tokens that all see and that see all; indices below 0 count from the end.

    Args:
        rows, columns: they see all; all see them.
    """

    at: tuple[int, ...]
    rows: bool = True
    columns: bool = True

    def places(self, keys: int) -> list[int]:
        """The tokens, of so many."""
        found = (a if a >= 0 else keys + a for a in self.at)
        return sorted({a for a in found if 0 <= a < keys})

    def sees(self, i: Tensor, j: Tensor, keys: int) -> Tensor:
        seen = torch.zeros_like(i - j, dtype=torch.bool)
        for a in self.places(keys):
            if self.rows:
                seen = seen | (i == a)
            if self.columns:
                seen = seen | (j == a)
        return seen

    def meets(self, i: Intervals, j: Intervals, keys: int) -> tuple[Tensor, Tensor]:
        some = torch.zeros_like(i[0] - j[0], dtype=torch.bool)
        whole = some
        for a in self.places(keys):
            for (low, high), shown in ((i, self.rows), (j, self.columns)):
                if shown:
                    some = some | (low <= a) & (a <= high)
                    whole = whole | (low == a) & (a == high)
        return some, whole

    def reach(self, i: Intervals, keys: int) -> Intervals:
        places = self.places(keys)
        columns = torch.tensor(places if self.columns else [], dtype=torch.long)
        columns = columns.expand(len(i[0]), -1)
        if not self.rows:
            return columns, columns
        wide, _ = replace(self, columns=False).meets(i, i, keys)
        last = torch.where(wide, keys - 1, -1)[:, None]
        return torch.cat([torch.zeros_like(last), columns], 1), torch.cat([last, columns], 1)


@dataclass(frozen=True)
class Stripes(Pattern):
    """All see the keys whose position modulo `period` lies in start … stop − 1.

    Args:
        rows: the queries at these positions see all, instead.
    """

    period: int
    start: int
    stop: int
    rows: bool = False

    def sees(self, i: Tensor, j: Tensor, keys: int) -> Tensor:
        at, other = (i, j) if self.rows else (j, i)
        shown = (at - self.start) % self.period < self.stop - self.start
        return shown & torch.ones_like(other, dtype=torch.bool)

    def meets(self, i: Intervals, j: Intervals, keys: int) -> tuple[Tensor, Tensor]:
        of, other = (i, j) if self.rows else (j, i)
        at, size = (of[0] - self.start) % self.period, self.stop - self.start
        length = of[1] - of[0]
        here = torch.ones_like(other[0], dtype=torch.bool)
        return here & ((at < size) | (at + length >= self.period)), here & (at + length < size)

    def reach(self, i: Intervals, keys: int) -> Intervals:
        last = torch.full_like(i[0], keys - 1)
        if self.rows:
            last = torch.where(self.meets(i, i, keys)[0], last, -1)
        return torch.zeros_like(i[0])[:, None], last[:, None]


@dataclass(frozen=True)
class Cells(Pattern):
    """The sequence is cut into cells of the given sizes, the last repeated; each sees itself."""

    sizes: tuple[int, ...]

    def _borders(self, i: Tensor) -> Intervals:
        """The first and last position of the cell that holds i."""
        ends = torch.tensor(self.sizes).cumsum(0)
        own = torch.searchsorted(ends[:-1], i, right=True)
        size, start = torch.tensor(self.sizes)[own], (ends - torch.tensor(self.sizes))[own]
        start = start + (i - start).div(size, rounding_mode="floor") * size
        return start, start + size - 1

    def sees(self, i: Tensor, j: Tensor, keys: int) -> Tensor:
        low, high = self._borders(i)
        return (low <= j) & (j <= high)

    def meets(self, i: Intervals, j: Intervals, keys: int) -> tuple[Tensor, Tensor]:
        (low, first), (last, high) = self._borders(i[0]), self._borders(i[1])
        return (low <= j[1]) & (j[0] <= high), (low == last) & (low <= j[0]) & (j[1] <= first)

    def reach(self, i: Intervals, keys: int) -> Intervals:
        return self._borders(i[0])[0][:, None], self._borders(i[1])[1][:, None]


@dataclass(frozen=True)
class Chance(Pattern):
    """Each query sees `count` keys drawn at random among those that `apart` does not show it.

    A row's draw depends on the seed, the head, the row and the number of keys, or with `causal`,
    where it is among earlier keys, not on that number either. Fewer are seen where fewer are left.
    """

    count: int
    apart: Pattern
    seed: int = 0
    causal: bool = False
    of: int = 0

    def head(self, h: int) -> Pattern:
        return replace(self, of=h)

    def draw(self, rows: Tensor, keys: int) -> Tensor:
        """The keys of each row, (rows, count), ascending, −1 where none was left."""
        if not self.count or not len(rows):
            return rows.new_full((len(rows), self.count), -1)
        limit = rows + 1 if self.causal else torch.full_like(rows, keys)
        tries = 8 * self.count + 32
        found = self._attempts(rows, limit, tries, keys)
        short = (limit <= 4 * tries) | (found < 0).any(1)
        if short.any():
            found[short] = self._among_all(rows[short], limit[short], keys)
        return found.sort(1).values

    def _attempts(self, rows: Tensor, limit: Tensor, tries: int, keys: int) -> Tensor:
        turn = torch.arange(tries)
        drawn = _hash(self.seed, self.of, rows[:, None], turn) % limit[:, None]
        fine = ~self.apart.sees(rows[:, None], drawn, keys)
        for t in range(1, tries):
            fine[:, t] &= ~(drawn[:, :t] == drawn[:, t, None]).any(1)
        order = (~fine).to(torch.uint8).argsort(dim=1, stable=True)[:, : self.count]
        return drawn.gather(1, order).masked_fill(~fine.gather(1, order), -1)

    def _among_all(self, rows: Tensor, limit: Tensor, keys: int) -> Tensor:
        """The same when little is left to draw from: the `count` least of all hashes."""
        j = torch.arange(int(limit.max()))
        rank = _hash(self.seed, self.of, rows[:, None], j)
        hidden = self.apart.sees(rows[:, None], j, keys) | (j >= limit[:, None])
        rank = rank.masked_fill(hidden, ALL * 2**20)
        least, found = rank.topk(min(self.count, len(j)), largest=False)
        found = found.masked_fill(least == ALL * 2**20, -1)
        return torch.nn.functional.pad(found, (0, self.count - found.shape[1]), value=-1)

    def sees(self, i: Tensor, j: Tensor, keys: int) -> Tensor:
        shape = torch.broadcast_shapes(i.shape, j.shape)
        rows, at = i.clamp(min=0).flatten().unique(return_inverse=True)
        drawn = self.draw(rows, keys)[at].view(*i.shape, self.count)
        seen = torch.zeros(shape, dtype=torch.bool)
        for one in drawn.unbind(-1):
            seen |= one == j
        return seen

    def meets(self, i: Intervals, j: Intervals, keys: int) -> tuple[Tensor, Tensor]:
        single = (i[0] == i[1]) & (j[0] == j[1])
        seen = self.sees(i[0], j[0], keys)
        return seen | ~single, seen & single

    def reach(self, i: Intervals, keys: int) -> Intervals:
        if bool((i[0] == i[1]).all()):
            drawn = self.draw(i[0], keys)
            return drawn, drawn
        return torch.zeros_like(i[0])[:, None], torch.full_like(i[0], keys - 1)[:, None]


@dataclass(frozen=True, eq=False)
class Table(Pattern):
    """A boolean matrix, written out: row i sees column j. Beyond its borders nothing is seen."""

    rows: Bool[Tensor, "N M"]

    def _at(self, i: Tensor, j: Tensor) -> Tensor:
        n, m = self.rows.shape
        inside = (i >= 0) & (i < n) & (j >= 0) & (j < m)
        return self.rows[i.clamp(0, n - 1), j.clamp(0, m - 1)] & inside

    def sees(self, i: Tensor, j: Tensor, keys: int) -> Tensor:
        return self._at(i, j)

    def meets(self, i: Intervals, j: Intervals, keys: int) -> tuple[Tensor, Tensor]:
        single = (i[0] == i[1]) & (j[0] == j[1])
        seen = self._at(i[0], j[0])
        return seen | ~single, seen & single

    def reach(self, i: Intervals, keys: int) -> Intervals:
        return torch.zeros_like(i[0])[:, None], torch.full_like(i[0], keys - 1)[:, None]


@dataclass(frozen=True)
class Coarse(Pattern):
    """A pattern among blocks of `size` tokens."""

    inner: Pattern
    size: int

    def head(self, h: int) -> Pattern:
        return replace(self, inner=self.inner.head(h))

    def _blocks(self, t: Intervals) -> Intervals:
        return t[0] // self.size, t[1] // self.size

    def sees(self, i: Tensor, j: Tensor, keys: int) -> Tensor:
        return self.inner.sees(i // self.size, j // self.size, -(-keys // self.size))

    def meets(self, i: Intervals, j: Intervals, keys: int) -> tuple[Tensor, Tensor]:
        return self.inner.meets(self._blocks(i), self._blocks(j), -(-keys // self.size))

    def reach(self, i: Intervals, keys: int) -> Intervals:
        low, high = self.inner.reach(self._blocks(i), -(-keys // self.size))
        return low * self.size, high * self.size + self.size - 1


@dataclass(frozen=True)
class Several(Pattern):
    """Patterns of which any, or all, must let a pair meet."""

    parts: tuple[Pattern, ...]

    def head(self, h: int) -> Pattern:
        return replace(self, parts=tuple(p.head(h) for p in self.parts))

    @abstractmethod
    def joined(self, one: Tensor, other: Tensor) -> Tensor:
        """What two parts say of a pair, together."""

    def sees(self, i: Tensor, j: Tensor, keys: int) -> Tensor:
        return reduce(self.joined, (part.sees(i, j, keys) for part in self.parts))

    def meets(self, i: Intervals, j: Intervals, keys: int) -> tuple[Tensor, Tensor]:
        some, whole = zip(*(part.meets(i, j, keys) for part in self.parts), strict=True)
        return reduce(self.joined, some), reduce(self.joined, whole)


@dataclass(frozen=True)
class Union(Several):
    """What any part lets meet."""

    def joined(self, one: Tensor, other: Tensor) -> Tensor:
        return one | other

    def reach(self, i: Intervals, keys: int) -> Intervals:
        found = [part.reach(i, keys) for part in self.parts]
        return torch.cat([low for low, _ in found], 1), torch.cat([high for _, high in found], 1)


@dataclass(frozen=True)
class Sum(Union):
    """A union of parts that share no pair: each is computed by the kernel that suits it."""


@dataclass(frozen=True)
class Both(Several):
    """What all parts let meet."""

    def joined(self, one: Tensor, other: Tensor) -> Tensor:
        return one & other

    def reach(self, i: Intervals, keys: int) -> Intervals:
        low, high = self.parts[0].reach(i, keys)
        for part in self.parts[1:]:
            other_low, other_high = part.reach(i, keys)
            low = torch.maximum(low[:, :, None], other_low[:, None]).flatten(1)
            high = torch.minimum(high[:, :, None], other_high[:, None]).flatten(1)
        return low, high


@dataclass(frozen=True)
class Prefixed(Pattern):
    """`size` tokens before the others see all and are seen by all; `rest` counts behind them."""

    size: int
    rest: Pattern

    def head(self, h: int) -> Pattern:
        return replace(self, rest=self.rest.head(h))

    def sees(self, i: Tensor, j: Tensor, keys: int) -> Tensor:
        behind = self.rest.sees(i - self.size, j - self.size, max(keys - self.size, 0))
        return (i < self.size) | (j < self.size) | behind

    def meets(self, i: Intervals, j: Intervals, keys: int) -> tuple[Tensor, Tensor]:
        size, (some, whole) = self.size, self._behind(i, j, keys)
        inside = (i[1] < size) | (j[1] < size)
        return (i[0] < size) | (j[0] < size) | some, inside | whole

    def _behind(self, i: Intervals, j: Intervals, keys: int) -> tuple[Tensor, Tensor]:
        low_i, low_j = i[0] - self.size, j[0] - self.size
        some, whole = self.rest.meets(
            (low_i.clamp(min=0), (i[1] - self.size).clamp(min=0)),
            (low_j.clamp(min=0), (j[1] - self.size).clamp(min=0)),
            max(keys - self.size, 0),
        )
        return some, whole & (low_i >= 0) & (low_j >= 0)

    def reach(self, i: Intervals, keys: int) -> Intervals:
        return torch.zeros_like(i[0])[:, None], torch.full_like(i[0], keys - 1)[:, None]


@dataclass(frozen=True)
class UnlessShort(Pattern):
    """Everything where there are at most `most` keys, else `long`."""

    long: Pattern
    most: int

    def head(self, h: int) -> Pattern:
        return replace(self, long=self.long.head(h))

    def at(self, keys: int) -> Pattern:
        """The pattern for so many keys."""
        return everything if keys <= self.most else self.long

    def sees(self, i: Tensor, j: Tensor, keys: int) -> Tensor:
        return self.at(keys).sees(i, j, keys)

    def meets(self, i: Intervals, j: Intervals, keys: int) -> tuple[Tensor, Tensor]:
        return self.at(keys).meets(i, j, keys)

    def reach(self, i: Intervals, keys: int) -> Intervals:
        return self.at(keys).reach(i, keys)


@dataclass(frozen=True)
class PerHead:
    """Head h follows the pattern h modulo their number."""

    choices: tuple[Pattern, ...]

    def head(self, h: int) -> Pattern:
        """The pattern of head h."""
        return self.choices[h % len(self.choices)].head(h)

    def mask(self, heads: int, queries: int, keys: int) -> Bool[Tensor, "H L S"]:
        """True where, in each head, query (row) sees key (column)."""
        return torch.stack([self.head(h).mask(queries, keys) for h in range(heads)])


class Listing(NamedTuple):
    """Pairs of a query block and a key block that may hold edges, by row, then column."""

    rows: Tensor
    cols: Tensor
    full: Tensor


def listing(pattern: Pattern, queries: int, keys: int, rows: int, cols: int) -> Listing:
    """The blocks (of `rows` × `cols` positions) that hold edges; `full` where all of one is seen.

    Blocks are counted from key 0, those of queries too.
    """
    first, count = (keys - queries) // rows, -(-keys // cols)
    block = torch.arange(first, -(-keys // rows) if queries else first)
    of = ((block * rows).clamp(min=keys - queries), (block * rows + rows - 1).clamp(max=keys - 1))
    low, high = (t.clamp(-1, keys) for t in pattern.reach(of, keys))
    low, high = low.clamp(min=0) // cols, torch.where(high < low, -1, high // cols)
    high = high.clamp(max=count - 1)
    sizes = (high - low + 1).clamp(min=0)
    flat = sizes.flatten()
    row = torch.arange(len(block)).repeat_interleave(sizes.sum(1))
    start = (low.flatten() - flat.cumsum(0) + flat).repeat_interleave(flat)
    code = (row * count + start + torch.arange(len(row))).unique()
    row, col = code // max(count, 1), code % max(count, 1)
    i = of[0][row], of[1][row]
    j = col * cols, (col * cols + cols - 1).clamp(max=keys - 1)
    some, whole = pattern.meets(i, j, keys)
    some, whole = some.expand(len(row)), whole.expand(len(row))
    full = whole & (col * cols + cols <= keys)
    return Listing(block[row][some], col[some], full[some])


def tables(layout: Bool[Tensor, "H N M"]) -> PerHead:
    """A block layout, written out for each head, as a pattern among blocks; equal heads share."""
    known: dict[bytes, Pattern] = {}
    choices = []
    for rows in layout:
        code = rows.to(torch.uint8).cpu().numpy().tobytes()
        choices.append(known.setdefault(code, Table(rows)))
    return PerHead(tuple(choices))


def per_head(choices: Sequence[Pattern]) -> PerHead:
    """Head h follows choices[h % len(choices)]."""
    return PerHead(tuple(choices))


def _hash(seed: int, of: int, *parts: Tensor) -> Tensor:
    """A whole number below 2⁴⁷ for each combination, the same on every machine."""
    x = torch.tensor(seed * 1_000_003 + of)
    for part in (torch.tensor(0), *parts):  # 64-bit products wrap around
        x = (x ^ part) * -7046029254386353131
        x = (x ^ ((x >> 29) & (2**35 - 1))) * -4658895280553007687
        x = x ^ ((x >> 32) & (2**32 - 1))
    return (x >> 16) & (2**47 - 1)
