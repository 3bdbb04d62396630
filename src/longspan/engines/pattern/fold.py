"""Axis folding: the sequence laid out as a grid, attended along one axis."""

from collections.abc import Iterator

import torch
from torch import Tensor

from longspan.engines import pattern
from longspan.engines.dense import Layout


class Fold(Layout):
    """Rows of `size` tokens beneath each other; `inner` runs along rows, or across them.

    Across, tokens meet those whose position is theirs modulo `size`; along, those of their own
    row. As many queries as keys. Both are strided views; a short last row is a view of its own.
    """

    def __init__(self, inner: Layout, size: int, *, across: bool) -> None:
        self.inner, self.size, self.across = inner, size, across

    def _pieces(self, length: int) -> Iterator[tuple[int, tuple[int, int], tuple[int, int]]]:
        """(first token, sizes, steps between tokens) of each grid without gaps, lines × tokens."""
        size = min(self.size, length)
        rows, rest = divmod(length, size)
        if self.across:
            if rest:
                yield 0, (rest, rows + 1), (1, size)
            yield rest, (size - rest, rows), (1, size)
        else:
            yield 0, (rows, size), (size, 1)
            if rest:
                yield rows * size, (1, rest), (rest, 1)

    def _views(self, tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
        """The grids of all tensors (X, T, D), some of X at a time: (x, lines, tokens, D) each."""
        count, length = tensors[0].shape[:2]
        if not count or not length:
            return
        bytes_each = max(t[0].numel() * t.element_size() for t in tensors)
        together = max(1, 4 * pattern.WORKSPACE // max(bytes_each, 1))
        for start in range(0, count, together):
            for first, shape, steps in self._pieces(length):
                yield tuple(
                    part.as_strided(
                        (part.shape[0], *shape, part.shape[2]),
                        (part.stride(0), *(s * part.shape[2] for s in steps), 1),
                        part.storage_offset() + first * part.shape[2],
                    )
                    for part in (t[start : start + together] for t in tensors)
                )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        o, lse = v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(*q.shape[:3], 1, dtype=wide)
        flat = tuple(t.flatten(0, 1).contiguous() for t in (q, k, v))
        for query, key, value, out, sums in self._views(
            (*flat, o.flatten(0, 1), lse.flatten(0, 1))
        ):
            part, part_sums = self.inner.forward(query, key, value, scale)
            out.copy_(part)
            sums.copy_(part_sums[..., None])
        return o, lse[..., 0]

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        given = tuple(t.flatten(0, 1).contiguous() for t in (do, q, k, v, o, lse[..., None]))
        flat = tuple(t.flatten(0, 1) for t in grads)
        for view in self._views((*given, *flat)):
            do_, q_, k_, v_, o_, lse_ = view[:6]
            parts = self.inner.backward(do_, q_, k_, v_, o_, lse_[..., 0], scale)
            for target, part in zip(view[6:], parts, strict=True):
                target.copy_(part)
        return grads[0], grads[1], grads[2]
