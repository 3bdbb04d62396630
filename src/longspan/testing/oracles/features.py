"""Attention by random and designed features, its weights or its recurrence written out."""

import math

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import allowed, softmax


def held(weights: Tensor, v: Tensor, eps: float) -> Tensor:
    """A V / Σ A, the row sums held at least eps from 0."""
    total = weights.sum(-1, keepdim=True)
    floor = torch.where(total < 0, -eps, eps).to(total)
    return weights @ v / torch.where(total.abs() < eps, floor, total)


@oracle("performer")
def performer(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """log φ(q)·φ(k) by logsumexp, so that no unit is chosen; positive features."""
    x, y = (t * t.shape[-1] ** -0.25 for t in (q, k))
    w = module.directions.rows
    a, b = (t @ w.mT - t.square().sum(-1, keepdim=True) / 2 for t in (x, y))
    scores = (a[..., :, None, :] + b[..., None, :, :]).logsumexp(-1) - math.log(w.shape[-2])
    return softmax(scores, allowed(q.shape[2], k.shape[2], module.causal, keep)) @ v


@oracle("performer-favor")
def favor(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """cos(w·(x − y)) summed over w, times h(k) in units of the largest that may be seen."""
    x, y = (t * t.shape[-1] ** -0.25 for t in (q, k))
    a, b = (t @ module.directions.rows.mT for t in (x, y))
    gaussian = (a[..., :, None, :] - b[..., None, :, :]).cos().mean(-1)
    seen = allowed(q.shape[2], k.shape[2], module.causal, keep)
    half = (y.square().sum(-1) / 2)[..., None, :].masked_fill(~seen, -torch.inf)
    top = half.detach().amax(-1, keepdim=True).nan_to_num(neginf=0)
    return held(gaussian * (half - top).exp(), v, module.eps)


@oracle("cosformer")
def cosformer(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    j = torch.arange(keys)[None] if keep is None else keep.cumsum(1) - 1
    i = j[:, -queries:] if module.causal or queries == keys else torch.arange(queries)[None]
    cosine = ((i[:, :, None] - j[:, None]).double() * (math.pi / 2 / module.length)).cos()
    weights = q.relu() @ k.relu().mT * cosine[:, None].to(q)
    weights = weights * allowed(queries, keys, module.causal, keep)
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=module.eps)


@oracle("rfa")
def rfa(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    w = module.sigma[:, None] * module.pool[0] / module.temperature
    a, b = (t / t.norm(dim=-1, keepdim=True) @ w.mT for t in (q, k))
    weights = (a[..., :, None, :] - b[..., None, :, :]).cos().mean(-1)
    if module.gate is not None:
        g = torch.sigmoid((k * module.gate[:, None]).sum(-1) + module.gate_bias[:, None])
        g = g if keep is None else torch.where(keep[:, None], g, 1)
        log = g.log().cumsum(-1)
        decay = (log[..., :, None] - log[..., None, :]).tril().exp()  # Π_{s<r≤t} g_r
        weights = weights * decay * (1 - g)[..., None, :]
    return held(weights * allowed(q.shape[2], k.shape[2], module.causal, keep), v, module.eps)


@oracle("fast-weight-delta-dpfp")
def fast_weights(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """One token after another, W as the paper has it; sum-normalised DPFP."""

    def phi(x: Tensor) -> Tensor:
        r = torch.cat([x, -x], -1).relu()
        f = torch.cat([r * r.roll(s, -1) for s in range(1, module.nu + 1)], -1)
        return f / (f.sum(-1, keepdim=True) + module.eps)

    fq, fk = phi(q), phi(k)
    beta = torch.sigmoid((k * module.rate[:, None]).sum(-1, keepdim=True))
    beta = beta if keep is None else beta * keep[:, None, :, None]
    w, ys = q.new_zeros(*q.shape[:2], v.shape[-1], fk.shape[-1]), []
    for i in range(k.shape[2]):
        wrong = v[:, :, i] - (w @ fk[:, :, i, :, None])[..., 0]
        w = w + (beta[:, :, i] * wrong)[..., :, None] * fk[:, :, i, None, :]
        ys.append((w @ fq[:, :, i, :, None])[..., 0])
    return torch.stack(ys, 2)
