"""Attentions that know distances, their matrices written out."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import allowed, softmax


@oracle("da-transformer")
def distance_aware(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """softmax(relu(Q Kᵀ) ∘ (1 + e^β) / (1 + e^(β − α |i − j|)) / √D) V"""
    at = torch.arange(q.shape[2])
    far = module.alpha[:, None, None] * (at[:, None] - at).abs()
    if module.beta is not None:
        beta = module.beta[:, None, None]
        far = (1 + beta.exp()) / (1 + (beta - far).exp())
    raw = q @ k.mT
    raw = raw if module.activation is None else raw.clamp(min=0)
    seen = allowed(q.shape[2], k.shape[2], module.causal, keep)
    return softmax(raw * far / q.shape[-1] ** 0.5, seen) @ v


@oracle("music-transformer")
def music(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """softmax((Q Kᵀ + q_i·E[j − i]) / √D) V with every q_i·E[j − i] of its own product."""
    n, heads = q.shape[2], q.shape[1]
    table = module.table.expand(heads, -1, -1)
    far = module.length - 1
    rows = []
    for i in range(n):
        at = (torch.arange(n) - i).clamp(-far, table.shape[1] - 1 - far) + far
        rows.append((q[:, :, i, None] * table[:, at]).sum(-1))
    scores = (q @ k.mT + torch.stack(rows, 2)) / q.shape[-1] ** 0.5
    seen = allowed(n, n, module.causal, keep)
    if module.block is not None:
        seen = seen & block_seen(keep, n, len(q), module.block)[:, None]
    return softmax(scores, seen) @ v


def block_seen(keep: Tensor | None, length: int, batch: int, block: int) -> Tensor:
    """Who is in whose block of kept tokens or the block before, B L L."""
    keep = torch.ones(batch, length, dtype=torch.bool) if keep is None else keep
    own = (keep.cumsum(1) - 1) // block
    apart = own[:, :, None] - own[:, None]
    return (apart == 0) | (apart == 1)
