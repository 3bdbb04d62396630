"""Clustered, balanced and sampled attention, each set of keys listed one by one."""

import math

import torch
from torch import Tensor

from longspan.testing.oracles import oracle


def _kept(q: Tensor, k: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which queries and which keys count; a mask over as many keys as queries is of both."""
    keys = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
    if q.shape[2] == k.shape[2]:
        return keys, keys
    return torch.ones(q.shape[0], q.shape[2], dtype=torch.bool), keys


def _sphere(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def _softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Rows that see nothing give 0."""
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)).masked_fill(~seen, 0) @ v


def _band(length: int, keys: int, reach: int, causal: bool) -> Tensor:
    steps = torch.arange(keys - length, keys)[:, None] - torch.arange(keys)
    return (steps <= reach) & (steps >= (0 if causal else -reach))


@oracle("routing-transformer")
def routed(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    mine, theirs = _kept(q, k, keep)
    length, keys = q.shape[2], k.shape[2]
    rows = []
    for b in range(q.shape[0]):
        heads = []
        for h in range(q.shape[1]):
            if h < module.local:
                seen = _band(length, keys, module.reach, module.causal) & theirs[b]
                heads.append(_softmax(q[b, h], k[b, h], v[b, h], seen))
                continue
            x = _sphere(q[b, h])
            y = x if module.causal else _sphere(k[b, h])
            out, count = v.new_zeros(length, v.shape[3]), v.new_zeros(length, 1)
            for centre in module.means.centroids[h - module.local].to(x.dtype):

                def top(t: Tensor, kept: Tensor, centre: Tensor = centre) -> Tensor:
                    order = (t @ centre).masked_fill(~kept, -torch.inf).argsort(descending=True)
                    chosen = torch.zeros(len(t), dtype=torch.bool)
                    chosen[order[: min(module.window, int(kept.sum()))]] = True
                    return chosen

                a, c = top(x, mine[b]), top(y, theirs[b])
                seen = a[:, None] & c
                seen = seen & _band(length, keys, keys, True) if module.causal else seen
                out = out + _softmax(x.to(v.dtype), y.to(v.dtype), v[b, h], seen)
                count = count + a[:, None]
            heads.append(out / (count + 1e-2).clamp(min=1))
        rows.append(torch.stack(heads))
    return torch.stack(rows) if rows else q.new_zeros(*q.shape[:3], v.shape[3])


@oracle("routing-transformer-causal")
def strictly_routed(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    _, kept = _kept(q, k, keep)
    batch, heads, length, _ = q.shape
    seen = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    x = _sphere(q)
    for b in range(batch):
        for h in range(heads):
            if h < module.local:
                seen[b, h] = _band(length, length, module.reach, True) & kept[b]
                continue
            centres = module.means.centroids[h - module.local].to(x.dtype)
            code = (x[b, h] @ centres.mT).argmax(-1).tolist()
            for i in range(length):
                mine = [j for j in range(i + 1) if code[j] == code[i] and kept[b, j]]
                seen[b, h, i, mine[-module.window - 1 :] if kept[b, i] else mine[:0]] = True
    routes = torch.arange(heads)[:, None, None] >= module.local
    x = x.to(q.dtype)
    return _softmax(torch.where(routes, x, q), torch.where(routes, x, k), v, seen)


@oracle("smyrf")
def clustered(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    mine, theirs = _kept(q, k, keep)
    batch, heads, length, width = q.shape
    keys = k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    generator = torch.Generator().manual_seed(module.seed)
    a = torch.randn(heads, width + 2, module.rounds, generator=generator).to(wide)
    times = torch.zeros(batch, heads, length, keys, dtype=q.dtype)
    for b in range(batch):
        rows, columns = mine[b].nonzero()[:, 0], theirs[b].nonzero()[:, 0]
        count = -(-len(rows) // module.cluster)
        for h in range(heads):
            x, y = q[b, h].detach().to(wide)[rows], k[b, h].detach().to(wide)[columns]
            m = sum((t.norm(dim=-1) ** 2).amax() if len(t) else 0 for t in (x, y))
            lift = [(m - (t.norm(dim=-1, keepdim=True) ** 2)).clamp(min=0).sqrt() for t in (x, y)]
            x = torch.cat([x, 0 * lift[0], lift[0]], 1)
            y = torch.cat([y, lift[1], 0 * lift[1]], 1)
            for r in range(module.rounds):
                i, j = (rows[(x @ a[h, :, r]).argsort()], columns[(y @ a[h, :, r]).argsort()])
                for c in range(count):
                    part = i[c * len(i) // count : (c + 1) * len(i) // count]
                    met = j[c * len(j) // count : (c + 1) * len(j) // count]
                    times[b, h][part[:, None], met] += 1
    scores = (q @ k.mT / width**0.5).masked_fill(times == 0, -torch.inf)
    top = scores.amax(-1, keepdim=True).nan_to_num(neginf=0) if keys else scores
    weights = times * (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1) @ v


def _permutation(scores: Tensor, allowed: Tensor, module) -> Tensor:
    """Alternate division by row and column sums; rows come last."""
    weights = (scores - scores.amax()).exp() * allowed

    def share(weights: Tensor, total: Tensor) -> Tensor:
        return weights / total.masked_fill(total == 0, 1)

    for _ in range(module.iterations):
        weights = share(weights, weights.sum(1, keepdim=True))
        columns = weights.cumsum(0) if module.causal else weights.sum(0, keepdim=True)
        weights = share(weights, columns)
    return share(weights, weights.sum(1, keepdim=True))


@oracle("sinkhorn-attention")
def sorted_blocks(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    mine, theirs = _kept(q, k, keep)
    own, size = q.shape[2] == k.shape[2], module.block
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    wide = torch.promote_types(q.dtype, torch.float32)
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:2])).tolist():
        rows, columns = mine[b].nonzero()[:, 0], theirs[b].nonzero()[:, 0]
        x, y, z = q[b, h, rows], k[b, h, columns], v[b, h, columns]
        of_q, of_k = (t.to(wide).split(size) for t in (x, y))
        s, t = (torch.stack([block.sum(0) for block in of]) for of in (of_q, of_k))
        s = s.cumsum(0) - s if module.causal else s
        first, second = (w[h].to(wide) for w in module.weights)
        scores = (s @ first).relu() @ second[:, : len(t)] / module.temperature
        allowed = torch.ones(len(s), len(t), dtype=torch.bool)
        allowed = allowed.tril(-1) if module.causal else allowed
        mix = _permutation(scores, allowed, module).to(q.dtype)
        keys, values = y.split(size), z.split(size)
        for i in range(len(s)):
            seen_k, seen_v = [], []
            for place in range(size):
                full = [j for j in range(len(t)) if place < len(keys[j])]
                weight = sum(mix[i, j] for j in full)
                if full and weight > 0.5:
                    seen_k.append(sum(mix[i, j] * keys[j][place] for j in full) / weight)
                    seen_v.append(sum(mix[i, j] * values[j][place] for j in full) / weight)
            near = list(range(len(keys[i]))) if own else []
            for a, at in enumerate(range(i * size, min(len(x), (i + 1) * size))):
                met = [n for n in near if n <= a or not module.causal]
                met_k = torch.stack(seen_k + [keys[i][n] for n in met])
                met_v = torch.stack(seen_v + [values[i][n] for n in met])
                out[b, h, rows[at]] = (met_k @ x[at] / x.shape[-1] ** 0.5).softmax(0) @ met_v
    return out


@oracle("yoso")
def collided(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """B_a written out; its surrogate slope (τ/2) B_a is attached to x = q·k."""
    _, kept = _kept(q, k, keep)
    wide = torch.promote_types(q.dtype, torch.float32)
    x, y = (t.to(wide) / t.to(wide).norm(dim=-1, keepdim=True).clamp(min=1e-12) for t in (q, k))
    generator = torch.Generator().manual_seed(module.seed)
    shape = q.shape[1], module.rounds, q.shape[3], module.bits
    planes = torch.randn(*shape, generator=generator).to(wide)
    f_q, f_k = (torch.einsum("bhld,hrdt->bhrlt", t.detach(), planes) >= 0 for t in (x, y))
    met = (f_q[..., :, None, :] == f_k[..., None, :, :]).all(-1).to(wide).mean(2)
    met = met * kept[:, None, None]
    inner = x @ y.mT
    weights = met * (1 + module.bits / 2 * (inner - inner.detach()))
    o = weights @ v.to(wide)
    return (o / o.norm(dim=-1, keepdim=True).clamp(min=1e-12)).to(q.dtype)


@oracle("informer")
def lazy(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    mine, theirs = _kept(q, k, keep)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    wide = torch.promote_types(q.dtype, torch.float32)
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:2])).tolist():
        rows, columns = mine[b].nonzero()[:, 0], theirs[b].nonzero()[:, 0]
        x, y, z = q[b, h, rows], k[b, h, columns], v[b, h, columns]

        def budget(n: int) -> int:
            return min(n, module.factor * max(1, math.ceil(math.log(n))))

        u, samples = budget(len(x)), budget(len(y))
        draws = torch.rand(
            q.shape[2], module.factor * 24, generator=torch.Generator().manual_seed(module.seed)
        )
        scores = x.detach().to(wide) @ y.detach().to(wide).mT
        chosen = (draws[: len(x), :samples].double() * len(y)).long()
        drawn = scores.gather(1, chosen)
        measure = drawn.amax(1) - drawn.sum(1) / len(y)
        active = torch.zeros(len(x), dtype=torch.bool)
        active[measure.topk(u).indices] = True
        full = x @ y.mT / x.shape[-1] ** 0.5
        if module.causal:
            past = torch.ones(len(x), len(x), dtype=torch.bool).tril()
            idle = z.to(wide).cumsum(0).to(z.dtype)
            full = full.masked_fill(~past, -torch.inf)
        else:
            idle = z.to(wide).mean(0).to(z.dtype).expand(len(x), -1)
        out[b, h, rows] = torch.where(active[:, None], full.softmax(-1) @ z, idle)
    return out
