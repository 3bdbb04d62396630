"""Local and global attention with the union mask."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import allowed, softmax


@oracle("longformer")
def longformer(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    length = q.shape[2]
    i = torch.arange(length)
    step = i[:, None] - i
    kept = torch.ones(q.shape[0], length, dtype=torch.bool) if keep is None else keep
    hubs = kept & (kept.cumsum(1) <= module.hubs)
    outs = []
    for h in range(q.shape[1]):
        window = module.windows[h % len(module.windows)]
        reach = window.before * window.dilation
        near = (step.abs() <= reach) & (step % window.dilation == 0)
        seen = near | hubs[:, None, :] | hubs[:, :, None]
        seen = seen[:, None] & allowed(length, length, module.causal, keep)
        qh, kh, vh = (t[:, h : h + 1] for t in (q, k, v))
        outs.append(softmax(qh @ kh.mT / q.shape[-1] ** 0.5, seen) @ vh)
    return torch.cat(outs, 1)
