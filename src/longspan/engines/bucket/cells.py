"""Cells: sets of queries and sets of keys, of a few sizes, that meet set by set.

An index of tokens is X C a: C cells of a places in each of X rows (batch × heads), with the number
of tokens L (or S) where a place stays empty.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from longspan.engines import dense, pattern
from longspan.engines.dense import Layout, additive, tile_backward, tile_forward

Index = Int[Tensor, "B H C _"]


def rows_of(t: Float[Tensor, "B H L D"], index: Index) -> Float[Tensor, "B H C _ D"]:
    """The tokens at `index`, zeros at empty places; differentiable, a token may be met often."""
    batch, heads, length, width = t.shape
    base = torch.arange(batch * heads, device=t.device).view(batch, heads, 1, 1) * length
    at = (index.clamp(max=length - 1) + base).flatten()
    found = t.reshape(-1, width).index_select(0, at).view(*index.shape, width)
    empty = index == length
    return found.masked_fill(empty[..., None], 0) if empty.any() else found


def spread(t: Float[Tensor, "B H C _ D"], index: Index, length: int) -> Float[Tensor, "B H L D"]:
    """Each token's sum over the places where it stands: the transpose of `rows_of`."""
    batch, heads = t.shape[:2]
    base = torch.arange(batch * heads, device=t.device).view(batch, heads, 1, 1) * (length + 1)
    total = t.new_zeros(batch * heads * (length + 1), t.shape[-1])
    total = total.index_add(0, (index + base).flatten(), t.reshape(-1, t.shape[-1]))
    return total.view(batch, heads, length + 1, t.shape[-1])[:, :, :length]


@torch.no_grad()
def members(
    x: Float[Tensor, "B H L D"],
    centroids: Float[Tensor, "H C D"],
    size: Int[Tensor, " B"],
    keep: Bool[Tensor, "B L"] | None,
) -> Index:
    """Each centroid's `size` tokens of largest inner product, by position, one size a row.

    Later tokens change who is chosen. Works on a few centroids at a time.
    """
    batch, heads, length, _ = x.shape
    count = centroids.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    most = min(int(size.max()), length) if batch else 0
    found = torch.full((batch, heads, count, most), length, device=x.device)
    if not found.numel():
        return found
    x, centroids = x.to(wide), centroids.to(wide)
    within = torch.arange(most, device=x.device) < size[:, None]
    each = max(1, pattern.WORKSPACE // (length * x.element_size()))
    for b in range(batch):
        for h in range(heads):
            for start in range(0, count, each):
                with torch.autocast(x.device.type, enabled=False):
                    scores = centroids[h, start : start + each] @ x[b, h].mT
                if keep is not None:
                    scores.masked_fill_(~keep[b], -math.inf)
                best = scores.topk(most, dim=-1).indices
                legal = within[b] if keep is None else within[b] & keep[b][best]
                found[b, h, start : start + each] = best.masked_fill(~legal, length)
    return found.sort(-1).values


@torch.no_grad()
def balanced(
    values: Float[Tensor, "B H L"], cells: Int[Tensor, " B"], keep: Bool[Tensor, "B L"] | None
) -> Index:
    """Tokens sorted by value and cut into as many cells as the row has, equal to within one.

    Masked tokens stand nowhere.
    """
    batch, heads, length = values.shape
    if keep is not None:
        values = values.masked_fill(~keep[:, None], math.inf)
        kept = keep.sum(1)
    else:
        kept = torch.full((batch,), length, device=values.device)
    order = values.argsort(dim=-1, stable=True)
    count = int(cells.max()) if batch else 0
    turn = torch.arange(count + 1, device=values.device).clamp(max=cells[:, None])  # B C+1
    border = turn * kept[:, None] // cells.clamp(min=1)[:, None]
    width = int((border[:, 1:] - border[:, :-1]).max()) if border.numel() else 0
    place = border[:, :-1, None] + torch.arange(width, device=values.device)
    filled = place < border[:, 1:, None]  # B C P
    place = place.masked_fill(~filled, 0).flatten(1)[:, None].expand(-1, heads, -1)
    index = order.gather(-1, place) if length else place
    index = index.view(batch, heads, *filled.shape[1:])
    return index.masked_fill(~filled[:, None], length)


@torch.no_grad()
def asymmetric(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B H S D"],
    keep_q: Bool[Tensor, "B L"] | None,
    keep_k: Bool[Tensor, "B S"] | None,
    transform: str = "xbox+",
) -> tuple[Float[Tensor, "B H L F"], Float[Tensor, "B H S F"]]:
    """Queries and keys lifted so that those of large inner product lie near each other.

    With M the largest norms of the kept tokens of each row and head,

        xbox+: [q ; 0 ; √(M_Q² + M_K² − ‖q‖²)],  [k ; √(M_Q² + M_K² − ‖k‖²) ; 0]
        xbox:  [q ; 0],                          [k ; √(M_K² − ‖k‖²)]
        l2lsh: [q / ‖q‖ ; ½ ; ½ ; ½],            [u ; ‖u‖² ; ‖u‖⁴ ; ‖u‖⁸],  u = 0.83 k / M_K

    Computed in at least float32.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    squares = [t.square().sum(-1, keepdim=True) for t in (q, k)]

    def top(square: Tensor, keep: Tensor | None) -> Tensor:
        square = square if keep is None else square.masked_fill(~keep[:, None, :, None], 0)
        return square.amax(2, keepdim=True) if square.shape[2] else square.sum(2, keepdim=True)

    tops = [top(s, keep) for s, keep in zip(squares, (keep_q, keep_k), strict=True)]
    if transform == "xbox+":
        radius = tops[0] + tops[1]
        beside = [(radius - s).clamp(min=0).sqrt() for s in squares]
        none = [torch.zeros_like(b) for b in beside]
        return torch.cat([q, none[0], beside[0]], -1), torch.cat([k, beside[1], none[1]], -1)
    if transform == "xbox":
        beside = (tops[1] - squares[1]).clamp(min=0).sqrt()
        return torch.cat([q, torch.zeros_like(q[..., :1])], -1), torch.cat([k, beside], -1)
    small = 0.83 * k / tops[1].sqrt().clamp(min=1e-12)
    norm = small.square().sum(-1, keepdim=True)
    powers = torch.cat([norm, norm**2, norm**4], -1)
    halves = torch.full_like(q[..., :1], 0.5).expand(*q.shape[:3], 3)
    return torch.cat([F.normalize(q, dim=-1), halves], -1), torch.cat([small, powers], -1)


def clusters(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B H S D"],
    keep: Bool[Tensor, "B S"] | None,
    generator: torch.Generator | None,
    *,
    size: int,
    rounds: int,
    transform: str,
) -> list[tuple[Index, Index]]:
    """Whom each cell of each round holds: queries B H C a and keys B H C b, L or S: none.

    Both are lifted by `asymmetric`, projected on a random direction a head and round, and cut into
    `balanced` cells, as many as hold `size` queries each. Where L = S, `keep` is the queries' too.
    """
    own = keep if q.shape[2] == k.shape[2] else None
    x, y = asymmetric(q, k, own, keep, transform)
    directions = torch.randn(q.shape[1], x.shape[3], rounds, generator=generator)
    directions = directions.to(x.device, x.dtype)
    counts = x.new_full(x.shape[:1], q.shape[2], dtype=torch.long)
    cells = -(-(counts if own is None else own.sum(1)) // size)
    with torch.autocast(x.device.type, enabled=False):
        of_q, of_k = (t @ directions for t in (x, y))
    return [
        (balanced(of_q[..., r], cells, own), balanced(of_k[..., r], cells, keep))
        for r in range(rounds)
    ]


class Tiles(Layout):
    """Queries X C a D meet keys X C b D, cell by cell, where `seen`: (X|1) (C|1) (a|1) b."""

    def __init__(self, seen: Bool[Tensor, "_ _ _ K"] | None = None) -> None:
        self.seen = seen

    def _mask(self, at: tuple[slice, slice]) -> Tensor | None:
        """What of some rows and cells may be seen; None for all."""
        if self.seen is None:
            return None
        return self.seen[
            tuple(s if n > 1 else slice(None) for s, n in zip(at, self.seen.shape, strict=False))
        ]

    def _pieces(self, q: Tensor, k: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor | None]]:
        """(rows, cells) of pieces whose masks fit the workspace, and their masks."""
        rows, count = q.shape[:2]
        most = pattern.WORKSPACE // max(1, q.shape[2] * k.shape[2] * q.element_size())
        cells = min(count, max(1, most))
        together = max(1, most // max(1, count))
        for x in range(0, rows, together):
            for c in range(0, count, cells):
                at = slice(x, min(x + together, rows)), slice(c, min(c + cells, count))
                seen = self._mask(at)
                yield at, None if seen is None else additive(seen, q.dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        o = v.new_empty(*q.shape[:3], v.shape[3])
        lse = v.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for at, mask in self._pieces(q, k):
            o[at], lse[at] = tile_forward(q[at], k[at], v[at], mask, scale)
        return o, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for at, mask in self._pieces(q, k):
            found = tile_backward(do[at], q[at], k[at], v[at], o[at], lse[at], mask, scale)
            for grad, part in zip(grads, found, strict=True):
                grad[at] = part
        return grads


class Gathered(Tiles):
    """Queries X C a D meet keys X C b D, cell by cell: what `rows_of` gathered.

    Args:
        queries, keys: their indices, B H C a and B H C b; positions for `causal`.
        lengths: L and S, the indices of empty places.
        causal: only keys at earlier or equal positions.
    """

    def __init__(
        self, queries: Index, keys: Index, lengths: tuple[int, int], *, causal: bool
    ) -> None:
        self.queries, self.keys = queries.flatten(0, 1), keys.flatten(0, 1)
        self.total, self.causal = lengths[1], causal
        self.full = not causal and not bool((self.keys == self.total).any())

    def _mask(self, at: tuple[slice, slice]) -> Tensor | None:
        if self.full:
            return None
        j = self.keys[at][:, :, None]
        seen = j < self.total
        return seen & (j <= self.queries[at][..., None]) if self.causal else seen


class Cells(Layout):
    """Every query stands in one cell at most, and meets the keys of that cell."""

    def __init__(self, queries: Index, keys: Index) -> None:
        self.queries, self.keys = queries, keys

    def _gather(self, t: Tensor, index: Index) -> Tensor:
        return rows_of(t, index).flatten(0, 1)

    def _inner(self, q: Tensor, k: Tensor) -> Gathered:
        return Gathered(self.queries, self.keys, (q.shape[2], k.shape[2]), causal=False)

    def _return(self, t: Tensor, index: Index, length: int, empty: float) -> Tensor:
        """Cells' rows back to their tokens, each written at most once."""
        batch, heads = index.shape[:2]
        base = torch.arange(batch * heads, device=t.device).view(batch, heads, 1, 1) * (length + 1)
        at = (index + base).flatten()
        placed = t.new_full((batch * heads * (length + 1), t.shape[-1]), empty)
        placed.index_copy_(0, at, t.reshape(-1, t.shape[-1]))
        return placed.view(batch, heads, length + 1, t.shape[-1])[:, :, :length]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        o, lse = self._inner(q, k).forward(
            self._gather(q, self.queries),
            self._gather(k, self.keys),
            self._gather(v, self.keys),
            scale,
        )
        placed = self._return(lse[..., None], self.queries, q.shape[2], -math.inf)
        return self._return(o, self.queries, q.shape[2], 0.0), placed[..., 0]

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = self._inner(q, k).backward(
            self._gather(do, self.queries),
            self._gather(q, self.queries),
            self._gather(k, self.keys),
            self._gather(v, self.keys),
            self._gather(o, self.queries),
            self._gather(lse[..., None], self.queries)[..., 0],
            scale,
        )
        return (
            self._return(dq, self.queries, q.shape[2], 0.0),
            self._return(dk, self.keys, k.shape[2], 0.0),
            self._return(dv, self.keys, k.shape[2], 0.0),
        )


def attend_cells(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S V"],
    queries: Index,
    keys: Index,
    *,
    causal: bool = False,
    scale: float | None = None,
    eps: float = 0.0,
) -> Float[Tensor, "B H L V"]:
    """Attention inside each cell; a token's outputs summed over its cells / (their count + eps)."""
    lengths = q.shape[2], k.shape[2]
    if not queries.numel() or not keys.numel():
        return q.new_zeros(*q.shape[:3], v.shape[3])
    layout = Gathered(queries, keys, lengths, causal=causal)
    gathered = [rows_of(t, at).flatten(0, 1) for t, at in ((q, queries), (k, keys), (v, keys))]
    o, _ = dense.union(gathered[0], [(layout, gathered[1], gathered[2])], scale=scale)
    o = o.to(torch.promote_types(o.dtype, torch.float32)).unflatten(0, q.shape[:2])
    total = spread(o, queries, lengths[0])
    count = spread(torch.ones_like(o[..., :1]), queries, lengths[0])
    return (total / (count + eps).clamp(min=1.0)).to(q.dtype)
