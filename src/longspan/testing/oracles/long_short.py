"""Transformer-LS, token by token."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.blockwise import row_by_row
from longspan.testing.oracles.dense import softmax


def norm(module, x: Tensor) -> Tensor:
    """LN over all heads together, or nothing where DualLN is off."""
    if not hasattr(module, "weight"):
        return x
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + module.eps).rsqrt()
    return centred * scale * module.weight + module.bias


def linear(module, x: Tensor) -> Tensor:
    return x @ module.weight.T if module.bias is None else x @ module.weight.T + module.bias


def compressed(module, p: Tensor, x: Tensor) -> Tensor:
    """Pᵀ x, each head by its own columns of P: r E."""
    heads, (length, width) = module.heads, x.shape
    every = torch.ones(length, dtype=torch.bool)
    weights = softmax(p.T, every).view(heads, module.rank, length)
    own = x.view(length, heads, width // heads)
    return torch.stack([weights[h] @ own[:, h] for h in range(heads)], 1).flatten(1)


def waves(distance: int, width: int, like: Tensor) -> Tensor:
    plane = torch.arange(width // 2, dtype=like.dtype)
    angles = distance * 10000.0 ** (-2 * plane / width)
    return torch.cat([angles.sin(), angles.cos()])


def around(module, i: int, j: int) -> bool:
    """Whether token or cell i has j in its segment or the margin around it."""
    w, columns = module.window, module.columns
    if not w:
        return False
    pairs = (
        [(i, j)] if columns is None else [(i // columns, j // columns), (i % columns, j % columns)]
    )
    return all(a // w * w - w // 2 <= b < a // w * w + w + w // 2 for a, b in pairs)


def bidirectional(module, x: Tensor, seen: Tensor) -> Tensor:
    """One sequence or image, of which `seen` are there."""
    g, heads = module.hubs, module.heads
    q = linear(module.project["q"], x)
    k, v = (norm(module.near_norm, linear(module.project[n], x)) for n in "kv")
    length, width = x.shape
    each = width // heads
    local, there = range(g, length), seen[g:]
    keys, values = k, v
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in local:
        mask[i, :g] = seen[:g]
        for j in local:
            mask[i, j] = seen[j] and around(module, i - g, j - g)
    if module.rank and bool(there.any()):
        p = linear(module.compress, x[g:][there])
        k_far, v_far = (norm(module.far_norm, compressed(module, p, t[g:][there])) for t in (k, v))
        keys, values = torch.cat([k, k_far]), torch.cat([v, v_far])
        mask = torch.cat([mask, torch.ones(length, module.rank, dtype=torch.bool)], 1)
    outs = []
    for h in range(heads):
        of = slice(h * each, (h + 1) * each)
        scores = q[:, of] @ keys[:, of].T / each**0.5
        if module.columns is not None and module.table is not None:
            middle, c = module.table.shape[1] // 2, module.columns
            bias = torch.zeros_like(scores)
            for i, j in mask[:, :length].nonzero().tolist():
                if min(i, j) >= g:
                    i_, j_ = i - g, j - g
                    entry = module.table[h, i_ // c - j_ // c + middle, i_ % c - j_ % c + middle]
                    at = torch.zeros_like(scores)
                    at[i, j] = 1
                    bias = bias + entry * at
            scores = scores + bias
        o = softmax(scores, mask) @ values[:, of]
        locals_ = o[g:]
        if g:
            k_all = torch.cat([k[:g, of], locals_])
            o_g = softmax(q[:g, of] @ k_all.T / each**0.5, seen) @ torch.cat([v[:g, of], locals_])
        if module.weight is not None:
            taps = module.weight.shape[1]
            skip = []
            for i in range(length - g):
                at = [(c, i + c - taps // 2) for c in range(taps)]
                terms = [module.weight[h, c] * v[g + j, of] for c, j in at if 0 <= j < length - g]
                skip.append(torch.stack(terms).sum(0))
            locals_ = locals_ + torch.stack(skip) if skip else locals_
        outs.append(torch.cat([o_g, locals_]) if g else locals_)
    return linear(module.output, torch.cat(outs, 1))


def causal(module, x: Tensor) -> Tensor:
    heads, c, r, w = module.heads, module.chunk, module.rank, module.window
    length, width = x.shape
    each = width // heads
    q, k, v = (linear(module.project[n], x) for n in "qkv")
    near_k, near_v = norm(module.near_norm, k), norm(module.near_norm, v)
    count = length // c if r else 0
    far: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
    for n in range(count):
        own = slice(n * c, (n + 1) * c)
        p = linear(module.compress, x[own])
        k_in, v_in = (norm(module.far_norm, compressed(module, p, t[own])) for t in (k, v))
        k_out, v_out = k_in, v_in
        if module.hidden:
            inner = compressed(module, p, x[own])
            k_out, v_out = (
                norm(module.far_norm, linear(module.project[name], inner)) for name in "kv"
            )
        far.append((n, k_in, v_in, k_out, v_out))
    rows = []
    for i in range(length):
        chunk = i // c
        border = chunk // module.together * module.together
        scores, values = [[] for _ in range(heads)], []
        for j in range(max(0, i - w + 1), i + 1) if w else ():
            distance = linear(module.by_distance, waves(i - j, width, x))
            for h in range(heads):
                of = slice(h * each, (h + 1) * each)
                q_i = q[i, of] / each**0.5
                content = (q_i + module.content[h]) @ near_k[j, of]
                scores[h].append(content + (q_i + module.place[h]) @ distance[of])
            values.append(near_v[j])
        for n, k_in, v_in, k_out, v_out in far:
            if n >= chunk or (module.behind is not None and border - n > module.behind):
                continue
            k_bar, v_bar = (k_in, v_in) if n >= border else (k_out, v_out)
            for a in range(r):
                distance = linear(module.by_chunk, waves((chunk - n + 1) * r - 1 - a, width, x))
                for h in range(heads):
                    of = slice(h * each, (h + 1) * each)
                    scores[h].append(q[i, of] / each**0.5 @ (k_bar[a, of] + distance[of]))
                values.append(v_bar[a])
        if not values:
            rows.append(torch.zeros_like(x[i]))
            continue
        stacked = torch.stack(values)
        every = torch.ones(len(values), dtype=torch.bool)
        rows.append(
            torch.cat(
                [
                    softmax(torch.stack(scores[h]), every) @ stacked[:, h * each : (h + 1) * each]
                    for h in range(heads)
                ]
            )
        )
    return linear(module.output, torch.stack(rows) if rows else x)


@oracle("transformer-ls")
def transformer_ls(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    if hasattr(module, "chunk"):
        return row_by_row(causal, module, x, keep)
    if module.columns is None:
        return row_by_row(
            lambda module, row: bidirectional(module, row, torch.ones(len(row), dtype=torch.bool)),
            module,
            x,
            keep,
        )
    kept = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    rows = [bidirectional(module, x[b], kept[b]) for b in range(len(x))]
    return torch.stack(rows) * kept[..., None]
