"""Softmax attention over the past of each query, as far back as a soft span of its own reaches.

    a_ij = m(x) exp(s_ij) / Σ_j' m(x') exp(s_ij'),   x = i − j,   m(x) = clip((R + z − x) / R, 0, 1)

Work is done in blocks of queries; a block meets only the keys that some span in it reaches.
"""

import math
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engines.pattern import WORKSPACE
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

# Reaches are whole multiples of this many keys, or tables and caches change at every update.
GRAIN = 64
BLOCK = 64


class Recent(NamedTuple):
    """The newest keys and values, packed to the end, and which of them are tokens."""

    k: Float[Tensor, "B H P D"]
    v: Float[Tensor, "B H P V"]
    keep: Bool[Tensor, "B P"]


def mask(x: Tensor, z: Tensor, ramp: float) -> Tensor:
    """m(x), by distance x and span z, which broadcast."""
    return ((ramp + z - x) / ramp).clamp(0, 1)


def log(m: Tensor) -> Tensor:
    """log m, −inf with gradient 0 where m is 0."""
    return torch.where(m > 0, m.masked_fill(m <= 0, 1).log(), -math.inf)


def reach(span: float, ramp: float, *, near: int, most: int) -> int:
    """How many distances from `near` on have weight, in whole grains, at most `most`."""
    wanted = max(math.ceil(span + ramp) - near, 1)
    return min(-(-wanted // GRAIN) * GRAIN, most)


def attend(
    q: Queries,
    k: Keys,
    v: Values,
    z: Float[Tensor, "..."],
    state: Recent | None = None,
    *,
    keep: Keep | None = None,
    table: Float[Tensor, "T D"] | None = None,
    ramp: float,
    most: int,
    near: int = 1,
    slack: int = 0,
    dropout: float = 0.0,
) -> tuple[Outputs, Recent]:
    """Attention to the keys at distances near … near + most − 1, and the newest keys for later.

    Distances count kept tokens.

    Args:
        z: spans, broadcast to B H L.
        table: of distance near + n the n-th row is added to keys of that distance.
        ramp: R. most: S, keys a query may see.
        slack: keys the state holds beyond what spans reach now, for spans that grow.
        dropout: of the weights.
    """
    z = z.expand(*q.shape[:3])
    length, batch = q.shape[2], q.shape[0]
    seen = k.new_ones(batch, length, dtype=torch.bool) if keep is None else keep
    packs = keep is not None and not bool(keep.all())
    if packs:
        k, v = (t.masked_fill(~seen[:, None, :, None], 0) for t in (k, v))
    order = None
    if packs:
        order = seen.to(torch.uint8).argsort(dim=1, stable=True)
        q, k, v = (_reorder(t, order) for t in (q, k, v))
        z, seen = _reorder(z[..., None], order)[..., 0], seen.gather(1, order)
    past = 0
    if state is not None:
        past = state.keep.shape[1]
        k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        seen = torch.cat([state.keep, seen], 1)
        if packs:  # padding of this call stands between the state and its tokens
            later = seen.to(torch.uint8).argsort(dim=1, stable=True)
            k, v, seen = _reorder(k, later), _reorder(v, later), seen.gather(1, later)
    spans = z.detach().float()
    if packs and order is not None:
        spans = spans.masked_fill(~seen[:, None, past:], 0)
    o = _blocks(q, k, v, z, spans, seen, table, ramp, most, near, dropout)
    if order is not None:
        o = _reorder(o, order.argsort(1)).masked_fill(~_kept(keep), 0)
    widest = float(spans.max()) if spans.numel() else 0.0
    size = min(reach(widest, ramp, near=near, most=most) + slack, most) + near - 1
    start = max(k.shape[2] - size, 0)
    return o, Recent(k[:, :, start:], v[:, :, start:], seen[:, start:])


def _kept(keep: Tensor | None) -> Tensor:
    assert keep is not None
    return keep[:, None, :, None]


def _reorder(t: Tensor, order: Tensor) -> Tensor:
    """Tokens of t (B H T D) in another order (B T) of each row."""
    batch, heads, length, width = t.shape
    row = torch.arange(batch * heads, device=t.device).view(batch, heads, 1) * length
    flat = t.reshape(-1, width).index_select(0, (row + order[:, None]).flatten())
    return flat.view(batch, heads, order.shape[1], width)


def _blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    spans: Tensor,
    seen: Tensor,
    table: Tensor | None,
    ramp: float,
    most: int,
    near: int,
    dropout: float,
) -> Tensor:
    """Blocks of as far a reach together."""
    (batch, heads, length, width), keys = q.shape, k.shape[2]
    if not q.numel():
        return v.new_zeros(*q.shape[:3], v.shape[3])
    size = min(BLOCK, length)
    behind = -length % size
    spans, z = F.pad(spans, (0, behind)), F.pad(z, (0, behind))
    widest = spans.unflatten(2, (-1, size)).amax((0, 1, 3)).tolist()
    reaches = [reach(span, ramp, near=near, most=most) for span in widest]
    tiles, start = [], 0
    for far, run in groupby(reaches):
        each = batch * heads * (size + far) * (max(width, v.shape[3]) + 3 * size)
        together = max(1, WORKSPACE // (each * max(q.element_size(), 4)))
        end = start + len(list(run))
        while start < end:
            stop = min(start + together, end)
            seed = int(torch.randint(2**62, ())) if dropout else 0
            first = keys - length - (far + near - 1)  # key `keys − length + i` is query i's own
            tiles.append(_Tile(start, stop, size, first, far, near, ramp, dropout, seed))
            start = stop
    rows = F.pad(q, (0, 0, 0, behind))
    return _in_tiles(tuple(tiles), seen, rows, k, v, z, table)[:, :, :length]


class _Tiles(torch.autograd.Function):
    """All tiles, each computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        tiles: "tuple[_Tile, ...]",
        seen: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        z: Tensor,
        table: Tensor | None,
    ) -> Tensor:
        o = v.new_empty(*q.shape[:3], v.shape[3])
        for tile in tiles:
            tile.rows(o).copy_(tile(seen, *tile.given(q, k, v, z, table)))
        ctx.tiles = tiles
        ctx.save_for_backward(seen, q, k, v, z, table)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        seen, *inputs = ctx.saved_tensors
        grads = [None if t is None else torch.zeros_like(t) for t in inputs]
        for tile in ctx.tiles:
            given = [
                None if t is None else t.detach().requires_grad_() for t in tile.given(*inputs)
            ]
            with torch.enable_grad():
                o = tile(seen, *given)
            wanted = [t for t in given if t is not None]
            found = iter(torch.autograd.grad(o, wanted, tile.rows(do)))
            for into in tile.given(*grads):
                if into is not None:
                    into += next(found)
        return None, None, *grads


_in_tiles: Any = torch.compiler.disable(_Tiles.apply)  # which keys are met depends on values


@dataclass(frozen=True)
class _Tile:
    """Blocks of `size` queries, start … stop, that meet `far` distances each from `near` on.

    Attributes:
        first: place of the first key of block 0, which may lie before all keys.
    """

    start: int
    stop: int
    size: int
    first: int
    far: int
    near: int
    ramp: float
    dropout: float
    seed: int

    @property
    def width(self) -> int:
        """Keys that some query of a block meets."""
        return self.size + self.far - 1

    def rows(self, t: Tensor) -> Tensor:
        """The queries' part of t: B H (N C) …"""
        return t[:, :, self.start * self.size : self.stop * self.size]

    def keys(self, t: Tensor, axis: int) -> Tensor:
        """The keys' part of t, without what lies outside of it."""
        low = self.first + self.start * self.size
        high = low + (self.stop - self.start - 1) * self.size + self.width
        low, high = (min(max(at, 0), t.shape[axis]) for at in (low, high))
        return t.narrow(axis, low, high - low)

    def given(self, q: Any, k: Any, v: Any, z: Any, table: Any) -> list[Any]:
        """Views of what this tile reads, or of the gradients that it adds to; None for None."""
        cut = [self.rows(q), self.keys(k, 2), self.keys(v, 2), self.rows(z)]
        return [*cut, None if table is None else table[: self.far]]

    def __call__(
        self, seen: Tensor, q: Tensor, k: Tensor, v: Tensor, z: Tensor, table: Tensor | None
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            rows = self._blocks(q.to(wide)) * q.shape[-1] ** -0.5
            scores = self._by_distance(rows @ self._spans(k.to(wide), 2))
            if table is not None:
                scores = scores + rows @ table.to(wide).flip(0).mT
            x = torch.arange(self.far - 1, -1, -1, device=q.device) + self.near
            spans = self._blocks(z.to(wide)[..., None])
            scores = scores + log(mask(x, spans, self.ramp))
            visible = self._spans(self.keys(seen, 1), 1)[:, None, :, None]
            visible = self._by_distance(visible.expand(-1, -1, -1, self.size, -1))
            scores = scores.masked_fill(~visible, -math.inf)
            weights: Any = torch.ops.aten._safe_softmax(scores, -1)
            if self.dropout:
                generator = torch.Generator(q.device).manual_seed(self.seed)
                kept = torch.empty_like(weights).bernoulli_(1 - self.dropout, generator=generator)
                weights = weights * kept / (1 - self.dropout)
            o = self._by_key(weights) @ self._spans(v.to(wide), 2).mT
        return o.flatten(2, 3).to(q.dtype)

    def _blocks(self, t: Tensor) -> Tensor:
        return t.unflatten(2, (self.stop - self.start, self.size))

    def _spans(self, t: Tensor, axis: int) -> Tensor:
        """The keys of each block, their own axis last: B H N D K, or B N K."""
        before = max(-(self.first + self.start * self.size), 0)
        whole = (self.stop - self.start - 1) * self.size + self.width
        after = whole - before - t.shape[axis]
        padded = F.pad(t, (0, 0) * (t.dim() - 1 - axis) + (before, after))
        return padded.unfold(axis, self.width, self.size)

    def _by_distance(self, x: Tensor) -> Tensor:
        """… C K → … C far: row i from column i on, by a change of view."""
        flat = F.pad(x.flatten(-2), (0, self.size))
        return flat.unflatten(-1, (self.size, self.width + 1))[..., : self.far]

    def _by_key(self, x: Tensor) -> Tensor:
        """The inverse, zeros elsewhere."""
        flat = F.pad(x, (0, self.size)).flatten(-2)
        return flat[..., : self.size * self.width].unflatten(-1, (self.size, self.width))
