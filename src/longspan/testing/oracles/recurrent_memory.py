"""Attention with a memory, its four terms written out."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import softmax


@oracle("transformer-xl")
def transformer_xl(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    """One segment without memory: A_ij = (q_i + u)·k_j + (q_i + v)·r_{i−j}, j ≤ i."""
    mixer = module.mixer
    position, heads, width = mixer.position, mixer.heads, mixer.head_width
    kept = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    x = x.masked_fill(~kept[..., None], 0)
    length, full = x.shape[1], position.width
    q, k, v = (mixer.project[n](x).unflatten(-1, (heads, width)) for n in ("q", "k", "v"))
    rate = 10000 ** (-torch.arange(0, full, 2, dtype=torch.float64) / full)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    angle = distance[..., None] * rate
    sinusoid = torch.cat([angle.sin(), angle.cos()], -1).to(x.dtype)
    r = position.project(sinusoid).unflatten(-1, (heads, width))  # L L H D
    rows = []
    for i in range(length):
        query = q[:, i : i + 1]
        scores = ((query + position.u) * k + (query + position.v) * r[i]).sum(-1) / width**0.5
        seen = (torch.arange(length) <= i) & kept
        weights = softmax(scores.mT, seen[:, None])
        rows.append(torch.einsum("bhj,bjhd->bhd", weights, v).flatten(1))
    return mixer.output(torch.stack(rows, 1)).masked_fill(~kept[..., None], 0)
