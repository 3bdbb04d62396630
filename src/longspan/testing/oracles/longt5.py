"""LongT5's encoder attention, its matrix of L columns for tokens and G for globals written out."""

import math

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import softmax


def bucket(step: int, buckets: int, distance: int) -> int:
    """Of j − i = step, two-sided (T5, App. of Mesh TensorFlow)."""
    side, far = buckets // 2, abs(step)
    exact = side // 2
    if far >= exact:
        grown = math.log(far / exact) / math.log(distance / exact) * (side - exact)
        far = min(exact + int(grown + 1e-6), side - 1)
    return far + (side if step > 0 else 0)


def places(steps: Tensor, buckets: int, distance: int) -> Tensor:
    found = [bucket(step, buckets, distance) for step in steps.flatten().tolist()]
    return torch.tensor(found, dtype=torch.long).view(steps.shape)


@oracle("longt5")
def longt5(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    y, r, k = torch.zeros_like(x), module.radius, module.block
    weights = {n: module.project[n].weight.T for n in "qkv"}
    for b in range(x.shape[0]):
        at = torch.arange(x.shape[1]) if keep is None else keep[b].nonzero()[:, 0]
        h, length = x[b, at], len(at)
        count = length // k if k else 0
        run = [min(i // k, count - 1) for i in range(length)] if k and count else []
        members = [[i for i in range(length) if run[i] == m] for m in range(count)]
        keys = h
        if count:
            g = torch.stack([h[own].sum(0) for own in members])
            scale = (g.square().mean(-1, keepdim=True) + module.norm.eps).rsqrt()
            keys = torch.cat([h, g * scale * module.norm.weight])
        i = torch.arange(length)
        steps = i - i[:, None]
        blocks = torch.arange(count) - torch.tensor(run, dtype=torch.long)[:, None]
        seen = torch.ones(length, length + count, dtype=torch.bool)
        seen[:, :length] = steps.abs() <= r
        pairs = [(module.near, steps)] + ([(module.far, blocks)] if count else [])
        tables = [
            own.table.weight[places(at, len(own.table.weight), own.distance)] for own, at in pairs
        ]
        outs = []
        for head in range(module.heads):
            wide = weights["q"].shape[1] // module.heads
            of = slice(head * wide, (head + 1) * wide)
            scores = (h @ weights["q"][:, of]) @ (keys @ weights["k"][:, of]).T
            scores = scores + torch.cat([table[..., head] for table in tables], 1)
            outs.append(softmax(scores, seen) @ (keys @ weights["v"][:, of]))
        y[b] = y[b].index_copy(0, at, torch.cat(outs, 1) @ module.output.weight.T)
    return y
