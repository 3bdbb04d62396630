"""Softmax attention, its matrix written out."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle


def softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the keys that are seen; a row without any is 0."""
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True).nan_to_num(neginf=0)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


def allowed(queries: int, keys: int, causal: bool, keep: Tensor | None) -> Tensor:
    """Who may see whom, (B|1) 1 L S."""
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        seen = seen.tril(keys - queries)
    return seen[None, None] if keep is None else seen & keep[:, None, None]


@oracle("multi-head-attention")
def attention(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    seen = allowed(q.shape[2], k.shape[2], module.causal, keep)
    return softmax(q @ k.mT / q.shape[-1] ** 0.5, seen) @ v
