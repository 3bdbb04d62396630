"""Memories that are kept block by block: each block's matrices written out."""

import math

import torch
from torch import Tensor

from longspan.testing.oracles import oracle


def softmax(scores: Tensor) -> Tensor:
    """Over the last axis, by its definition."""
    raised = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return raised / raised.sum(-1, keepdim=True)


def row_by_row(formula, module, x: Tensor, keep: Tensor | None) -> Tensor:
    """A formula for one row of tokens, applied to the kept tokens of each."""
    kept = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    y = []
    for b in range(x.shape[0]):
        out = formula(module, x[b, kept[b]])
        at = kept[b].nonzero()[:, 0]
        y.append(x.new_zeros(x.shape[1:]).index_copy(0, at, out.to(x.dtype)))
    return torch.stack(y)


def waves(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """sin and cos of p / 10000^(2c/E), interleaved."""
    rate = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = positions[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(dtype)


@oracle("shortformer")
def shortformer(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    return row_by_row(_shortformer, module, x, keep)


def _shortformer(module, x: Tensor) -> Tensor:
    length, heads = module.block, module.heads
    out = []
    for start in range(0, len(x), length):
        now = x[start : start + length]
        cached = x[max(start - module.memory, 0) : start].detach()
        seen = torch.cat([cached, now])
        p = waves(torch.arange(len(seen)), x.shape[1], x.dtype)
        query = module.project["q"](now + p[len(cached) :]).unflatten(1, (heads, -1))
        key = module.project["k"](seen + p).unflatten(1, (heads, -1))
        value = module.project["v"](seen).unflatten(1, (heads, -1))
        for i in range(len(now)):
            until = len(cached) + i + 1
            scores = torch.einsum("hd,jhd->hj", query[i], key[:until]) / query.shape[2] ** 0.5
            read = torch.einsum("hj,jhd->hd", softmax(scores), value[:until])
            out.append(module.output(read.flatten()))
    return torch.stack(out) if out else x


@oracle("block-recurrent-transformer")
def block_recurrent_transformer(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    return row_by_row(_block_recurrent, module, x, keep)


def unit(t: Tensor, heads: int) -> Tensor:
    t = t.unflatten(1, (heads, -1))
    return t / t.norm(dim=-1, keepdim=True)


def t5_bucket(distance: int, buckets: int, farthest: int) -> int:
    half = buckets // 2
    if distance < half:
        return distance
    far = math.log(distance / half) / math.log(farthest / half) * (buckets - half)
    return min(half + int(far + 1e-9), buckets - 1)


def read(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Rows of L × (H D): softmax(q kᵀ + bias) v of each head."""
    weights = softmax(torch.einsum("ihd,jhd->hij", q, k) + bias)
    return torch.einsum("hij,jhd->ihd", weights, v).flatten(1)


def _block_recurrent(module, x: Tensor) -> Tensor:
    """Fixed gate, skip layout."""
    heads, size = module.heads, module.window
    state, out = module.start, []
    table = module.near.table.weight
    of_x, of_s = module.project, module.of_slots
    key, value = unit(of_x["k"](x), heads), of_x["v"](x).unflatten(1, (heads, -1))
    query, crossing = (unit(of_x[n](x), heads) for n in ("q", "q_cross"))
    for start in range(0, len(x), size):
        stop = min(start + size, len(x))
        h = module.slots_norm(state) + module.identity
        key_s, value_s = unit(of_s["k"](h), heads), of_s["v"](h).unflatten(1, (heads, -1))
        scale = module.scale[:, 0]  # H 1
        for i in range(start, stop):
            first = max(i - size + 1, 0)
            near = [t5_bucket(i - j, len(table), module.distance) for j in range(first, i + 1)]
            window = slice(first, i + 1)
            own = read(query[i : i + 1] * scale, key[window], value[window], table[near].T[:, None])
            cross = read(crossing[i : i + 1] * scale, key_s, value_s)
            out.append(module.output(torch.cat([own, cross], 1))[0])
        if stop - start == size:
            both = slice(max(start - size, 0), stop)
            scale = module.slots_scale[:, 0]
            own = read(unit(of_s["q"](h), heads) * scale, key_s, value_s)
            cross = read(unit(of_s["q_cross"](h), heads) * scale, key[both], value[both])
            z = module.slots_output(torch.cat([own, cross], 1))
            g = torch.sigmoid(module.gate.bias)
            state = state * g + z * (1 - g)
    return torch.stack(out) if out else x
