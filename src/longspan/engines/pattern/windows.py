"""Windows of a grid, and attention of each to itself and a margin, under a bias by place."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longspan.engines import pattern
from longspan.engines.dense import additive, tile_forward
from longspan.engines.pattern.biased import Biased, tile_backward
from longspan.shapes import Keep


@dataclass(frozen=True)
class Windows:
    """A grid of `shape` cells in raster order, cut into windows of `size` from the first cell on.

    Those at the far borders may be cut short. Called with a range of windows, it gives the cells
    of each, and of each with a `margin` around it; −1 where the grid has none.
    """

    shape: tuple[int, int]
    size: tuple[int, int]
    margin: tuple[int, int]

    @property
    def counts(self) -> tuple[int, int]:
        """Windows along each axis."""
        return -(-self.shape[0] // self.size[0]), -(-self.shape[1] // self.size[1])

    def __call__(self, first: int, last: int) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n T"]]:
        window = torch.arange(first, last)
        across = max(self.counts[1], 1)
        corner = torch.stack([window // across, window % across], -1) * torch.tensor(self.size)
        return tuple(self._cells(corner, margin) for margin in ((0, 0), self.margin))  # pyright: ignore[reportReturnType]

    def _cells(self, corner: Tensor, margin: tuple[int, int]) -> Tensor:
        axes = [torch.arange(-m, n + m) for n, m in zip(self.size, margin, strict=True)]
        row, column = (corner[:, None] + torch.cartesian_prod(*axes)).unbind(-1)
        inside = (row >= 0) & (row < self.shape[0]) & (column >= 0) & (column < self.shape[1])
        return (row * self.shape[1] + column).masked_fill(~inside, -1)

    def by_offset(self, table: Float[Tensor, "H rows columns"]) -> Float[Tensor, "H t T"]:
        """table[query − key] for the places of a window and those with its margin.

        Offsets along an axis are −(size + margin − 1) … size + margin − 1, in this order.
        """
        places = []
        for n, m in zip(self.size, self.margin, strict=True):
            places.append(torch.arange(n)[:, None] - torch.arange(-m, n + m) + n + m - 1)
        row, column = places
        index = row[:, None, :, None] * table.shape[2] + column[None, :, None]
        index = index.flatten(2).flatten(0, 1).to(table.device)
        return table.flatten(1).index_select(1, index.flatten()).view(-1, *index.shape)


class _Task(NamedTuple):
    """Rows of batch × heads, flat indices of queries and keys, real queries, the mask x n t T."""

    heads: Tensor
    queries: Tensor
    keys: Tensor
    valid: Tensor
    mask: Tensor


class ByPlace(Biased):
    """Each window meets itself and its margin; bias (H, t, T) by the places in these.

    Args:
        keep: keys that may be seen.
    """

    def __init__(self, windows: Windows, keep: Keep | None = None) -> None:
        self.windows, self.keep = windows, keep

    def _tasks(self, q: Tensor, k: Tensor, bias: Tensor) -> Iterator[_Task]:
        rows, (heads, places, near) = q.shape[0] * q.shape[1], bias.shape
        each = near * max(places, q.shape[3]) * q.element_size()
        together = max(1, min(rows, pattern.WORKSPACE // each))
        count = max(1, pattern.WORKSPACE // (each * together))
        total = math.prod(self.windows.counts)
        for first in range(0, total, count):
            at_q, at_k = (t.to(q.device) for t in self.windows(first, min(first + count, total)))
            inside = additive((at_q >= 0)[:, :, None] & (at_k >= 0)[:, None], bias.dtype)
            valid, at_q, at_k = at_q >= 0, at_q.clamp(min=0), at_k.clamp(min=0)
            for x in range(0, rows, together):
                of = torch.arange(x, min(x + together, rows), device=q.device)
                head, row = of % heads, of // heads
                mask = inside + bias.index_select(0, head)[:, None]
                if self.keep is not None:
                    kept = self.keep[row][:, at_k]  # x n T
                    mask = mask.masked_fill(~kept[:, :, None], -math.inf)
                of = of[:, None, None]
                yield _Task(
                    head,
                    at_q + of * q.shape[2],
                    at_k + of * k.shape[2],
                    valid.expand(len(head), -1, -1),
                    mask,
                )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        o, wide = v.new_zeros(*q.shape[:3], v.shape[3]), torch.promote_types(q.dtype, torch.float32)
        lse = q.new_full(q.shape[:3], -math.inf, dtype=wide)
        for _, at_q, at_k, valid, mask in self._tasks(q, k, bias) if q.numel() else ():
            mine, near, value = _taken(q, at_q), _taken(k, at_k), _taken(v, at_k)
            part, sums = tile_forward(mine, near, value, mask, scale)
            o.view(-1, o.shape[3]).index_copy_(0, at_q[valid], part[valid])
            lse.view(-1).index_copy_(0, at_q[valid], sums[valid])
        return o, lse

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        bias: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grads = [torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in (q, k, v)]
        dbias = torch.zeros_like(bias, dtype=lse.dtype)
        for head, at_q, at_k, _, mask in self._tasks(q, k, bias) if q.numel() else ():
            d, mine, out = (_taken(t, at_q) for t in (do, q, o))
            near, value = _taken(k, at_k), _taken(v, at_k)
            sums = lse.view(-1).index_select(0, at_q.flatten()).view(at_q.shape)
            *parts, dscores = tile_backward(d, mine, near, value, out, sums, mask, scale)
            dbias.index_add_(0, head, dscores.sum(1))
            for grad, at, part in zip(grads, (at_q, at_k, at_k), parts, strict=True):
                grad.view(-1, grad.shape[3]).index_add_(0, at.flatten(), part.flatten(0, 2))
        dq, dk, dv = (g.to(t.dtype) for g, t in zip(grads, (q, k, v), strict=True))
        return dq, dk, dv, dbias.to(bias.dtype)


def _taken(t: Tensor, at: Tensor) -> Tensor:
    """Rows of t (B H L D) by flat index (x n m): x n m D."""
    return t.reshape(-1, t.shape[3]).index_select(0, at.flatten()).view(*at.shape, t.shape[3])
