"""Fixed block-sparse and factorised patterns, the boolean matrix written out."""

from collections.abc import Callable

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import softmax

Seen = Callable[[int, int], Tensor]


def alone(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, seen: Seen) -> Tensor:
    """Each row's kept tokens, as if alone; `seen` (head, tokens) → L L."""
    outs = []
    for b in range(q.shape[0]):
        kept = torch.ones(k.shape[2], dtype=torch.bool) if keep is None else keep[b]
        at = kept.nonzero()[:, 0]
        mask = torch.stack([seen(h, len(at)) for h in range(q.shape[1])])
        scores = q[b][:, at] @ k[b][:, at].mT / q.shape[-1] ** 0.5
        outs.append(v.new_zeros(v[b].shape).index_copy(1, at, softmax(scores, mask) @ v[b][:, at]))
    return torch.stack(outs) if outs else torch.zeros_like(v)


@oracle("bigbird")
def bigbird(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    b, w, r = module.block[0], module.near, module.random.count

    def seen(h: int, length: int) -> Tensor:
        if length <= (5 + 2 * r) * b and not module.causal:
            return torch.ones(length, length, dtype=torch.bool)
        blocks = -(-length // b)
        adjacency = torch.zeros(blocks, blocks, dtype=torch.bool)
        plan = module.random.head(h).draw(torch.arange(blocks), blocks)
        for i in range(blocks):
            hubs = {g % blocks for g in module.hubs if -blocks <= g < blocks}
            for j in range(blocks):
                wide = i in hubs and not module.causal
                adjacency[i, j] = abs(i - j) <= w // 2 or j in hubs or wide
            for j in plan[i].tolist():
                if j >= 0:
                    adjacency[i, j] = True
        dense = adjacency.repeat_interleave(b, 0).repeat_interleave(b, 1)[:length, :length]
        return dense.tril() if module.causal else dense

    return alone(q, k, v, keep, seen)


@oracle("sparse-transformer")
def sparse_transformer(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    stride, c = module.stride, module.summary

    def seen(h: int, length: int) -> Tensor:
        i, j = torch.arange(length)[:, None], torch.arange(length)
        r = h % module.stripes
        if module.form == "strided":
            sets = (i - j).abs() <= module.window, (i - j) % stride == 0
        else:
            low = stride - c * (r + 1)
            column = (j % stride >= low) & (j % stride < low + c)
            sets = i // stride == j // stride, column.expand(length, length)
        if module.use == "merged":
            mask = sets[0] | sets[1]
        else:
            mask = sets[(h if module.use == "heads" else module.layer) % 2]
        return mask.tril() if module.causal else mask

    return alone(q, k, v, keep, seen)
