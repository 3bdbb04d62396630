"""Attention through latents, its matrices written out."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle


def mab(module, x: Tensor, y: Tensor) -> Tensor:
    """LN(H + rFF(H)), H = LN(X + MHA(X, Y, Y)) for one set, head by head."""
    attention, heads = module.attention, module.attention.heads
    q, k, v = attention.q(x), attention.k(y), attention.v(y)
    width = q.shape[-1] // heads if module.paper else q.shape[-1]
    parts = zip(*(t.chunk(heads, -1) for t in (q, k, v)), strict=True)
    o = torch.cat([(a @ b.mT / width**0.5).softmax(-1) @ c for a, b, c in parts], -1)
    h = module.norms[0](x + o @ attention.output.weight.mT + attention.output.bias
                        if module.paper else q + o)  # fmt: skip
    return module.norms[1](h + (h @ module.feed.weight.mT + module.feed.bias).relu())


@oracle("set-transformer")
def set_transformer(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    """MAB(X, MAB(I, X)) of each row's own tokens, and 0 for the others."""
    outs = []
    for b, row in enumerate(x):
        at = torch.arange(len(row)) if keep is None else keep[b].nonzero()[:, 0]
        own = row[at]
        middle = own if module.points is None else mab(module.inner, module.points, own)
        outs.append(torch.zeros_like(row).index_copy(0, at, mab(module.outer, own, middle)))
    return torch.stack(outs) if outs else x
