"""SRU++ token by token."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import softmax


@oracle("sru-plus-plus")
def sru_plus_plus(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    kept = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    x = x.masked_fill(~kept[..., None], 0)
    length, heads = x.shape[1], module.heads
    big_q = module.q(x)
    q, k, v = (
        t.unflatten(2, (heads, -1)).transpose(1, 2)
        for t in (big_q, module.k(big_q), module.v(big_q))
    )
    seen = kept[:, None, None].expand(-1, -1, length, -1)
    if module.causal:
        seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
    a = softmax(q @ k.mT / q.shape[3] ** 0.5, seen) @ v
    u = module.output(module.inner_norm(big_q + module.alpha * a.transpose(1, 2).flatten(2)))
    if module.causal:
        return run(module.recurrences[0], (*u.chunk(3, 2), x), kept)
    first, second = (part.chunk(4, 2) for part in u.chunk(2, 2))
    back = run(module.recurrences[1], [t.flip(1) for t in second], kept.flip(1)).flip(1)
    return torch.cat([run(module.recurrences[0], first, kept), back], 2)


def run(cell, parts, kept: Tensor) -> Tensor:
    candidate, forget, reset, passed = parts
    c, out = torch.zeros_like(candidate[:, 0]), []
    for t in range(candidate.shape[1]):
        f = torch.sigmoid(forget[:, t] + cell.forget_weight * c + cell.forget_bias)
        r = torch.sigmoid(reset[:, t] + cell.reset_weight * c + cell.reset_bias)
        here = kept[:, t, None]
        c = torch.where(here, f * c + (1 - f) * candidate[:, t], c)
        out.append((r * c + (1 - r) * passed[:, t]).masked_fill(~here, 0))
    return torch.stack(out, 1)
