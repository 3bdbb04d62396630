"""Sums of outer products by chunk, with a backward pass that recomputes them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engines.scan.fades import fading
from longspan.engines.scan.plan import kept_states, works


class Entrywise(NamedTuple):
    """A feature map of single numbers: y of x, and dy/dx of y."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


class Outer(torch.autograd.Function):
    """q, k, v: B H L ·; state: N H D W; fades: B·H L (D)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, state: Tensor, fades: Tensor | None,
        feature: Entrywise | None, eps: float | None, offsets: list[int] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        flat = [t.flatten(0, 1) for t in (q, k, v)]
        o, last = torch.empty_like(flat[2]), state.flatten(0, 1).clone()
        plan = list(works(o.shape[0], o.shape[1], offsets))
        kept = kept_states(plan, last)
        below = None if eps is None else last.new_empty(*o.shape[:2], 1)
        for work in plan:
            running = last[work.states]
            for span in work.spans:
                at = work.rows, span.tokens
                qs, ks, vs = (split(t[at], span.chunks, last.dtype) for t in flat)
                qs, ks, vs = featured(qs, ks, vs, feature, eps)
                fade = fading(None if fades is None else fades[at], span.chunks, qs)
                kept[span.kept] = running
                before, running = fade.states(fade.falling(ks), vs, running)
                out = torch.bmm(fade.pairs(qs, ks), vs).baddbmm_(fade.rising(qs), before)
                out = out.view(o[at].shape[0], -1, out.shape[-1])
                if below is not None and eps is not None:
                    below[at] = out[..., -1:].add_(eps)
                    out = out[..., :-1].div_(out[..., -1:])
                o[at] = out
            last[work.states] = running
        ctx.save_for_backward(*flat, kept, fades, *(() if below is None else (o, below)))
        ctx.heads, ctx.options = q.shape[:2], (feature, eps, offsets)
        return o.view(v.shape), last.view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(do.device.type, enabled=False):
            return Outer.gradients(ctx, do, dlast)

    @staticmethod
    def gradients(ctx: Any, do: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, kept, fades, *quotient = ctx.saved_tensors
        flat = q, k, v
        feature, eps, offsets = ctx.options
        do = do.flatten(0, 1)
        grads = [torch.empty_like(t) for t in flat]
        dstate = dlast.flatten(0, 1).clone()
        dfades = torch.empty_like(fades) if ctx.needs_input_grad[4] else None
        for work in works(do.shape[0], do.shape[1], offsets):
            later = dstate[work.states]  # gradient of the state that leaves the group
            for span in reversed(work.spans):
                at, n = (work.rows, span.tokens), span.chunks
                qs, ks, vs = (split(t[at], n, kept.dtype) for t in flat)
                qs, ks, vs = featured(qs, ks, vs, feature, eps)
                ds = split(do[at], n, kept.dtype)
                if quotient:
                    os, below = (split(t[at], n, kept.dtype) for t in quotient)
                    ds = ds / below
                    ds = torch.cat([ds, -(ds * os).sum(-1, keepdim=True)], -1)
                fade = fading(None if fades is None else fades[at], n, qs)
                falling, end = fade.falling(ks), later
                before, last = fade.states(falling, vs, kept[span.kept])
                # The same sums from the right: what reaches each chunk's state from later chunks.
                after, later = fade.states(fade.rising(qs), ds, later, reverse=True)
                dv = torch.bmm(falling, after).baddbmm_(fade.pairs(qs, ks).mT, ds)
                dq = fade.rising(torch.bmm(ds, before.mT))
                dk = fade.falling(torch.bmm(vs, after.mT))
                fade.spread(torch.bmm(ds, vs.mT).tril_(), qs, ks, dq, dk)
                if dfades is not None:
                    dfades[at] = fade.gradient(qs * dq - ks * dk, last * end)
                if feature is not None:
                    dq.mul_(feature.slope(qs))
                    dk.mul_(feature.slope(ks))
                for grad, part in zip(grads, (dq, dk, dv), strict=True):
                    part = part[..., : grad.shape[-1]]
                    grad[at] = part.reshape(-1, part.shape[1] * n, part.shape[2])
            dstate[work.states] = later
        dq, dk, dv, ds = (t.unflatten(0, (-1, ctx.heads[1])) for t in (*grads, dstate))
        return dq, dk, dv, ds, dfades, None, None, None


def split(t: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """rows, n chunks of C tokens, · → rows·n C ·"""
    return t.reshape(t.shape[0] * n, t.shape[1] // n, t.shape[2]).to(dtype)


def featured(
    q: Tensor, k: Tensor, v: Tensor, feature: Entrywise | None, normalise: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """φ(q), φ(k) and v, with a column of ones where one sum gives numerator and denominator."""
    if feature is not None:
        q, k = feature.value(q), feature.value(k)
    return q, k, v if normalise is None else F.pad(v, (0, 1), value=1.0)
