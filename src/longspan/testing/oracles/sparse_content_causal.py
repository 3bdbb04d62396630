"""Strictly causal ProbSparse attention, one query after another."""

import math

import torch
from torch import Tensor

from longspan.testing.oracles import oracle


@oracle("informer-causal")
def lazy_so_far(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    kept = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    wide = torch.promote_types(q.dtype, torch.float32)
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:2])).tolist():
        tokens = kept[b].nonzero()[:, 0]
        x, y, z = q[b, h, tokens], k[b, h, tokens], v[b, h, tokens]
        most = module.factor * max(1, math.ceil(math.log(max(len(x), 1))))
        draws = torch.rand(
            min(most, len(x)), 1024, generator=torch.Generator().manual_seed(module.seed)
        )
        measures, awake = [], torch.zeros(len(x), dtype=torch.bool)
        for n in range(1, len(x) + 1):
            logs = max(1, math.ceil(math.log(n)))
            budget = min(n, module.factor * logs)
            scores = y[:n].detach().to(wide) @ x[n - 1].detach().to(wide)
            drawn = scores[(draws[:budget, (n - 1) % 1024].double() * n).long()]
            measures.append(float(drawn.amax() - drawn.sum() / n))
            ahead = sum(m >= measures[-1] for m in measures[:-1])
            awake[n - 1] = ahead < budget and int(awake.sum()) < 2 * budget * logs
        past = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        full = (x @ y.mT / x.shape[-1] ** 0.5).masked_fill(~past, -torch.inf)
        idle = z.to(wide).cumsum(0)
        if module.mean:
            idle = idle / torch.arange(1, len(x) + 1)[:, None]
        out[b, h, tokens] = torch.where(awake[:, None], full.softmax(-1) @ z, idle.to(z.dtype))
    return out
