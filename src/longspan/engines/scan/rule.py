"""The delta rule by chunk, with a backward pass that recomputes it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engines.scan.fades import Fade, fading
from longspan.engines.scan.plan import kept_states, works
from longspan.engines.scan.sums import split


class Delta(torch.autograd.Function):
    """q, k, v, erase: B H L ·; rate: B H L; state: N H D V; fades: B·H L (D)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, erase: Tensor, rate: Tensor, state: Tensor,
        fades: Tensor | None, offsets: list[int] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        flat = [t.flatten(0, 1) for t in (q, k, v, erase, rate[..., None])]
        o, last = torch.empty_like(flat[2]), state.flatten(0, 1).clone()
        plan = list(works(o.shape[0], o.shape[1], offsets))
        kept = kept_states(plan, last)
        for work in plan:
            running = last[work.states]
            for span in work.spans:
                at = work.rows, span.tokens
                qs, ks, vs, es, bs = (split(t[at], span.chunks, last.dtype) for t in flat)
                fade = fading(None if fades is None else fades[at], span.chunks, qs)
                kept[span.kept] = running
                chunks = _write(fade, ks, vs, es, bs, running)
                running = chunks.end
                out = torch.bmm(fade.pairs(qs, ks), chunks.written)
                out.baddbmm_(fade.rising(qs), chunks.before)
                o[at] = out.view(o[at].shape)
            last[work.states] = running
        ctx.save_for_backward(*flat, kept, fades)
        ctx.heads, ctx.offsets = q.shape[:2], offsets
        return o.view(v.shape), last.view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(do.device.type, enabled=False):
            return Delta.gradients(ctx, do, dlast)

    @staticmethod
    def gradients(ctx: Any, do: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        *flat, kept, fades = ctx.saved_tensors
        do = do.flatten(0, 1)
        grads = [torch.empty_like(t) for t in flat]
        dstate = dlast.flatten(0, 1).clone()
        dfades = torch.empty_like(fades) if ctx.needs_input_grad[6] else None
        for work in works(do.shape[0], do.shape[1], ctx.offsets):
            later = dstate[work.states]  # gradient of the state that leaves the group
            for span in reversed(work.spans):
                at, n = (work.rows, span.tokens), span.chunks
                qs, ks, vs, es, bs, ds = (split(t[at], n, kept.dtype) for t in (*flat, do))
                fade, end = fading(None if fades is None else fades[at], n, qs), later
                c = _write(fade, ks, vs, es, bs, kept[span.kept])
                dwritten = torch.bmm(fade.pairs(qs, ks).mT, ds)
                direct = torch.bmm(fade.rising(qs).mT, ds)
                direct.baddbmm_(c.erased.mT, dwritten, alpha=-1)
                after, later = _march(fade, c.erased, c.falling, direct, later, reverse=True)
                dwritten.baddbmm_(c.falling, after)
                # (I + A) U = diag(rate) (V − E S) for given dU: the transposed system.
                y = torch.bmm(c.inverse.mT, dwritten)
                dv = bs * y
                dq = fade.rising(torch.bmm(ds, c.before.mT))
                de = fade.rising(torch.bmm(dv, c.before.mT)).neg_()
                dk = fade.falling(torch.bmm(c.written, after.mT))
                fade.spread(torch.bmm(ds, c.written.mT).tril_(), qs, ks, dq, dk)
                fade.spread(torch.bmm(dv, c.written.mT).neg_().tril_(-1), es, ks, de, dk)
                error = torch.baddbmm(vs, fade.rising(es), c.before, alpha=-1)
                error.baddbmm_(fade.pairs(es, ks).tril_(-1), c.written, alpha=-1)
                db = (y * error).sum(-1, keepdim=True)
                if dfades is not None:
                    taken = (qs * dq).addcmul_(es, de).addcmul_(ks, dk, value=-1)
                    dfades[at] = fade.gradient(taken, c.end * end)
                for grad, part in zip(grads, (dq, dk, dv, de, db), strict=True):
                    grad[at] = part.view(-1, part.shape[1] * n, part.shape[2])
            dstate[work.states] = later
        shaped = (t.unflatten(0, (-1, ctx.heads[1])) for t in (*grads, dstate))
        dq, dk, dv, de, db, ds = shaped
        return dq, dk, dv, de, db[..., 0], ds, dfades, None


class _Chunks(NamedTuple):
    """(I + A) U = diag(rate) (V − E S), with A the strict lower triangle of diag(rate) E Kᵀ."""

    before: Tensor  # S at the chunk's start
    end: Tensor  # after all chunks
    written: Tensor  # U
    inverse: Tensor  # (I + A)⁻¹
    erased: Tensor  # (I + A)⁻¹ diag(rate) E
    falling: Tensor  # K as far as it reaches the chunk's end


def _write(
    fade: Fade, k: Tensor, v: Tensor, erase: Tensor, rate: Tensor, running: Tensor
) -> _Chunks:
    rated = rate * erase
    pairs = fade.pairs(rated, k).tril_(-1)
    one = torch.eye(k.shape[1], dtype=k.dtype, device=k.device)
    inverse = torch.linalg.solve_triangular(pairs + one, one, upper=False)
    erased, written = torch.bmm(inverse, fade.rising(rated)), torch.bmm(inverse, rate * v)
    falling = fade.falling(k)
    before, end = _march(fade, erased, falling, torch.bmm(falling.mT, written), running)
    written.baddbmm_(erased, before, alpha=-1)
    return _Chunks(before, end, written, inverse, erased, falling)


def _march(
    fade: Fade, erased: Tensor, k: Tensor, new: Tensor, running: Tensor, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """S ← (total − KᵀW) S + N chunk by chunk: S before each and the last; reversed, transposed."""
    rows = running.shape[0]
    passing = torch.bmm(erased.mT, k) if reverse else torch.bmm(k.mT, erased)
    passing, new, total = (t.unflatten(0, (rows, -1)) for t in (passing.neg_(), new, fade.total))
    states, n = torch.empty_like(new), new.shape[1]
    for c in range(n - 1, -1, -1) if reverse else range(n):
        states[:, c] = running
        step = torch.baddbmm(new[:, c], passing[:, c], running)
        running = step.addcmul_(total[:, c], running)
    return states.flatten(0, 1), running
