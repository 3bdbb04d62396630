"""Scores that are not compared but made: their matrices written out, row by row."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import softmax
from longspan.testing.oracles.low_rank import placed, rows


def scores(module, form: str, q: Tensor, k: Tensor) -> Tensor:
    """B of one form, H n n, for the n kept tokens of one example."""
    n, hidden = q.shape[1], q.relu()
    if form == "dense":
        return (hidden @ module.w2.mT + module.b2.mT)[..., :n]
    if form in ("random", "random-fixed"):
        return (module.r if form == "random" else module.fixed)[:, :n, :n]
    if form == "factorized-random":
        return (module.r1 @ module.r2.mT)[:, :n, :n]
    if form == "vanilla":
        return q @ k.mT / q.shape[-1] ** 0.5
    a, c = hidden @ module.wa.mT + module.ba.mT, hidden @ module.wc.mT + module.bc.mT
    tiled, repeated = a.repeat(1, 1, c.shape[2]), c.repeat_interleave(a.shape[2], 2)
    return (tiled * repeated)[..., :n]


@oracle("synthesizer")
def synthesizer(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """softmax(Σ α_n B_n) V over each example's own tokens."""
    alpha = [1.0] if module.alpha is None else module.alpha.softmax(0)
    outs = []
    for b, at in enumerate(rows(k, keep)):
        mixed = q.new_zeros(q.shape[1], len(at), len(at))
        for share, form in zip(alpha, module.forms, strict=True):
            mixed = mixed + share * scores(module, form, q[b, :, at], k[b, :, at])
        seen = torch.ones(len(at), len(at), dtype=torch.bool)
        weights = softmax(mixed, seen.tril() if module.causal else seen)
        outs.append(placed(weights @ v[b, :, at], at, q.shape[2]))
    return torch.stack(outs)
