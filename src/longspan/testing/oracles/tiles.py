"""Exact attention by tiles: the same matrix, divided last or under a mask of blocks."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.block_sparse import alone
from longspan.testing.oracles.dense import allowed, softmax


@oracle("rabe-staats")
def lazily_normalised(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """v* = Σ_j v_j e^{s_j − m*} and s* = Σ_j e^{s_j − m*}, then v* / s*."""
    seen = allowed(q.shape[2], k.shape[2], module.causal, keep)
    s = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    m = s.detach().amax(-1, keepdim=True).nan_to_num(neginf=0)
    e = (s - m).exp()
    total = e.sum(-1, keepdim=True)
    return e @ v / total.masked_fill(total == 0, 1)


@oracle("flashattention")
def block_sparse(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """Softmax under the block mask, expanded to tokens: those of each row, counted alone."""
    if not module.sparse:
        seen = allowed(q.shape[2], k.shape[2], module.causal, keep)
        return softmax(q @ k.mT / q.shape[-1] ** 0.5, seen) @ v
    return alone(q, k, v, keep, lambda h, length: module.sees.head(h).mask(length, length))
