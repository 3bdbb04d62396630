"""DeepSpeed's block layouts, row by row, and attention under them."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.block_sparse import alone


def fixed(
    heads: int,
    blocks: int,
    causal: bool,
    *,
    local: int = 4,
    hubs: int = 1,
    patterns: int = 1,
    horizontal: bool = False,
    unbounded: bool = False,
) -> Tensor:
    layout = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    for h in range(heads):
        for i in range(blocks):
            for j in range(blocks):
                layout[h, i, j] = i // local == j // local and not (causal and j > i)
        first, starts = local - (1 + h % patterns) * hubs, []
        for window in range(0, blocks, local):
            start = window + first
            if window + local > blocks and not unbounded:
                start = min(start, blocks - hubs)
            starts.append(start)
        for start in starts:
            group = range(max(start, 0), min(start + hubs, blocks))
            for j in group:
                layout[h, (start if causal else 0) :, j] = True
                if horizontal:
                    layout[h, j] = True
    return layout


@oracle("deepspeed-sparse-attention")
def deepspeed(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    def seen(h: int, length: int) -> Tensor:
        blocks = -(-length // module.block)
        layout = fixed(h + 1, blocks, module.causal, unbounded=module.causal, **module.options)[h]
        expanded = torch.kron(layout.long(), torch.ones(module.block, module.block).long()).bool()
        mask = expanded[:length, :length]
        return mask.tril() if module.causal else mask

    return alone(q, k, v, keep, seen)
