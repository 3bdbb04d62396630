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
    scores = scores + torch.einsum(
        "ihd,ijhd->hij", q + position.v, r.unflatten(-1, (heads, width))
    )
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
