"""Attention to a compressed side, its matrices written out."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import allowed, softmax


def rows(keys: Tensor, keep: Tensor | None) -> list[Tensor]:
    """Indices of each row's kept keys."""
    everything = torch.arange(keys.shape[2])
    if keep is None:
        return [everything] * keys.shape[0]
    return [everything[row] for row in keep]


def placed(o: Tensor, at: Tensor, tokens: int) -> Tensor:
    """Outputs of some tokens, and 0 for the others."""
    return o.new_zeros(*o.shape[:-2], tokens, o.shape[-1]).index_copy(-2, at, o)


@oracle("linformer")
def linformer(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """softmax(Q (E K)ᵀ / √D) (F V) with the first columns of E and F."""
    e, f = module.keys[0].weight, module.values[0].weight
    outs = []
    for b, at in enumerate(rows(k, keep)):
        n = len(at)
        short = [side[..., :n] @ t[b, :, at] for side, t in ((e, k), (f, v))]
        outs.append((q[b] @ short[0].mT / q.shape[-1] ** 0.5).softmax(-1) @ short[1])
    return torch.stack(outs) if outs else q @ k.mT @ v


@oracle("nystromformer")
def nystromformer(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """F A⁺ (B V) row by row, the segments cut over its own tokens, and the convolution on V."""
    own, m, scale = q.shape[2] == k.shape[2], module.landmarks, q.shape[-1] ** -0.5

    def means(x: Tensor) -> Tensor:
        size, longer = divmod(x.shape[1], m)
        sizes = [size + 1] * longer + [size] * (m - longer)
        return torch.stack([part.mean(1) for part in x.split(sizes, 1)], 1)

    outs = []
    for b, at in enumerate(rows(k, keep)):
        ks, vs = k[b, :, at], v[b, :, at]
        mine = at if own else torch.arange(q.shape[2])
        qs = q[b, :, mine]
        if ks.shape[1] <= m or (not own and qs.shape[1] <= m):
            o = (qs @ ks.mT * scale).softmax(-1) @ vs
        else:
            q_m, k_m = means(qs), means(ks)
            f, a, right = (
                (x @ y.mT * scale).softmax(-1) for x, y in ((qs, k_m), (q_m, k_m), (q_m, ks))
            )
            z, eye = a.mT / a.sum(-2).amax(-1)[:, None, None], torch.eye(m, dtype=a.dtype)
            for _ in range(module.steps):
                az = a @ z
                z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
            o = f @ z @ right @ vs
        o = placed(o, mine, q.shape[2])
        if module.weight is not None and own:
            reach = module.weight.shape[1] // 2
            padded = torch.zeros_like(v[b]).index_copy(1, at, vs)
            padded = torch.nn.functional.pad(padded, (0, 0, reach, reach))
            for c, tap in enumerate(module.weight.unbind(1)):
                o = o + tap[:, None, None] * padded[:, c : c + v.shape[2]]
        outs.append(o)
    return torch.stack(outs)


@oracle("efficient-attention")
def efficient(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """A = ρ_q(Q) ρ_k(K)ᵀ, the softmax over positions taken anew for every query's prefix."""
    seen = allowed(q.shape[2], k.shape[2], module.causal, keep)
    if module.normalisation == "scaling":
        return (q @ k.mT * seen) @ v / seen.sum(-1, keepdim=True).clamp(min=1)
    maps = softmax(k.mT[:, :, None], seen[:, :, :, None])  # B H (L|1) D S
    weights = (q.softmax(-1)[..., None, :] @ maps).squeeze(-2)
    return weights @ v


@oracle("skyformer")
def skyformer(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """κ(Q, X) S (Sᵀ κ(X, X) S + γ I)⁻¹ Sᵀ κ(X, K) V, X = [Q; K], S the sampling matrix."""
    own, root = q.shape[2] == k.shape[2], q.shape[-1] ** 0.5

    def kappa(x: Tensor, y: Tensor) -> Tensor:
        away = (x[:, :, None] - y[:, None]).square().sum(-1)
        return (-away / (2 * root)).exp()

    outs = []
    for b, at in enumerate(rows(k, keep)):
        mine = at if own else torch.arange(q.shape[2])
        qs, ks, vs = q[b, :, mine], k[b, :, at], v[b, :, at]
        if module.landmarks is None:
            outs.append(placed(kappa(qs, ks) @ vs, mine, q.shape[2]))
            continue
        x, m = torch.cat([qs, ks], 1), module.landmarks
        s = x.new_zeros(x.shape[1], m)
        for side, (draws, n, first) in enumerate(
            zip(module.draws, (len(mine), len(at)), (0, len(mine)), strict=True)
        ):
            for sample in draws.tolist():
                for column, draw in enumerate(sample):
                    s[first + (draw * n >> 31), side * m // 2 + column] += 1 / len(draws)
        eye = torch.eye(m, dtype=x.dtype)
        inner = s.T @ kappa(x, x) @ s + module.ridge * eye
        if module.steps is None:
            inverse = torch.linalg.inv(inner)
        else:
            d = torch.diag_embed(inner.sum(-1).rsqrt())
            a = d @ inner @ d
            z = a.mT / a.sum(-2).amax(-1)[:, None, None]
            for _ in range(module.steps):
                az = a @ z
                z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
            inverse = d @ z @ d
        outs.append(placed(kappa(qs, x) @ s @ inverse @ s.T @ kappa(x, ks) @ vs, mine, q.shape[2]))
    return torch.stack(outs)


@oracle("external-attention")
def external(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    """Softmax over the row's tokens for each slot, then l1 over slots for each token."""
    outs = []
    for b, at in enumerate(rows(x[:, None], keep)):
        heads = []
        for f in module.query(x[b, at]).chunk(module.heads, -1):
            a = (f @ module.keys.T).softmax(0)
            heads.append(a / (module.eps + a.sum(1, keepdim=True)) @ module.values)
        outs.append(placed(module.output(torch.cat(heads, -1)), at, x.shape[1]))
    return torch.stack(outs)
