"""Attention on grids and along edges, its pairs written out one by one."""

import itertools

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import softmax


def neighbours(i: int, length: int, k: int, delta: int, causal: bool) -> list[int]:
    """The keys of query i along one axis, by the papers' formulas."""
    group = list(range(i % delta, length, delta))
    t = i // delta
    if causal:
        return group[max(0, t - k + 1) : t + 1]
    k = min(k, len(group))
    s = min(max(t - k // 2, 0), len(group) - k)
    return group[s : s + k]


def neighbourhood(module, q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, ...]) -> Tensor:
    """All cells of one grid, q, k, v: H L D."""
    cells = list(itertools.product(*(range(n) for n in shape)))
    place = {cell: at for at, cell in enumerate(cells)}
    scores = q @ k.mT / q.shape[-1] ** 0.5
    seen = torch.zeros(len(cells), len(cells), dtype=torch.bool)
    biases = torch.zeros_like(scores)
    deltas = [max(1, n // w) if d == "max" else d for n, w, d in
              zip(shape, module.windows, module.dilations, strict=True)]  # fmt: skip
    rows, columns, offsets = [], [], []
    for cell in cells:
        axes = zip(cell, shape, module.windows, deltas, module.causals, strict=True)
        for other in itertools.product(*(neighbours(*axis) for axis in axes)):
            rows.append(place[cell])
            columns.append(place[other])
            offsets.append([(j - i) // d + w - 1 for i, j, d, w in
                            zip(cell, other, deltas, module.windows, strict=True)])  # fmt: skip
    seen[rows, columns] = True
    if module.table is not None:
        at = torch.tensor(offsets).unbind(1)
        places = (slice(None), torch.tensor(rows), torch.tensor(columns))
        biases = biases.index_put(
            (torch.arange(len(q))[:, None], *(p[None] for p in places[1:])),
            module.table[(slice(None), *at)].to(biases.dtype),
        )
    return softmax(scores + biases, seen) @ v


@oracle("nat")
@oracle("dinat")
def sequence(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """One axis. Masked tokens are taken out; causally they stay and are not seen."""
    outs = []
    for b in range(len(q)):
        kept = torch.ones(q.shape[2], dtype=torch.bool) if keep is None else keep[b]
        if module.causal:
            outs.append(causal(module, q[b], k[b], v[b], kept))
            continue
        at = kept.nonzero()[:, 0]
        o = neighbourhood(module, q[b, :, at], k[b, :, at], v[b, :, at], (len(at),))
        outs.append(torch.zeros_like(q[b]).index_copy(1, at, o))
    return torch.stack(outs)


def causal(module, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """o_i over j = i − tδ, 0 ≤ t < window."""
    (w,), (d,) = module.windows, module.dilations
    i = torch.arange(q.shape[1])
    step = i[:, None] - i
    seen = (step >= 0) & (step <= (w - 1) * d) & (step % d == 0) & kept
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if module.table is not None:
        scores = scores + module.table[:, (w - 1 - step.clamp(min=0) // d).clamp(min=0)]
    return softmax(scores, seen) @ v


@oracle("axial-attention")
def axial(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """Σ over axes of softmax over the tokens of the same row, or of the same column."""
    outs = []
    for b in range(len(q)):
        kept = torch.ones(q.shape[2], dtype=torch.bool) if keep is None else keep[b]
        at = kept.nonzero()[:, 0]
        i = torch.arange(len(at))
        order = (i <= i[:, None]) | (not module.causal)
        scores = q[b, :, at] @ k[b, :, at].mT / q.shape[-1] ** 0.5
        o = torch.zeros_like(q[b, :, at])
        for axis in module.axes:
            line = i // module.columns if axis == 1 else i % module.columns
            o = o + softmax(scores, (line == line[:, None]) & order) @ v[b, :, at]
        outs.append(torch.zeros_like(q[b]).index_copy(1, at, o))
    return torch.stack(outs)
