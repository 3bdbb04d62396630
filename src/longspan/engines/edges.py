"""Attention along a list of edges: each query names its keys."""

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from longspan.engines.dense import Layout
from longspan.engines.pattern import WORKSPACE
from longspan.shapes import Keep

# (first, last) → the keys of queries first … last − 1, R K, with −1 where a row has fewer.
Columns = Callable[[int, int], Int[Tensor, "R K"]]


def of_csr(start: Int[Tensor, "borders"], keys: Int[Tensor, "edges"]) -> Columns:
    """The keys of query i are keys[start[i] : start[i + 1]]."""

    def columns(first: int, last: int) -> Tensor:
        low, high = start[first:last, None], start[first + 1 : last + 1, None]
        at = low + torch.arange(int((high - low).max()), device=keys.device)
        return keys[at.clamp(max=len(keys) - 1)].masked_fill(at >= high, -1)

    return columns


class Edges(Layout):
    """Query i meets the keys that `columns` names for it, the same in every row and head.

    Keys are gathered a workspace at a time; `tile` queries are listed at once, so rows of very
    different lengths should not share one. O(edges) time, O(L) memory beside the workspace.
    """

    def __init__(self, columns: Columns, *, keep: Keep | None = None, tile: int = 1024) -> None:
        self.columns, self.keep, self.tile = columns, keep, tile

    def _parts(self, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """(rows of batch × heads, queries, flat key indices x R K, seen (x|1) R K)."""
        rows, keys = q.shape[0] * q.shape[1], k.shape[2]
        for start in range(0, q.shape[2], self.tile):
            listed = self.columns(start, min(start + self.tile, q.shape[2])).to(q.device)
            width = max(listed.shape[1], 1)
            each = WORKSPACE // (2 * q.element_size() * width * max(k.shape[3], 1))
            some = max(1, min(len(listed), each))
            together = max(1, each // some)
            for first in range(0, len(listed), some):
                index = listed[first : first + some]
                present, index = (index >= 0)[None], index.clamp(min=0)
                queries = slice(start + first, start + first + len(index))
                for x in range(0, rows, together):
                    of = torch.arange(x, min(x + together, rows), device=q.device)
                    seen = present
                    if self.keep is not None:
                        seen = seen & self.keep[of // q.shape[1]][:, index]
                    yield slice(x, x + len(of)), queries, index + of[:, None, None] * keys, seen

    @staticmethod
    def _taken(t: Tensor, index: Tensor, wide: torch.dtype) -> Tensor:
        flat = t.flatten(0, 2).index_select(0, index.flatten())
        return flat.view(*index.shape, t.shape[3]).to(wide)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        k, v = k.contiguous(), v.contiguous()
        wide = torch.promote_types(q.dtype, torch.float32)
        o = v.new_zeros(*q.shape[:3], v.shape[3])
        lse = q.new_full(q.shape[:3], -math.inf, dtype=wide)
        if k.shape[2] == 0:
            return o, lse
        rows_q, rows_o, rows_z = q.flatten(0, 1), o.flatten(0, 1), lse.flatten(0, 1)
        for rows, queries, index, seen in self._parts(q, k):
            part = rows_q[rows, queries].to(wide)[..., None]
            scores = (self._taken(k, index, wide) @ part)[..., 0] * scale
            scores = scores.masked_fill(~seen, -math.inf)
            z = scores.logsumexp(-1)
            weights = (scores - z.masked_fill(z == -math.inf, 0)[..., None]).exp()
            found = weights[..., None, :] @ self._taken(v, index, wide)
            rows_o[rows, queries] = found[..., 0, :].to(o.dtype)
            rows_z[rows, queries] = z
        return o, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        k, v = k.contiguous(), v.contiguous()
        wide = lse.dtype
        dq, dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (q, k, v))
        rows_do, rows_q, rows_o, rows_z, rows_dq = (t.flatten(0, 1) for t in (do, q, o, lse, dq))
        if k.shape[2]:
            for rows, queries, index, seen in self._parts(q, k):
                d, part, out = (
                    t[rows, queries].to(wide)[..., None] for t in (rows_do, rows_q, rows_o)
                )
                near = self._taken(k, index, wide)
                scores = ((near @ part)[..., 0] * scale).masked_fill(~seen, -math.inf)
                weights = (scores - rows_z[rows, queries, None]).exp()
                wanted = (self._taken(v, index, wide) @ d)[..., 0] - (d * out).sum((-2, -1))[
                    ..., None
                ]
                dscores = weights * wanted * scale
                rows_dq[rows, queries] = (dscores[..., None, :] @ near)[..., 0, :]
                flat = index.flatten()
                for grad, share, side in ((dk, dscores, part), (dv, weights, d)):
                    each = share[..., None] * side[..., None, :, 0]
                    grad.view(-1, grad.shape[3]).index_add_(0, flat, each.flatten(0, 2))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
