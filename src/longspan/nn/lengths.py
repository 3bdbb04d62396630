"""What shortens a sequence and lengthens what was made of it, and the groups that tokens form."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longspan.engines import pool
from longspan.errors import LongspanError
from longspan.nn.relative import Places
from longspan.shapes import Inputs, Keep

Shorter = Float[Tensor, "B N E"]
ShorterKeep = Bool[Tensor, "B N"]


class Length(nn.Module, ABC):
    """x → x', shorter, and y', made of x', → y, as long as x.

    Rows hold their kept tokens first (`engines.pool.align`), and so do the shortened ones. Causally
    y at i follows from x up to i alone, and the state, all zeros before anything was seen,
    continues both directions; each row may stand at another place of its group.

    Attributes:
        factor: how many tokens become one; with factor 1 it changes nothing.

    Raises:
        LongspanError: a factor below 1.
    """

    def __init__(self, *, factor: int, causal: bool) -> None:
        super().__init__()
        if factor < 1:
            raise LongspanError(f"{factor} tokens cannot become one: give a factor of at least 1.")
        self.factor, self.causal = factor, causal

    @abstractmethod
    def shorten(
        self, x: Inputs, state: Any = None, *, keep: Keep | None = None
    ) -> tuple[Shorter, ShorterKeep | None, Any]:
        """(x', its mask, what `lengthen` needs); causally N counts new groups."""

    @abstractmethod
    def lengthen(self, y: Shorter, x: Inputs, plan: Any) -> tuple[Inputs, Any]:
        """(y: B L E, the state), from y', the x that was shortened, and its plan."""


class Groups(NamedTuple):
    """Groups of tokens, each with its place; `has` says which a row has, None for all.

    Causally also where the call's tokens stand, and the tokens to keep for groups to come.
    """

    found: Float[Tensor, "B N C E"]
    has: Bool[Tensor, "B N"] | None
    at: Places
    place: pool.Place | None = None
    before: Float[Tensor, "B P E"] | None = None


class Line:
    """Runs of `size` tokens; causally g holds gs − s + 1 … gs, and gs … gs + s − 1 read it.

    Args:
        unit: tokens of the whole model that one stands for; places are counted in these.

    Attributes:
        behind, open: tokens that a group to come may need, and groups that tokens may read.
        lead: places of the zeros before the first token.
    """

    def __init__(self, size: int, *, unit: int = 1) -> None:
        self.size, self.unit, self.behind, self.open = size, unit, size - 1, 1
        self.lead = range(-(size - 1) * unit, 0, unit)

    def at(self, x: Inputs, seen: Int[Tensor, "B"] | None) -> Places:
        """Places of the tokens of a call, which are a range where nothing was seen."""
        length, unit = x.shape[1], self.unit
        if seen is None:
            return range(0, length * unit, unit)
        return (seen[:, None] + torch.arange(length, device=x.device)) * unit

    def cut(self, x: Inputs, new: Int[Tensor, "B"] | None) -> Groups:
        """All groups, the last filled with zeros; `new` tokens of each row are there."""
        count, size = -(-x.shape[1] // self.size), self.size
        has = None
        if new is not None:
            has = torch.arange(count, device=x.device) * size < new[:, None]
        at = range(0, count * size * self.unit, size * self.unit)
        return Groups(pool.windows(x, count, size, size), has, at)

    def completed(
        self, before: Tensor, x: Inputs, seen: Int[Tensor, "B"] | None, new: Int[Tensor, "B"]
    ) -> Groups:
        """The groups that a call completes, after the tokens `before`."""
        size, unit = self.size, self.unit
        place = pool.place(torch.zeros_like(new) if seen is None else seen, new, size)
        found, has, before = pool.completed(before, x, place, size)
        count = found.shape[1]
        at: Places = range(0, count * size * unit, size * unit)
        if seen is not None:
            steps = torch.arange(count, device=x.device) * size
            at = ((seen + place.first)[:, None] + steps) * unit
        return Groups(found, has, at, place, before)

    def spread(
        self, parts: Float[Tensor, "B N C E"], length: int, place: pool.Place | None
    ) -> Inputs:
        """What each token reads of its group; causally the `open` groups before the call first."""
        return pool.spread(parts, length, place)


class Grid:
    """Blocks of a × b tokens of a grid that they fill row by row, `columns` in each.

    Causally both axes are shifted: group (I, J) holds the rows Ia − a + 1 … Ia and the columns
    Jb − b + 1 … Jb, zeros where there are none, and the tokens of the rows Ia … Ia + a − 1 and the
    columns Jb … Jb + b − 1 read it. All it holds comes before all that read it, and so do, in the
    raster order of the groups, the groups before it.

    Args:
        unit: rows and columns of the whole model that one stands for.
    """

    def __init__(
        self, sizes: tuple[int, int], *, columns: int, unit: tuple[int, int] = (1, 1)
    ) -> None:
        self.sizes, self.columns, self.unit = sizes, columns, unit
        (rows, across), self.lead = sizes, range(0)
        self.size = rows * across
        self.open = -(-columns // across)
        self.behind = (rows - 1) * columns + across - 1

    def at(self, x: Inputs, seen: Int[Tensor, "B"] | None) -> Tensor:
        """Places of the tokens of a call."""
        start = x.new_zeros(len(x), dtype=torch.long) if seen is None else seen
        return self._places(start[:, None] + torch.arange(x.shape[1], device=x.device))

    def _places(self, index: Tensor) -> Tensor:
        (down, right), columns = self.unit, self.columns
        return index // columns * down * columns * right + index % columns * right

    def cut(self, x: Inputs, new: Int[Tensor, "B"] | None) -> Groups:
        """All groups, those at the end of rows and columns filled with zeros."""
        (rows, across), columns = self.sizes, self.columns
        x = F.pad(x, (0, 0, 0, -x.shape[1] % columns)).unflatten(1, (-1, columns))
        x = F.pad(x, (0, 0, 0, -columns % across, 0, -x.shape[1] % rows))
        found = rearrange(x, "B (I a) (J b) E -> B (I J) (a b) E", a=rows, b=across)
        group = torch.arange(found.shape[1], device=x.device)
        first = group // self.open * rows * columns + group % self.open * across
        has = None if new is None else first < new[:, None]
        return Groups(found, has, self._places(first).expand(len(x), -1))

    def completed(
        self, before: Tensor, x: Inputs, seen: Int[Tensor, "B"] | None, new: Int[Tensor, "B"]
    ) -> Groups:
        """The groups that a call completes, after the tokens `before`."""
        (rows, across), columns, behind = self.sizes, self.columns, self.behind
        start = torch.zeros_like(new) if seen is None else seen
        step = torch.arange(x.shape[1], device=x.device)
        index = start[:, None] + step
        ends = (index // columns % rows == 0) & (index % columns % across == 0)
        ends = ends & (step < new[:, None])
        count = ends.sum(1)
        last = pool.align(ends)[0][:, : int(count.max()) if len(x) else 0]
        has = torch.arange(last.shape[1], device=x.device) < count[:, None]
        up, left = (
            t.flatten()
            for t in torch.meshgrid(
                *(torch.arange(n - 1, -1, -1, device=x.device) for n in (rows, across)),
                indexing="ij",
            )
        )
        z = torch.cat([before.to(x.dtype), x], 1)
        found = pool.rows(z, (last + behind)[..., None] - up * columns - left)
        place = start[:, None] + last
        inside = (place[..., None] // columns >= up) & (place[..., None] % columns >= left)
        found = found.masked_fill(~(inside & has[..., None])[..., None], 0)
        kept = pool.rows(z, new[:, None] + torch.arange(behind, device=x.device))
        where = pool.Place(start, new, torch.zeros_like(new), count)
        return Groups(found, has, self._places(place), where, kept)

    def spread(
        self, parts: Float[Tensor, "B N C E"], length: int, place: pool.Place | None
    ) -> Inputs:
        """What each token reads of its group; causally the `open` groups before the call first."""
        (rows, across), columns, groups = self.sizes, self.columns, self.open
        index = torch.arange(length, device=parts.device)[None].expand(len(parts), -1)
        earlier = index.new_zeros(len(parts))
        if place is not None:
            index = place.seen[:, None] + index
            i, j = place.seen // columns, place.seen % columns
            within = torch.where(i % rows == 0, (j + across - 1) // across, groups)
            earlier = i // rows * groups + within - groups
        i, j = index // columns, index % columns
        group = i // rows * groups + j // across - earlier[:, None]
        return pool.rows(parts.flatten(1, 2), group * self.size + i % rows * across + j % across)
