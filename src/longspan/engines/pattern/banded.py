"""Bands: blocks of queries against overlapping strided views of keys, copied nowhere."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engines import pattern
from longspan.engines.dense import Layout, additive, tile_backward, tile_forward
from longspan.engines.pattern.values import Window
from longspan.errors import LongspanError
from longspan.shapes import Keep


class Blocks:
    """Blocks of `size` queries against the keys from `before` ahead of them to `after` behind.

    Works on rows side by side: q (X, T, D) with T a multiple of `size`, and k, v that start
    `before` keys ahead of the first query and end `after` keys past the last; `before` and
    `after` are multiples of `size`. Keys are read as overlapping strided views, so nothing is
    copied; `mask(first, last)` gives the additive mask of a range of blocks, broadcast to
    (X, last − first, size, before + size + after), or None where all is seen.

    Args:
        rows: of scores that the caller's tiles write out, where they do.
    """

    def __init__(
        self,
        size: int,
        before: int,
        after: int,
        mask: Callable[[int, int], Tensor | None],
        *,
        rows: int = 0,
    ) -> None:
        self.size, self.before, self.span, self.mask = size, before, before + size + after, mask
        self.rows = rows

    def _views(self, t: Tensor, first: int, last: int, size: int) -> Tensor:
        rows, _, width = t.shape
        return t.as_strided(
            (rows, last - first, size, width),
            (t.stride(0), self.size * width, width, 1),
            t.storage_offset() + first * self.size * width,
        )

    def _ranges(self, q: Tensor, width: int) -> Iterator[tuple[int, int]]:
        count = q.shape[1] // self.size
        each = q.shape[0] * self.span * max(width, self.rows) * q.element_size()
        each = max(1, pattern.CACHED // each)
        for first in range(0, count, each):
            yield first, min(first + each, count)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        o = v.new_empty(*q.shape[:2], v.shape[2])
        lse = v.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for first, last in self._ranges(q, k.shape[2]):
            part, sums = tile_forward(
                self._views(q, first, last, self.size),
                self._views(k, first, last, self.span),
                self._views(v, first, last, self.span),
                self.mask(first, last),
                scale,
            )
            rows = slice(first * self.size, last * self.size)
            o[:, rows], lse[:, rows] = part.flatten(1, 2), sums.flatten(1, 2)
        return o, lse

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        scale: float,
        tile: Callable[..., tuple[Tensor, Tensor, Tensor]] = tile_backward,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv), each range of blocks by `tile`."""
        grads = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for blocks in self._ranges(q, k.shape[2]):
            self._range_backward(blocks, grads, (do, q, k, v, o, lse), scale, tile)
        return grads

    def _range_backward(
        self,
        blocks: tuple[int, int],
        grads: tuple[Tensor, Tensor, Tensor],
        inputs: tuple[Tensor, ...],
        scale: float,
        tile: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ) -> None:
        """Put a range's gradients into `grads`; what it needs is freed before the next."""
        (first, last), (do, q, k, v, o, lse) = blocks, inputs
        rows = slice(first * self.size, last * self.size)
        part, *key_parts = tile(
            self._views(do, first, last, self.size),
            self._views(q, first, last, self.size),
            self._views(k, first, last, self.span),
            self._views(v, first, last, self.span),
            self._views(o, first, last, self.size),
            lse[:, rows].unflatten(1, (-1, self.size)),
            self.mask(first, last),
            scale,
        )
        grads[0][:, rows] = part.flatten(1, 2)
        for grad, each in zip(grads[1:], key_parts, strict=True):
            for strip in range(0, self.span, self.size):
                start = first * self.size + strip
                block = grad[:, start : start + rows.stop - rows.start]
                block.unflatten(1, (-1, self.size)).add_(each[:, :, strip : strip + self.size])


class Banded(Layout):
    """Each head sees its own window; heads that share one are worked on together.

    Args:
        windows: one for all heads, or one a head.
        keep: keys that may be seen.
    """

    def __init__(self, windows: Sequence[Window], keep: Keep | None = None) -> None:
        self.windows, self.keep = tuple(windows), keep

    def _tasks(self, q: Tensor, k: Tensor) -> Iterator[tuple[Window, tuple, tuple, int]]:
        """(window, index of the query rows, of the key rows, batch row of the mask)."""
        windows = self.windows * q.shape[1] if len(self.windows) == 1 else self.windows
        if len(windows) != q.shape[1]:
            raise LongspanError(
                f"{len(windows)} windows were given for {q.shape[1]} heads: give 1 or one a head."
            )
        offset = k.shape[2] - q.shape[2]
        for window in dict.fromkeys(windows):
            heads = [h for h, w in enumerate(windows) if w == window]
            size = q.shape[2] * q.shape[3] * q.element_size() // window.dilation
            together = max(1, pattern.WORKSPACE // max(size, 1))
            for start in range(0, len(heads), together):
                some = heads[start : start + together]
                if some == list(range(some[0], some[-1] + 1)):
                    some = slice(some[0], some[-1] + 1)
                rows = max(1, together // len(heads)) if self.keep is None else 1
                for b in range(0, q.shape[0], rows):
                    batch = slice(b, b + rows)
                    for residue in range(window.dilation):
                        # Queries whose key index leaves this residue meet only keys of it.
                        first = (residue - offset) % window.dilation
                        strided = slice(first, None, window.dilation)
                        at_keys = slice(residue, None, window.dilation)
                        yield window, (batch, some, strided), (batch, some, at_keys), b

    def _blocks(
        self, window: Window, at_k: tuple, batch: int, queries: int, keys: int, q: Tensor
    ) -> tuple[Blocks, int]:
        """The blocks of one task, and the index of the first key that block 0 looks at.

        Queries are right-aligned with the keys of their residue: offset is in steps of it.
        """
        size = block_size(window)
        before, after = (
            -(-min(reach, keys + queries) // size) * size for reach in (window.before, window.after)
        )
        offset = keys - queries
        steps = torch.arange(size, device=q.device)[:, None] + before
        steps = steps - torch.arange(before + size + after, device=q.device)
        band = (steps <= window.before) & (steps >= -window.after)
        inner = additive(band, q.dtype)[None, None]
        keep = None if self.keep is None else self.keep[batch, at_k[2]]

        def mask(first: int, last: int) -> Tensor:
            low = offset - before + first * size
            high = offset + after + last * size
            if low >= 0 and high <= keys and keep is None:
                return inner
            index = torch.arange(low, high, device=q.device)
            valid = (index >= 0) & (index < keys)
            if keep is not None and keys:
                valid = valid & keep[index.clamp(0, keys - 1)]
            spans = valid.unfold(0, before + size + after, size)  # n K
            return additive(spans[:, None] & band, q.dtype)[None]

        return Blocks(size, before, after, mask), offset - before

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        o = v.new_empty(*q.shape[:3], v.shape[3])
        lse = v.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for window, at_q, at_k, batch in self._tasks(q, k):
            queries, keys = q[at_q], k[at_k]
            length = queries.shape[2]
            if queries.numel() == 0 or keys.shape[2] == 0:
                o[at_q], lse[at_q] = 0, -torch.inf
                continue
            blocks, low = self._blocks(window, at_k, batch, length, keys.shape[2], q)
            rows = padded(queries, 0, blocks.size)
            reach = low, rows.shape[1] + blocks.span - blocks.size
            part, sums = blocks.forward(rows, cut(keys, *reach), cut(v[at_k], *reach), scale)
            shape = queries.shape[:2]
            o[at_q] = part[:, :length].unflatten(0, shape)
            lse[at_q] = sums[:, :length].unflatten(0, shape)
        return o, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for window, at_q, at_k, batch in self._tasks(q, k):
            queries, keys = q[at_q], k[at_k]
            length, count = queries.shape[2], keys.shape[2]
            if queries.numel() == 0 or count == 0:
                continue
            blocks, low = self._blocks(window, at_k, batch, length, count, q)
            wide = [padded(t[at_q], 0, blocks.size) for t in (do, q, o)]
            sums = padded(lse[at_q][..., None], 0, blocks.size)[..., 0]
            reach = low, wide[0].shape[1] + blocks.span - blocks.size
            part, *key_parts = blocks.backward(
                wide[0],
                wide[1],
                cut(keys, *reach),
                cut(v[at_k], *reach),
                wide[2],
                sums,
                scale,
            )
            dq[at_q] = part[:, :length].unflatten(0, queries.shape[:2])
            start, stop = max(low, 0), min(low + reach[1], count)
            inside = (*at_k[:2], slice(None))
            for grad, each in zip((dk, dv), key_parts, strict=True):
                target = grad[inside][:, :, at_k[2]][:, :, start:stop]
                each = each[:, start - low : stop - low].unflatten(0, queries.shape[:2])
                if isinstance(at_k[1], slice):
                    target += each
                else:  # a list of heads copies: write back
                    full = torch.zeros_like(grad[at_k])
                    full[:, :, start:stop] = each.to(full.dtype)
                    grad[at_k] += full
        return dq, dk, dv


def block_size(window: Window) -> int:
    """Queries a block: short against the reach, or the corners outside the band cost too much."""
    reach = max(window.before, window.after, 2)
    return min(64, max(16, 1 << ((reach - 1).bit_length() - 1)))


def padded(t: Tensor, low: int, size: int) -> Tensor:
    """Rows flattened, with zeros to a multiple of `size`."""
    length = t.shape[2]
    return cut(t, low, -(-length // size) * size)


def cut(t: Tensor, low: int, length: int) -> Tensor:
    """t[…, low : low + length, :] with zeros outside, rows flattened: X length D, contiguous."""
    start, stop = max(low, 0), min(low + length, t.shape[2])
    inside = t[:, :, start:stop]
    if stop - start < length:
        inside = F.pad(inside, (0, 0, start - low, low + length - stop))
    return inside.flatten(0, 1).contiguous()
