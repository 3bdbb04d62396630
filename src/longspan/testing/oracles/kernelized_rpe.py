"""Kernelized attention under relative biases: the L × S matrix of e^b φ(q)·φ(k), row-normalised."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle


@oracle("kernelized-attention-rpe")
def kernelized_attention_rpe(
    module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None
) -> Tensor:
    """z_i = Σ_j e^{b_{j−i}} φ(q_i) φ(k_j)ᵀ v_j / Σ_j e^{b_{j−i}} φ(q_i) φ(k_j)ᵀ (1-d)."""
    if keep is not None:
        k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))

    def phi(x: Tensor) -> Tensor:
        x = (
            x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            if module.normalise
            else (x * x.shape[-1] ** -0.25)
        )
        if module.features == "elu":
            return torch.where(x > 0, x, x.exp() - 1) + 1
        if module.features == "relu":
            return x.clamp(min=0)
        w = module.rows.rows[0].to(x.dtype)
        half = x.square().sum(-1, keepdim=True) / 2
        if module.features == "prf":
            return (x @ w.mT - half).exp() * len(w) ** -0.5
        angles = x @ w.mT
        return torch.cat([angles.cos(), angles.sin()], -1) * half.exp() * len(w) ** -0.5

    queries, keys = q.shape[2], k.shape[2]
    i = torch.arange(queries)[:, None] + (keys - queries if module.causal else 0)
    distance = torch.arange(keys) - i
    weights = phi(q) @ phi(k).mT
    if module.bias is not None:
        middle = module.bias.shape[1] // 2
        weights = weights * module.bias[:, middle + distance].exp()
    if module.causal:
        weights = weights.masked_fill(distance > 0, 0)
    if keep is not None:
        weights = weights.masked_fill(~keep[:, None, None], 0)
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1) @ v
