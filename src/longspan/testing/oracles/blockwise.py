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


@oracle("infinite-former")
def infinite_former(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    return row_by_row(_infinite_former, module, x, keep)


def bell(t, mean, deviation):
    return torch.exp(-(((t - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))


def fit(x: Tensor, t: Tensor, centres: Tensor, deviations: Tensor, penalty: float) -> Tensor:
    """argmin_B Σ (x_i − Bᵀψ(t_i))² + λ|B|², with zeros half as many again on either side."""
    half, n = len(t) // 2, len(t)
    outside = [(k + 0.5) / n for k in (*range(-half, 0), *range(n, n + half))]
    places = torch.cat([t, torch.tensor(outside, dtype=t.dtype)])
    f = bell(places[:, None], centres, deviations)
    wanted = torch.cat([x, x.new_zeros(len(outside), x.shape[1])])
    square = f.T @ f + penalty * torch.eye(f.shape[1], dtype=f.dtype)
    return torch.linalg.inv(square) @ f.T @ wanted


def _infinite_former(module, x: Tensor) -> Tensor:
    """Normal densities, sticky memory."""
    size, heads, count = module.segment, module.heads, module.samples
    each = module.basis // len(module.widths)
    centres = torch.cat([torch.linspace(0, 1, each, dtype=torch.float64) for _ in module.widths])
    deviations = torch.tensor([w for w in module.widths for _ in range(each)], dtype=torch.float64)
    out, b = [_within_blocks(module.local, x)], None
    for n, start in enumerate(range(0, len(x), size)):
        now = x[start : start + size]
        looked = torch.zeros(module.bins, dtype=torch.float64)
        if b is not None:
            signal = b.to(x.dtype)
            q, k, v = (
                module.project[name](t).unflatten(1, (heads, -1))
                for name, t in (("q", now), ("k", signal), ("v", signal))
            )
            scores = torch.einsum("ihd,jhd->ihj", q, k) / q.shape[2] ** 0.5
            mean, raw = module.place(scores).unbind(-1)
            mean = torch.sigmoid(mean)
            variance = torch.log1p(torch.exp(raw)).clamp(min=1e-4)
            r = bell(mean[..., None], centres, (deviations**2 + variance[..., None]).sqrt())
            read = torch.einsum("ihj,jhd->ihd", r.to(x.dtype), v).flatten(1)
            out[0] = out[0] + torch.cat(
                [
                    x.new_zeros(start, x.shape[1]),
                    module.output(read),
                    x.new_zeros(len(x) - start - len(now), x.shape[1]),
                ]
            )
            edges = torch.linspace(0, 1, module.bins + 1, dtype=torch.float64)
            with torch.no_grad():
                z = (edges - mean.double()[..., None]) / variance.double().sqrt()[..., None]
                below = (1 + torch.erf(z / math.sqrt(2))) / 2
                looked = (below[..., 1:] - below[..., :-1]).sum((0, 1))
        if len(now) < size:
            continue
        data = now.detach().double()
        if b is None:
            t = (torch.arange(size) + 0.5) / size
            b = fit(data, t.double(), centres, deviations, module.penalty)
            continue
        share = (looked / looked.sum()).cumsum(0)
        generator = torch.Generator().manual_seed(module.seed + n)
        draws = torch.rand(count, generator=generator, dtype=torch.float64).sort().values
        old = torch.zeros(count, x.shape[1], dtype=torch.float64)
        for m, u in enumerate(draws):
            bin = min(int((share < u).sum()), module.bins - 1)
            under = share[bin - 1] if bin else torch.zeros(())
            t = (bin + (u - under) / (share[bin] - under)) / module.bins
            old[m] = bell(t, centres, deviations) @ b
        places = [module.tau * (m + 1) / count for m in range(count)]
        places += [module.tau + (1 - module.tau) * (i + 1) / size for i in range(size)]
        t = torch.tensor(places, dtype=torch.float64)
        b = fit(torch.cat([old, data]), t, centres, deviations, module.penalty)
    return out[0]


def _within_blocks(local, x: Tensor) -> Tensor:
    """Causal attention within each block, without positions."""
    out = []
    for i in range(len(x)):
        own = x[i // local.block * local.block : i + 1]
        q = local.project["q"](x[i : i + 1]).unflatten(1, (local.heads, -1))
        k, v = (local.project[n](own).unflatten(1, (local.heads, -1)) for n in "kv")
        out.append(local.output(read(q / q.shape[2] ** 0.5, k, v))[0])
    return torch.stack(out) if out else x
