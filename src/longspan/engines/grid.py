"""Attention over grids of any number of axes: lines of one axis, and neighbourhoods.

A neighbourhood is the product of one `Axis` a dimension. Queries are worked on in tiles; the keys a
tile meets are one box of the grid, whose rows are gathered. What a tile sees depends only on how it
lies against the borders, so tiles that lie alike share one mask. Dilation only changes which rows
a tile gathers.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engines import dense
from longspan.engines.dense import additive, tile_backward, tile_forward
from longspan.engines.pattern import WORKSPACE, History
from longspan.errors import LongspanError
from longspan.shapes import Keep

# Queries of a tile along one axis, by the number of axes; one axis alone goes by its window.
_TILE = {2: 8, 3: 4}


@dataclass(frozen=True)
class Axis:
    """Query i sees `window` keys of its residue class i mod dilation, around or before itself.

    With t = ⌊i / dilation⌋ and n the length of the class, the keys are s … s + window − 1 of it,

        s = clamp(t − ⌊window / 2⌋, 0, n − window),

    shifted inward at the borders; causally the keys max(0, t − window + 1) … t. A class shorter
    than the window is seen whole.

    Raises:
        LongspanError: a window or dilation below 1; an even window that is not causal.
    """

    window: int
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        if self.window < 1 or self.dilation < 1:
            raise LongspanError(
                f"a neighbourhood has window={self.window} and dilation={self.dilation}: "
                "expected both at least 1."
            )
        if not self.causal and self.window % 2 == 0:
            raise LongspanError(
                f"a neighbourhood of {self.window} has no middle: give an odd window, as "
                f"{self.window + 1}."
            )

    @property
    def before(self) -> int:
        """Steps from a query back to the first key it sees, away from borders."""
        return self.window - 1 if self.causal else self.window // 2

    def bounds(self, at: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """First key and first key past the last, of places `at` in classes of `length`."""
        start = (at - self.before).clamp(min=0)
        if self.causal:
            return start, at + 1
        start = torch.minimum(start, (length - self.window).clamp(min=0))
        return start, torch.minimum(start + self.window, length)

    def mask(self, queries: int, keys: int) -> Bool[Tensor, "L S"]:
        """True where query (row) sees key (column); queries are the last of the keys."""
        i, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
        residue = i % self.dilation
        start, stop = self.bounds(i // self.dilation, -(-(keys - residue) // self.dilation))
        at = j // self.dilation
        return (j % self.dilation == residue) & (at >= start) & (at < stop)

    def edges(self, queries: int, keys: int) -> int:
        """How many pairs meet, without the mask."""
        i = torch.arange(keys - queries, keys)
        length = -(-(keys - i % self.dilation) // self.dilation)
        start, stop = self.bounds(i // self.dilation, length)
        return int((stop - start).sum())


def widest(window: int, length: int) -> int:
    """The largest dilation at which every class of an axis holds a window, at least 1."""
    return max(1, length // window)


class _Kind(NamedTuple):
    """Tiles of one axis that lie alike: first query, first key and residue of each (n)."""

    query: Tensor
    key: Tensor
    residue: Tensor
    valid: int
    seen: Tensor  # t T
    offset: Tensor  # t T, of the key from the query in steps of the dilation


class _Plan(NamedTuple):
    tile: int
    span: int
    kinds: tuple[_Kind, ...]


@lru_cache(maxsize=64)
def _plan(axis: Axis, queries: int, keys: int, axes: int) -> _Plan:
    dilation, first = axis.dilation, keys - queries
    residue = torch.arange(min(dilation, keys))
    length = -(-(keys - residue) // dilation)
    low = -(-(first - residue) // dilation)
    low = low.clamp(min=0)
    count = int((length - low).max())
    tile = _TILE.get(axes, min(128, max(16, 1 << max(axis.before - 1, 1).bit_length())))
    tile = -(-count // -(-count // tile))
    span = min(tile + axis.window - 1, int(length.max()))
    each = -(-(length - low) // tile)
    of = torch.repeat_interleave(each)
    nth = torch.arange(len(of)) - (each.cumsum(0) - each)[of]
    residue, length = residue[of], length[of]
    a = low[of] + nth * tile
    s = torch.minimum((a - axis.before).clamp(min=0), (length - span).clamp(min=0))
    top = (length - axis.window).clamp(min=0)
    keyed = torch.stack(
        [
            a - s,
            torch.maximum(-s, a - s - axis.before),
            torch.minimum(top - s, a + tile - 1 - axis.before - s),
            (length - a).clamp(max=tile),
            (length - s).clamp(max=span),
        ],
        1,
    )
    _, which = torch.unique(keyed, dim=0, return_inverse=True)
    kinds = []
    for kind in range(int(which.max()) + 1):
        tiles = (which == kind).nonzero()[:, 0]
        one = tiles[0]
        at, key = a[one] + torch.arange(tile), s[one] + torch.arange(span)
        start, stop = axis.bounds(at, length[one])
        kinds.append(
            _Kind(
                a[tiles],
                s[tiles],
                residue[tiles],
                int(keyed[one, 3]),
                (key >= start[:, None]) & (key < torch.minimum(stop, length[one])[:, None]),
                key - at[:, None],
            )
        )
    return _Plan(tile, span, tuple(kinds))


class _Tiles(NamedTuple):
    """Rows of the flattened grid that some tiles that lie alike read and write."""

    queries: Tensor  # m t
    keys: Tensor  # m T
    valid: Tensor  # t
    seen: Tensor  # t T
    entry: Tensor  # t T, into the flattened table of biases


def _tiles(
    axes: Sequence[Axis], queries: Sequence[int], keys: Sequence[int], most: int, device: Any
) -> Iterator[_Tiles]:
    """All tiles, at most so many at a time that their keys are `most` rows."""
    plans = [_plan(a, n, s, len(axes)) for a, n, s in zip(axes, queries, keys, strict=True)]
    span = math.prod(p.span for p in plans)
    together = max(1, most // span)
    for kinds in itertools.product(*(p.kinds for p in plans)):
        counts = [len(kind.query) for kind in kinds]
        valid = torch.ones(1, dtype=torch.bool)
        seen, entry = valid[:, None], torch.zeros(1, 1, dtype=torch.long)
        for axis, plan, kind in zip(axes, plans, kinds, strict=True):
            valid = _outer(valid, torch.arange(plan.tile) < kind.valid, torch.logical_and)
            seen = _outer(seen, kind.seen, torch.logical_and)
            side = 2 * axis.window - 1
            place = (kind.offset + axis.window - 1).clamp(0, side - 1)
            entry = _outer(entry * side, place, torch.add)
        shared = valid.to(device), seen.to(device), entry.to(device)
        total = math.prod(counts)
        for first in range(0, total, together):
            tile = torch.arange(first, min(first + together, total))
            at_q = at_k = torch.zeros(len(tile), 1, dtype=torch.long)
            rest = tile
            which = []
            for n in reversed(counts):
                which.insert(0, rest % n)
                rest = rest // n
            for i, (axis, plan, kind) in enumerate(zip(axes, plans, kinds, strict=True)):
                chosen, r = which[i], kind.residue[which[i]][:, None]
                step = torch.arange(plan.tile)
                q = (kind.query[chosen][:, None] + step) * axis.dilation + r
                q = (q - (keys[i] - queries[i])).clamp(max=queries[i] - 1)
                k = (kind.key[chosen][:, None] + torch.arange(plan.span)) * axis.dilation + r
                at_q = _rows(at_q * queries[i], q)
                at_k = _rows(at_k * keys[i], k.clamp(max=keys[i] - 1))
            yield _Tiles(at_q.to(device), at_k.to(device), *shared)


def _outer(a: Tensor, b: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """join(a_x…, b_y…) over all pairs, the axes of a and b interleaved and joined."""
    if a.dim() == 1:
        return join(a[:, None], b[None]).flatten()
    return join(a[:, None, :, None], b[None, :, None]).flatten(2).flatten(0, 1)


def _rows(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, :, None] + b[:, None]).flatten(1)


class _Task(NamedTuple):
    """Some tiles of some rows (batch × heads): flat indices and the additive mask."""

    rows: slice
    queries: Tensor
    keys: Tensor
    tiles: _Tiles
    mask: Tensor


class _Neighbours(torch.autograd.Function):
    """Over flattened grids: q X L D, k X S D, v X S V, table H R, with X = B · H."""

    @staticmethod
    def tasks(
        q: Tensor, k: Tensor, table: Tensor | None, keep: Tensor | None, heads: int, setup: Any
    ) -> Iterator[_Task]:
        axes, queries, keys = setup
        length, width = k.shape[1], max(k.shape[2], 1)
        size = q.element_size()
        plans = [_plan(a, n, s, len(axes)) for a, n, s in zip(axes, queries, keys, strict=True)]
        tile, span = math.prod(p.tile for p in plans), math.prod(p.span for p in plans)
        # A mask of its own for every tile (keep), and scores (a table's gradient), take room too.
        wide = width if keep is None and table is None else max(width, tile)
        for tiles in _tiles(axes, queries, keys, WORKSPACE // (2 * size * wide), q.device):
            mask = additive(tiles.seen, torch.promote_types(q.dtype, torch.float32))
            each = len(tiles.keys) * span * wide * size
            together = max(1, WORKSPACE // (2 * each))
            for x in range(0, len(q), together):
                rows = torch.arange(x, min(x + together, len(q)), device=q.device)[:, None, None]
                some = mask[None, None]
                if table is not None:
                    head = rows[:, 0, 0] % heads
                    flat = table.to(mask.dtype).index_select(1, tiles.entry.flatten())
                    some = some + flat[head].view(-1, 1, *mask.shape)
                if keep is not None:
                    kept = keep[rows[:, 0, 0] // heads][:, tiles.keys]  # x m T
                    some = some.masked_fill(~kept[:, :, None], -math.inf)
                yield _Task(
                    slice(x, x + len(rows)),
                    (tiles.queries + rows * q.shape[1]).flatten(),
                    (tiles.keys + rows * length).flatten(),
                    tiles,
                    some.to(q.dtype),
                )

    @staticmethod
    def taken(t: Tensor, index: Tensor, like: Tensor, rows: int) -> Tensor:
        return t.flatten(0, 1).index_select(0, index).view(rows, *like.shape, t.shape[2])

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor | None,
        keep: Tensor | None,
        heads: int,
        scale: float,
        setup: Any,
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        o = v.new_zeros(*q.shape[:2], v.shape[2])
        lse = q.new_zeros(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        taken = _Neighbours.taken
        for rows, at_q, at_k, tiles, mask in _Neighbours.tasks(q, k, table, keep, heads, setup):
            n = rows.stop - rows.start
            part, sums = tile_forward(
                taken(q, at_q, tiles.queries, n),
                taken(k, at_k, tiles.keys, n),
                taken(v, at_k, tiles.keys, n),
                mask,
                scale,
            )
            valid = tiles.valid
            at = at_q.view(n, *tiles.queries.shape)[..., valid].flatten()
            o.view(-1, o.shape[2]).index_copy_(0, at, part[:, :, valid].flatten(0, 2))
            lse.view(-1).index_copy_(0, at, sums[:, :, valid].flatten())
        ctx.save_for_backward(q, k, v, table, keep, o, lse)
        ctx.heads, ctx.scale, ctx.setup = heads, scale, setup
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        q, k, v, table, keep, o, lse = ctx.saved_tensors
        heads, scale, do = ctx.heads, ctx.scale, do.contiguous()
        lse = lse.masked_fill(lse == -math.inf, 0)
        wide = lse.dtype
        dq, dk, dv = (torch.zeros_like(t, dtype=wide) for t in (q, k, v))
        dtable = None if table is None else torch.zeros_like(table, dtype=wide)
        taken = _Neighbours.taken
        for rows, at_q, at_k, tiles, mask in _Neighbours.tasks(q, k, table, keep, heads, ctx.setup):
            n = rows.stop - rows.start
            tile_do, tile_q, tile_o = (taken(t, at_q, tiles.queries, n) for t in (do, q, o))
            tile_k, tile_v = (taken(t, at_k, tiles.keys, n) for t in (k, v))
            sums = lse.view(-1).index_select(0, at_q).view(n, *tiles.queries.shape)
            if not bool(tiles.valid.all()):  # slots past the end repeat the last query
                tile_do = tile_do * tiles.valid[:, None]
            if table is None:
                parts = tile_backward(tile_do, tile_q, tile_k, tile_v, tile_o, sums, mask, scale)
            else:
                *parts, dscores = _explicit_backward(
                    tile_do, tile_q, tile_k, tile_v, tile_o, sums, mask, scale
                )
                flat = dscores.sum(1).flatten(1)
                head = torch.arange(rows.start, rows.stop, device=q.device) % heads
                each = flat.new_zeros(n, table.shape[1])
                each.index_add_(1, tiles.entry.flatten(), flat)
                assert dtable is not None
                dtable.index_add_(0, head, each)
            part_q, part_k, part_v = parts
            valid = tiles.valid
            at = at_q.view(n, *tiles.queries.shape)[..., valid].flatten()
            dq.view(-1, q.shape[2]).index_copy_(0, at, part_q[:, :, valid].flatten(0, 2).to(wide))
            dk.view(-1, k.shape[2]).index_add_(0, at_k, part_k.flatten(0, 2).to(wide))
            dv.view(-1, v.shape[2]).index_add_(0, at_k, part_v.flatten(0, 2).to(wide))
        dtable = None if dtable is None or table is None else dtable.to(table.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dtable, *(None,) * 4


def _explicit_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `tile_backward`, with the gradient of the scores too."""
    do, q, k, v, o = (t.to(lse.dtype) for t in (do, q, k, v, o))
    weights = (q @ k.mT).mul_(scale).add_(mask).sub_(lse[..., None]).exp_()
    dscores = (do @ v.mT).sub_((do * o).sum(-1, keepdim=True)).mul_(weights)
    return dscores @ k * scale, dscores.mT @ q * scale, weights.mT @ do, dscores


# Data-dependent loops and kernels without a meta form: eager under torch.compile.
_neighbours: Any = torch.compiler.disable(_Neighbours.apply)


def neighbours(
    q: Float[Tensor, "B H *queries D"],
    k: Float[Tensor, "B H *keys D"],
    v: Float[Tensor, "B H *keys V"],
    axes: Sequence[Axis],
    *,
    table: Float[Tensor, "H *entries"] | None = None,
    keep: Bool[Tensor, "B *keys"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H *queries V"]:
    """Softmax attention of every query to the product of its axes' neighbourhoods.

        o_i = Σ_j softmax_j(q_i·k_j · scale + table[j − i]) v_j

    Along each axis queries are the last of the keys. `table` has 2 window − 1 entries an axis,
    offset 0 in the middle, in steps of the dilation. `keep` hides keys where they are: borders
    stay those of the grid. O(L · Π window) time, O(L) memory beside a fixed workspace.

    Raises:
        LongspanError: another number of axes than the grid has; a table of another shape.
    """
    queries, keys = tuple(q.shape[2:-1]), tuple(k.shape[2:-1])
    if not len(axes) == len(queries) == len(keys):
        raise LongspanError(
            f"a neighbourhood of {len(axes)} axes met a grid of {len(keys)}: give one window, "
            "dilation and causality an axis."
        )
    entries = tuple(2 * a.window - 1 for a in axes)
    if table is not None and tuple(table.shape) != (q.shape[1], *entries):
        raise LongspanError(
            f"a table of biases is {tuple(table.shape)}; expected {(q.shape[1], *entries)}, "
            "heads × (2 window − 1) an axis."
        )
    o = q.new_zeros(*q.shape[:-1], v.shape[-1])
    if o.numel() == 0 or k.numel() == 0:
        return o + 0 * q.sum()
    o = _neighbours(
        q.reshape(-1, math.prod(queries), q.shape[-1]),
        k.reshape(-1, math.prod(keys), k.shape[-1]),
        v.reshape(-1, math.prod(keys), v.shape[-1]),
        None if table is None else table.flatten(1),
        None if keep is None else keep.flatten(1),
        q.shape[1],
        q.shape[-1] ** -0.5 if scale is None else scale,
        (tuple(axes), queries, keys),
    )
    return o.view(*q.shape[:-1], v.shape[-1])


def lines(
    q: Float[Tensor, "B H *queries D"],
    k: Float[Tensor, "B H *keys D"],
    v: Float[Tensor, "B H *keys V"],
    axis: int,
    *,
    causal: bool = False,
    keep: Bool[Tensor, "B *keys"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H *queries V"]:
    """Softmax attention within every line of one axis; the other axes are batch.

    Causally the last query of a line meets its last key. O(L · n) time for lines of n keys.

    Raises:
        LongspanError: an axis the grid does not have.
    """
    grid = q.dim() - 3
    if not -grid <= axis < grid:
        raise LongspanError(f"a grid of {grid} axes has no axis {axis}: give 0 … {grid - 1}.")
    axis %= grid

    def fold(t: Tensor) -> Tensor:
        t = t.movedim((1, 2 + axis), (-3, -2))  # B others H n D
        return t.reshape(-1, *t.shape[-3:])

    if keep is not None:
        keep = keep.movedim(1 + axis, -1)
        keep = keep.reshape(-1, keep.shape[-1])
    o = dense.attend(fold(q), fold(k), fold(v), causal=causal, keep=keep, scale=scale)
    others = [n for i, n in enumerate(q.shape[2:-1]) if i != axis]
    return o.view(q.shape[0], *others, *o.shape[1:]).movedim((-3, -2), (1, 2 + axis))


def alone(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S V"],
    keep: Keep,
) -> Float[Tensor, "B H L V"]:
    """`attend` over the kept tokens of each row alone, as if there were no others; 0 elsewhere.

    For patterns whose borders or absolute places depend on the length. Queries are the last of
    the keys.
    """
    outs = []
    length = q.shape[2]
    for row, kept in enumerate(keep):
        at_k = kept.nonzero()[:, 0]
        at_q = kept[kept.shape[0] - length :].nonzero()[:, 0]
        o = attend(
            q[row : row + 1].index_select(2, at_q),
            k[row : row + 1].index_select(2, at_k),
            v[row : row + 1].index_select(2, at_k),
        )
        outs.append(o.new_zeros(*q.shape[1:3], v.shape[3]).index_copy(1, at_q, o[0]))
    return torch.stack(outs) if outs else q.new_zeros(*q.shape[:3], v.shape[3])


def together(
    name: str,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S V"],
    keep: Keep | None,
) -> Float[Tensor, "B H L V"]:
    """`attend` over one whole sequence, or over its kept tokens `alone`.

    Raises:
        LongspanError: other than as many keys as queries.
    """
    if q.shape[2] != k.shape[2]:
        raise LongspanError(
            f"{name} got {q.shape[2]} queries for {k.shape[2]} keys: it attends within one "
            "sequence and has no cross form."
        )
    return attend(q, k, v) if keep is None else alone(attend, q, k, v, keep)


def stream(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S V"],
    state: History | None,
    *,
    keep: Keep | None = None,
    reach: int | None = None,
    period: int = 1,
) -> tuple[Float[Tensor, "B H L V"], History]:
    """A causal `attend` after what the state holds, places counting kept tokens as in `alone`.

    Args:
        reach: no query sees a key that far behind it; None where any may be seen.
        period: `attend` is the same when all places move by so many.
    """
    seen = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
    if keep is not None:
        k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
    if state is not None:
        k, v = (torch.cat(pair, 2) for pair in ((state.k, k), (state.v, v)))
        seen = torch.cat([state.keep, seen], 1)
    whole = bool(seen.all())
    o = attend(q, k, v) if whole else alone(attend, q, k, v, seen)
    if reach is None or not len(seen):
        return o, History(k, v, seen)
    count = seen.sum(1)
    gone = (count - reach).clamp(min=0) // period * period
    seen = seen if whole else seen & (seen.cumsum(1) > gone[:, None])
    start = int(gone.min()) if whole else int((~seen).all(0).cumprod(0).sum())
    return o, History(k[:, :, start:], v[:, :, start:], seen[:, start:])


def pair(size: int | Sequence[int], across: int) -> tuple[int, int]:
    """(rows, columns) as given, or of one number, the rows, with `across` columns."""
    return (size, across) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True)
class BlockedRaster:
    """An order of the cells of a grid: blocks in raster order, and the cells of each likewise.

    The grid has any number of rows; a block at the right border may be narrower. With one row and
    blocks of one row this is the plain order.

    Raises:
        LongspanError: blocks without cells; blocks wider than the grid.
    """

    columns: int
    block: tuple[int, int]

    def __post_init__(self) -> None:
        if min(self.block) < 1 or self.block[1] > self.columns:
            raise LongspanError(
                f"blocks of {self.block} cells were asked for on {self.columns} columns: give "
                "(rows, columns) of at least 1, not wider than the grid."
            )

    @property
    def band(self) -> int:
        """Cells of one row of blocks."""
        return self.block[0] * self.columns

    @property
    def across(self) -> int:
        """Blocks side by side."""
        return -(-self.columns // self.block[1])

    def cells(self, step: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape 2"]:
        """(row, column) of each step of the order."""
        height, width = self.block
        band, rest = step // self.band, step % self.band
        block, rest = rest // (height * width), rest % (height * width)
        wide = (self.columns - block * width).clamp(max=width)
        return torch.stack([band * height + rest // wide, block * width + rest % wide], -1)

    def steps(self, cells: Int[Tensor, "*shape 2"]) -> Int[Tensor, "*shape"]:
        """The step of each (row, column): the inverse of `cells`."""
        height, width = self.block
        row, column = cells.unbind(-1)
        left = column // width * width
        wide = (self.columns - left).clamp(max=width)
        inside = row % height * wide + column - left
        return row // height * self.band + left * height + inside

    def blocks(self, step: int) -> int:
        """The block that holds a step."""
        inside = step % self.band // (self.block[0] * self.block[1])
        return step // self.band * self.across + inside

    def order(self, cells: int) -> Int[Tensor, "cells"]:
        """Of a grid of so many cells, the plain raster index of each step.

        Raises:
            LongspanError: cells that do not fill whole rows of blocks.
        """
        if cells % self.band:
            raise LongspanError(
                f"{cells} cells do not fill rows of blocks of {self.band}: fill the image up to "
                f"{-(-cells // self.band) * self.band} cells, or choose lower blocks."
            )
        row, column = self.cells(torch.arange(cells)).unbind(-1)
        return row * self.columns + column

    def gather(self, x: Float[Tensor, "B cells E"]) -> Float[Tensor, "B cells E"]:
        """From plain raster order into this one."""
        return x.index_select(1, self.order(x.shape[1]).to(x.device))

    def scatter(self, x: Float[Tensor, "B cells E"]) -> Float[Tensor, "B cells E"]:
        """From this order back into plain raster order."""
        return x.index_select(1, self.order(x.shape[1]).argsort().to(x.device))

    def members(
        self, first: int, last: int, flange: tuple[int, int], keys: int, *, below: bool
    ) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n T"]]:
        """Steps in blocks first … last − 1, and in each with `flange` (rows, columns) around it.

        Above, left and right, and with `below` beneath it too; −1 where there is no cell, or none
        before `keys` steps.
        """
        block = torch.arange(first, last)
        corner = torch.stack([block // self.across, block % self.across], -1)
        corner = corner * torch.tensor(self.block)
        (height, width), (high, wide) = self.block, flange

        def box(low: tuple[int, int], high: tuple[int, int]) -> Tensor:
            inside = torch.cartesian_prod(*map(torch.arange, low, high))
            cells = corner[:, None] + inside.view(-1, 2)
            row, column = cells.unbind(-1)
            steps = self.steps(cells.clamp(min=0))
            valid = (row >= 0) & (column >= 0) & (column < self.columns) & (steps < keys)
            return steps.masked_fill(~valid, -1)

        queries = box((0, 0), (height, width))
        bottom = height + high if below else height
        return queries, box((-high, -wide), (bottom, width + wide))
