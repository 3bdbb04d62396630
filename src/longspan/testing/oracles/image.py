"""Image Transformer's local attention, its blocks written out."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.block_sparse import alone


def flat(length: int, query: int, memory: int, causal: bool) -> Tensor:
    """1D: the same block, or one of the l_m places before it (or after it)."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    start = i // query * query
    if causal:
        return (j >= start - memory) & (j <= i)
    return (j >= start - memory) & (j < start + query + memory)


def order(rows: int, columns: int, block: tuple[int, int]) -> list[tuple[int, int]]:
    """Cells in blocked raster order."""
    h, w = block
    cells = [(i, j) for i in range(rows) for j in range(columns)]
    return sorted(cells, key=lambda c: (c[0] // h, c[1] // w, c[0] % h, c[1] % w))


def boxes(
    length: int, columns: int, query: tuple[int, int], memory: tuple[int, int], causal: bool
) -> Tensor:
    """2D: cells of the memory rectangle, causally those no later in the order."""
    (h, w), (high, wide) = query, memory
    rows = -(-length // (h * columns)) * h
    cells = order(rows, columns, query)[:length]
    seen = torch.zeros(length, length, dtype=torch.bool)
    for a, (i, j) in enumerate(cells):
        top, left = i // h * h, j // w * w
        for b, (r, c) in enumerate(cells):
            inside = top - high <= r and left - wide <= c < left + w + wide
            below = r < top + h + (0 if causal else high)
            seen[a, b] = inside and below and (b <= a or not causal)
    return seen


@oracle("image-transformer")
def image_transformer(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    def seen(_: int, length: int) -> Tensor:
        if module.columns is None:
            return flat(length, module.block[0], module.memory[0], module.causal)
        return boxes(length, module.columns, module.block, module.memory, module.causal)

    return alone(q, k, v, keep, seen)
