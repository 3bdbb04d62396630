"""Kernel attention, its weights written out."""

import torch.nn.functional as F
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import allowed


@oracle("linear-transformer")
def linear(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    weights = weights * allowed(q.shape[2], k.shape[2], module.causal, keep)
    return weights @ v / (weights.sum(-1, keepdim=True) + module.eps)
