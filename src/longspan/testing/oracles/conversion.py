"""What a pretrained model is converted into, its weights written out."""

import torch.nn.functional as F
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import allowed


@oracle("t2r")
def t2r(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    def phi(x: Tensor, affine) -> Tensor:
        return F.relu(x @ affine.weight.mT + affine.bias[:, None])

    weights = phi(q, module.map) @ phi(k, module.key_map or module.map).mT
    weights = weights * allowed(q.shape[2], k.shape[2], module.causal, keep)
    return weights @ v / (weights.sum(-1, keepdim=True) + module.eps)
