"""Attention to slots and chunks of units, all sums written out."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import allowed


@oracle("abc")
def abc(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """φ = α / Σ α anew for every query's prefix, α = exp(W_φ c) with c = v."""
    alpha = v @ module.controls[0].weight.mT  # B H S M
    seen = allowed(q.shape[2], k.shape[2], module.causal, keep)[..., None]  # … L S 1
    phi = alpha[:, :, None].masked_fill(~seen, -torch.inf).softmax(3)
    slots_k = torch.einsum("bhtsm,bhsd->bhtmd", phi, k)
    slots_v = torch.einsum("bhtsm,bhsd->bhtmd", phi, v)
    scores = torch.einsum("bhtd,bhtmd->bhtm", q, slots_k) / q.shape[-1] ** 0.5
    return torch.einsum("bhtm,bhtmd->bhtd", scores.softmax(-1), slots_v)


@oracle("flash-gau")
def flash_gau(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    """A written out row by row of the batch, over its own tokens: a block-diagonal part and, for
    mixed chunks, a strictly lower block part or a part over all (Eqs. 7 to 9)."""
    outs = []
    for b in range(len(x)):
        at = torch.arange(x.shape[1]) if keep is None else torch.arange(x.shape[1])[keep[b]]
        tokens, place = len(at), torch.arange(len(at))
        e, s = module.inner, module.shared
        u, v, z = torch.nn.functional.silu(module.up(module.norm(x[b, at]))).split([e, e, s], -1)
        views = z * module.gamma[:, None] + module.beta[:, None]
        chunk = module.chunk or tokens
        apart = place - place[:, None]
        near, far = views[0] @ views[len(views) // 2].T / chunk, views[1] @ views[-1].T
        bias = module.bias(apart.flatten()).view(tokens, tokens)
        a = torch.relu(near + bias) ** 2
        same = place // chunk == (place // chunk)[:, None]
        if module.causal:
            a = a * (same & (apart <= 0)) + far / chunk * (place // chunk < place[:, None] // chunk)
        else:
            a = a * same + far / tokens
        y = module.output(u * (a @ v))
        outs.append(torch.zeros_like(x[b]).index_copy(0, at, y))
    return torch.stack(outs)


@oracle("luna")
def luna(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    """Two softmax attentions; causally f(X, Y, Z)_t with the sums of every prefix written out."""
    p = module.slots.learned + module.slots.waves.to(x.dtype)

    def heads(name: str, t: Tensor) -> Tensor:
        return module.project[name](t).unflatten(-1, (module.heads, -1)).transpose(0, 1)

    outs = []
    for b in range(len(x)):
        at = torch.arange(x.shape[1]) if keep is None else torch.arange(x.shape[1])[keep[b]]
        own = x[b, at]
        pq, pk, q, k = (
            heads(n, s) for n, s in (("pack_q", p), ("pack_k", own), ("q", own), ("k", own))
        )
        root = q.shape[-1] ** 0.5
        if module.causal:
            a = torch.log2(1 + 2 ** (pk @ pq.mT / root))  # H T M
            t = torch.arange(1, len(at) + 1).view(-1, 1, 1)
            summed = [
                torch.einsum("hsx,hsy->hsxy", *pair).cumsum(1) / t for pair in ((k, a), (a, k))
            ]
            unpack = torch.einsum("htd,htdm->htm", q / root, summed[0]).softmax(-1)
            o = torch.einsum("htm,htmd->htd", unpack, summed[1])
        else:
            y_p = ((pq @ pk.mT / root).softmax(-1) @ pk).transpose(0, 1).flatten(1)
            c = heads("k", y_p)
            o = (q @ c.mT / root).softmax(-1) @ c
        y = module.output(o.transpose(0, 1).flatten(1))
        outs.append(torch.zeros_like(x[b]).index_copy(0, at, y))
    return torch.stack(outs)
