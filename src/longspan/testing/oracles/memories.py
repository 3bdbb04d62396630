"""Memories of earlier segments: each row and segment by itself, lists for queues."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import softmax


def relative_attention(mixer, x: Tensor, whole: Tensor) -> Tensor:
    """A_ij = (q_i + u)·k_j + (q_i + v)·r_{i−j} of L queries, the last of S vectors."""
    position, heads, width, full = mixer.position, mixer.heads, mixer.head_width, x.shape[-1]
    q = mixer.project["q"](x).unflatten(-1, (heads, width))
    k, v = (mixer.project[n](whole).unflatten(-1, (heads, width)) for n in ("k", "v"))
    rate = 10000 ** (-torch.arange(0, full, 2, dtype=torch.float64) / full)
    distance = torch.arange(len(whole) - len(x), len(whole))[:, None] - torch.arange(len(whole))
    angle = distance[..., None] * rate
    r = position.project(torch.cat([angle.sin(), angle.cos()], -1).to(x.dtype))
    scores = torch.einsum("ihd,jhd->hij", q + position.u, k)
    scores = scores + torch.einsum("ihd,ijhd->hij", q + position.v, r.unflatten(-1, (heads, width)))
    weights = softmax(scores / width**0.5, distance >= 0)
    return mixer.output(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))


@oracle("compressive-transformer")
def compressive_transformer(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    """cm, m: lists; f_c: new_j = b + Σ_r W_r old_{c j + r}; memories start empty."""
    kept = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    few, many = module.sizes[module.training]
    last, y = module.compress.last, torch.zeros_like(x)
    for b in range(len(x)):
        here = kept[b].nonzero()[:, 0]
        older, recent, leaving = [], [], []
        for piece in here.split(module.segment):
            h = x[b, piece]
            whole = torch.stack([*older, *recent, *h])
            y[b, piece] = relative_attention(module.mixer, h, whole)
            recent = [*recent, *h]
            while len(recent) > many:
                leaving.append(recent.pop(0))
            while len(leaving) >= module.rate:
                old, leaving = leaving[: module.rate], leaving[module.rate :]
                new = sum(last.weight[..., r] @ t for r, t in enumerate(old)) + last.bias
                older = [*older, new][-few:]
    return y


@oracle("memorizing-transformer")
def memorizing_transformer(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    """g y_mem + (1 − g) y_loc, the nearest found by sorting all scores."""
    kept = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    mixer, y = module.mixer, torch.zeros_like(x)
    heads, width, size = mixer.heads, mixer.head_width, module.memory_eval
    for b in range(len(x)):
        here = kept[b].nonzero()[:, 0]
        q, k, v = (mixer.project[n](x[b, here]).unflatten(-1, (heads, width)) for n in "qkv")
        q, k = (t / t.square().sum(-1, keepdim=True).sqrt() for t in (q, k))
        outs = []
        for t in range(len(here)):
            segment = t // module.segment * module.segment
            first = max(t - module.window + 1, segment - module.cache, 0)
            held = [past.detach()[max(segment - size, 0) : segment] for past in (k, v)]
            both = [
                torch.cat([past.detach()[:segment], past[segment:]])[first : t + 1]
                for past in (k, v)
            ]
            per_head = []
            for h in range(heads):
                a = module.scale[h].abs()
                far = t - torch.arange(first, t + 1)
                bias = mixer.position.table.table.weight[bucket(far), h]
                scores = a * (both[0][:, h] @ q[t, h]) + bias
                local = softmax(scores[None], torch.ones(1, len(far), dtype=torch.bool))[0]
                o = local @ both[1][:, h]
                if segment and size:
                    near = (held[0][:, h] @ q[t, h]).sort(descending=True).indices[: module.top]
                    scores = a * (held[0][near, h] @ q[t, h])
                    found = scores.softmax(-1) @ held[1][near, h]
                    g = module.gate[h].sigmoid()
                    o = g * found + (1 - g) * o
                per_head.append(o)
            outs.append(torch.cat(per_head))
        if outs:
            y[b, here] = mixer.output(torch.stack(outs))
    return y


def bucket(far: Tensor) -> Tensor:
    """T5's 32 buckets: 16 of one distance each, the others by its logarithm, up to 128."""
    wide = 16 + (far.clamp(min=1) / 16).log().div(torch.tensor(8.0).log()).mul(16).long()
    return torch.where(far < 16, far, wide.clamp(max=31))


@oracle("expire-span")
def expire_span(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    """m a / Σ m a over the whole row, nothing dropped; earlier segments without gradient."""
    kept = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    mixer, y = module.mixer, torch.zeros_like(x)
    heads, width = mixer.heads, mixer.head_width
    for b in range(len(x)):
        here = kept[b].nonzero()[:, 0]
        outs = []
        for t in range(len(here)):
            segment = t // module.segment * module.segment
            h = torch.cat([x[b, here[:segment]].detach(), x[b, here[segment : t + 1]]])
            far = torch.arange(t, -1, -1)
            e = module.span * torch.sigmoid(module.predict(h)[:, 0])
            m = (1 + (e - far) / module.ramp).clamp(0, 1)
            q = mixer.project["q"](h[-1:]).unflatten(-1, (heads, width))
            k, v = (mixer.project[n](h).unflatten(-1, (heads, width)) for n in "kv")
            near = (far < len(module.places))[:, None]
            placed = module.places[far.clamp(max=len(module.places) - 1)] * near
            scores = torch.einsum("ihd,jhd->hj", q, k + placed[:, None]) / width**0.5
            a = softmax(scores[:, None], (m > 0)[None, None])[:, 0] * m
            a = a / (a.sum(-1, keepdim=True) + 1e-8)
            outs.append(torch.einsum("hj,jhd->hd", a, v).flatten())
        if outs:
            y[b, here] = mixer.output(torch.stack(outs))
    return y
