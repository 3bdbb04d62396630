"""Learned spans, with the mask m written out."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from longspan.testing.oracles import oracle


def spanned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    p: Tensor | None,
    keep: Tensor | None,
    *,
    R: float,
    S: int,
    first: int,
) -> Tensor:
    """One row and one head at a time; z is B H L; hidden tokens are left out, the rest close up."""
    o = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        kept = range(q.shape[2]) if keep is None else keep[b].nonzero()[:, 0].tolist()
        at = torch.tensor(list(kept), dtype=torch.long)
        t = torch.arange(len(at))
        x = t[:, None] - t
        inside = (x >= first) & (x < first + S)
        for h in range(q.shape[1]):
            s = q[b, h, at] @ k[b, h, at].mT
            if p is not None:
                s = s + (q[b, h, at] @ p.mT).gather(1, (x - first).clamp(0, S - 1))
            s = s / q.shape[3] ** 0.5
            m = ((R + z[b, h, at, None] - x) / R).clamp(0, 1) * inside
            top = s.masked_fill(m == 0, -1e30).amax(-1, keepdim=True).detach()
            a = m * (s - top).masked_fill(m == 0, 0).exp()
            whole = a.sum(-1, keepdim=True)
            a = a / whole.masked_fill(whole == 0, 1)
            o[b, h] = o[b, h].index_copy(0, at, a @ v[b, h, at])
    return o


@oracle("adaptive-attention-span")
def adaptive(module: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    z = (module.span * module.ratio.clamp(0, 1))[None, :, None].expand(*q.shape[:3])
    kw = {"R": module.ramp, "S": module.span, "first": module.near}
    return spanned(q, k, v, z, module.table, keep, **kw)


@oracle("dynamic-attention-span")
def dynamic(module: Any, x: Tensor, keep: Tensor | None) -> Tensor:
    if keep is not None:
        x = x.masked_fill(~keep[..., None], 0)
    q, k, v = (
        rearrange(module.project[name](x), "B L (H D) -> B H L D", H=module.heads) for name in "qkv"
    )
    own = module.attention
    z = own.span * rearrange(module.project["query_span"](x).sigmoid(), "B L H -> B H L")
    o = spanned(q, k, v, z, own.table, keep, R=own.ramp, S=own.span, first=own.near)
    y = module.output(rearrange(o, "B H L V -> B L (H V)"))
    return y if keep is None else y.masked_fill(~keep[..., None], 0)
