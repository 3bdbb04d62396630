"""Layouts that add a learned bias to their scores, and give its gradient.

As in `dense.union`, any number of them share one softmax: merged by logsumexp forward, each handed
the merged output and logsumexp backward, where scores are recomputed a tile at a time.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engines import pattern
from longspan.engines.dense import additive, merge, tile_forward
from longspan.engines.pattern.banded import Blocks, block_size, cut, padded
from longspan.engines.pattern.listed import Listed
from longspan.engines.pattern.values import Pattern, Window
from longspan.shapes import Keep


def tile_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the mask, unreduced; else as `dense.tile_backward`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    do, q, k, v, o = (t.to(wide) for t in (do, q, k, v, o))
    weights = (q * scale) @ k.mT
    weights.add_(mask).sub_(lse[..., None]).exp_()
    dscores = do @ v.mT
    dscores.sub_((do * o).sum(-1, keepdim=True)).mul_(weights)
    return dscores @ k * scale, dscores.mT @ q * scale, weights.mT @ do, dscores


class Biased(ABC):
    """How a set of queries (B H L D) meets a set of keys under a bias, whose shape is its own."""

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(o: B H L V, logsumexp: B H L), the latter −inf where nothing is seen."""

    @abstractmethod
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
        """(dq, dk, dv, dbias), given the output and logsumexp of all layouts."""


class _Biased(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layouts: tuple[Biased, ...], scale: float, q: Tensor, *given: Tensor
    ) -> Tensor:
        parts = zip(layouts, given[::3], given[1::3], given[2::3], strict=True)
        with torch.autocast(q.device.type, enabled=False):
            o, lse = merge([own.forward(q, k, v, bias, scale) for own, k, v, bias in parts])
        o = o.to(q.dtype)
        ctx.layouts, ctx.scale = layouts, scale
        ctx.save_for_backward(q, o, lse, *given)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        q, o, lse, *given = ctx.saved_tensors
        lse = lse.masked_fill(lse == -math.inf, 0)
        do, dq, grads = do.contiguous(), torch.zeros_like(q), []
        parts = zip(ctx.layouts, given[::3], given[1::3], given[2::3], strict=True)
        with torch.autocast(q.device.type, enabled=False):
            for own, k, v, bias in parts:
                part, *rest = own.backward(do, q, k, v, o, lse, bias, ctx.scale)
                dq, grads = dq + part, grads + rest
        return None, None, dq, *grads


_biased: Any = torch.compiler.disable(_Biased.apply)


def biased(
    q: Tensor,
    parts: Sequence[tuple[Biased, Tensor, Tensor, Tensor]],
    *,
    scale: float | None = None,
) -> Tensor:
    """One softmax over several key sets, each under a bias: B H L V.

    Args:
        parts: (layout, k: B H S D, v: B H S V, bias) each.
        scale: of the scores before the bias, by default D^(−1/2).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    given = [t for _, k, v, bias in parts for t in (k, v, bias.to(q.dtype))]
    return _biased(tuple(layout for layout, *_ in parts), scale, q, *given)


class ByDistance(Biased):
    """A window, as many queries as keys; bias (H, before + 1 + after) by j − i, ascending.

    Args:
        keep: keys that may be seen.
    """

    def __init__(self, window: Window, keep: Keep | None = None) -> None:
        self.window, self.keep = window, keep

    def _blocks(self, bias: Tensor, row: int, length: int) -> tuple[Blocks, Tensor]:
        """The blocks of one row of the batch, and the place in the bias of their pairs."""
        window, size = self.window, block_size(self.window)
        before, after = (-(-min(r, length) // size) * size for r in (window.before, window.after))
        span = torch.arange(before + size + after, device=bias.device) - before
        place = span - torch.arange(size, device=bias.device)[:, None] + window.before
        band = (place >= 0) & (place < bias.shape[1])
        place = place.clamp(0, bias.shape[1] - 1)
        inner = bias[:, place].masked_fill(~band, -math.inf)[:, None]  # H 1 size span

        def mask(first: int, last: int) -> Tensor:
            low, high = first * size - before, last * size + after
            if low >= 0 and high <= length and self.keep is None:
                return inner
            index = torch.arange(low, high, device=bias.device)
            valid = (index >= 0) & (index < length)
            if self.keep is not None:
                valid = valid & self.keep[row, index.clamp(0, length - 1)]
            spans = valid.unfold(0, len(span), size)
            return inner + additive(spans[None, :, None], bias.dtype)

        return Blocks(size, before, after, mask, rows=size), place

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        (batch, _, length), wide = q.shape[:3], torch.promote_types(q.dtype, torch.float32)
        o, lse = v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)
        for b in range(batch if length else 0):
            blocks, _ = self._blocks(bias, b, length)
            one = slice(b, b + 1)
            rows = padded(q[one], 0, blocks.size)
            reach = -blocks.before, rows.shape[1] + blocks.span - blocks.size
            part, sums = blocks.forward(rows, cut(k[one], *reach), cut(v[one], *reach), scale)
            o[b], lse[b] = part[:, :length], sums[:, :length]
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
        dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
        dbias = torch.zeros_like(bias, dtype=lse.dtype)
        length = q.shape[2]
        for b in range(q.shape[0] if length else 0):
            blocks, place = self._blocks(bias, b, length)
            one = slice(b, b + 1)
            wide = [padded(t[one], 0, blocks.size) for t in (do, q, o)]
            sums = padded(lse[one, :, :, None], 0, blocks.size)[..., 0]
            reach = -blocks.before, wide[0].shape[1] + blocks.span - blocks.size
            total = dbias.new_zeros(len(dbias), *place.shape)

            def tile(*given: Any, total: Tensor = total) -> tuple[Tensor, Tensor, Tensor]:
                dq, dk, dv, dscores = tile_backward(*given)
                total += dscores.sum(1)
                return dq, dk, dv

            part, *others = blocks.backward(
                wide[0],
                wide[1],
                cut(k[one], *reach),
                cut(v[one], *reach),
                wide[2],
                sums,
                scale,
                tile,
            )
            dq[b] = part[:, :length]
            for grad, each in zip((dk, dv), others, strict=True):
                grad[b] = each[:, blocks.before : blocks.before + length]
            dbias.index_add_(1, place.flatten(), total.flatten(1))
        return dq, dk, dv, dbias.to(bias.dtype)


class ByRun(Biased):
    """Every query meets every key; bias (H, 2 M − 1) by m − run, ascending, for keys m = 0 … M − 1.

    A run is `size` queries; what is behind the last of `counts` runs belongs to it. Queries are
    taken by their place in the run, so that one bias row serves `size` of them.

    Args:
        counts: runs, and keys that may be seen, of each row of the batch.
    """

    def __init__(self, size: int, counts: Sequence[int]) -> None:
        self.size, self.counts = size, counts

    def _tiles(self, bias: Tensor, runs: int, count: int) -> Iterator[tuple[slice, Tensor]]:
        """(runs, place in the bias of their pairs: runs count) of each tile."""
        keys = torch.arange(count, device=bias.device) + bias.shape[1] // 2
        each = max(1, pattern.WORKSPACE // max(self.size * count * 4, 1))
        for start in range(0, runs, each):
            stop = min(start + each, runs)
            own = torch.arange(start, stop, device=bias.device).clamp(max=count - 1)
            yield slice(start, stop), keys - own[:, None]

    def _by_place(self, t: Tensor) -> Tensor:
        """… L D → … size runs D."""
        behind = -t.shape[-2] % self.size
        return F.pad(t, (0, 0, 0, behind)).unflatten(-2, (-1, self.size)).transpose(-3, -2)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        length, wide = q.shape[2], torch.promote_types(q.dtype, torch.float32)
        rows = self._by_place(q)
        o = v.new_zeros(*rows.shape[:-1], v.shape[3])
        lse = q.new_full(rows.shape[:-1], -math.inf, dtype=wide)
        for b, count in enumerate(self.counts):
            key, value = (t[b, :, None, :count].expand(-1, self.size, -1, -1) for t in (k, v))
            for runs, place in self._tiles(bias, rows.shape[3] if count else 0, count):
                at = b, slice(None), slice(None), runs
                mask = bias.index_select(1, place.flatten()).view(-1, 1, *place.shape)
                o[at], lse[at] = tile_forward(rows[at], key, value, mask, scale)
        o = o.transpose(2, 3).flatten(2, 3)[:, :, :length]
        return o, lse.transpose(2, 3).flatten(2)[:, :, :length]

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
        given = [self._by_place(t) for t in (do, q, o, lse[..., None])]
        dq = torch.zeros_like(given[1])
        dk, dv = torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
        dbias = torch.zeros_like(bias, dtype=lse.dtype)
        for b, count in enumerate(self.counts):
            for runs, place in self._tiles(bias, dq.shape[3] if count else 0, count):
                for h in range(q.shape[1]):
                    do_, q_, o_, lse_ = (t[b, h, :, runs].flatten(0, 1) for t in given)
                    mask = bias[h][place].repeat(self.size, 1)
                    part, dk_, dv_, dscores = tile_backward(
                        do_, q_, k[b, h, :count], v[b, h, :count], o_, lse_[:, 0], mask, scale
                    )
                    dq[b, h, :, runs] = part.view(self.size, -1, q.shape[3])
                    dk[b, h, :count] += dk_
                    dv[b, h, :count] += dv_
                    each = dscores.unflatten(0, (self.size, -1)).sum(0)
                    dbias[h].index_add_(0, place.flatten(), each.flatten())
        dq = dq.transpose(2, 3).flatten(2, 3)[:, :, : q.shape[2]]
        return dq, dk.to(k.dtype), dv.to(v.dtype), dbias.to(bias.dtype)


class ByPair(Biased):
    """Any pattern, by listed blocks; bias (B|1, H|1, L|1, S), which may be −inf.

    Args:
        rows, cols: queries and keys of one block.
    """

    def __init__(self, shape: Pattern, rows: int = 64, cols: int = 64) -> None:
        self.listed = Listed(shape, rows, cols)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        return self.listed.forward(q, k, v, scale, _Pairs(self.listed, bias, q).added)

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
        pairs = _Pairs(self.listed, bias, q)
        grads = self.listed.backward(do, q, k, v, o, lse, scale, pairs.added, pairs.tile)
        return *grads, pairs.gradient()


class _Pairs:
    """A bias cut into the blocks of a `Listed`, and the sum of its gradient."""

    def __init__(self, listed: Listed, bias: Tensor, q: Tensor) -> None:
        self.like, self.heads = bias, q.shape[1]
        batch, heads, queries, keys = bias.shape
        self.size, self.cols = listed.rows, listed.cols
        self.rows = self.size if queries > 1 else 1  # or one for all queries
        self.front = (keys - q.shape[2]) % listed.rows if queries > 1 else 0
        behind = -(self.front + queries) % self.rows, -keys % self.cols
        padded = F.pad(bias.flatten(0, 1), (0, behind[1], self.front, behind[0]))
        grid = padded.unflatten(2, (-1, self.cols)).unflatten(1, (-1, self.rows))
        self.shape = grid.shape  # X rows size cols size
        self.blocks = grid.transpose(2, 3).reshape(-1, self.rows * self.cols)
        self.total = torch.zeros_like(
            self.blocks, dtype=torch.promote_types(bias.dtype, torch.float32)
        )
        x = torch.arange(q.shape[0])[:, None] % batch * heads + torch.arange(self.heads) % heads
        self.x = x.flatten().to(bias.device)

    def added(self, x: slice, at: Tensor, table: Tensor | None, mask: Tensor | None) -> Tensor:
        """The mask of a chunk with the bias of its pairs."""
        keys, device = self.like.shape[3], self.like.device
        if whole := table is None:
            table = torch.arange(self.shape[3]).expand(len(at), -1)
        row = at.to(device) if self.rows > 1 else torch.zeros_like(at, device=device)
        row = self.x[x, None] * self.shape[1] + row
        self.place = row[..., None] * self.shape[3] + table.to(device)  # x n m
        found = self.blocks.index_select(0, self.place.flatten())
        found = found.view(*self.place.shape, self.rows, self.cols).transpose(2, 3).flatten(3)
        if whole:  # the rows of all blocks are beneath each other, as their queries are
            found = found[..., :keys].expand(-1, -1, self.size, -1).flatten(1, 2)[:, None]
        return found if mask is None else found + mask

    def tile(self, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """`tile_backward`, its last gradient added to the bias's."""
        dq, dk, dv, dscores = tile_backward(*given)
        dscores = dscores.reshape(*self.place.shape[:2], self.size, -1)
        if self.rows == 1:
            dscores = dscores.sum(2, keepdim=True)
        dscores = F.pad(dscores, (0, -dscores.shape[3] % self.cols))
        each = dscores.unflatten(3, (-1, self.cols)).transpose(2, 3)
        self.total.index_add_(0, self.place.flatten(), each.reshape(-1, self.rows * self.cols))
        return dq, dk, dv

    def gradient(self) -> Tensor:
        count, rows, size, cols, width = self.shape
        grid = self.total.view(count, rows, cols, size, width).transpose(2, 3)
        whole = grid.reshape(count, rows * size, cols * width)
        inside = whole[:, self.front : self.front + self.like.shape[2], : self.like.shape[3]]
        return inside.reshape(self.like.shape).to(self.like.dtype)
