"""Running sums of outer products, S_t = S_{t−1} + k_t v_tᵀ: at once, by chunk, or by token.

Within a chunk of C tokens the causal part is a masked C × C product; between chunks one D × V
state passes. Groups of chunks are worked on together, so that every temporary stays in cache and
memory beyond inputs and outputs is one state a group, forward and backward.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.shapes import Keys, Outputs, Queries, Values

# 64 rows keep a chunk's products square at D = 64; 16 chunks keep a group within the L2 cache.
CHUNK, GROUP = 64, 16


def total(q: Queries, k: Keys, v: Values) -> Outputs:
    """o_i = q_iᵀ Σ_s k_s v_sᵀ over all keys: bidirectional and cross; sums in at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        sums = k.to(wide).mT @ v.to(wide)
        return (q.to(wide) @ sums).to(q.dtype)


def outer(
    q: Queries, k: Keys, v: Values, state: Float[Tensor, "B H D V"] | None = None
) -> tuple[Outputs, Float[Tensor, "B H D V"]]:
    """o_t = q_tᵀ S_t with S_t = S_{t−1} + k_t v_tᵀ, and the last S.

    With S > L, the first S − L keys come before all queries. The state is at least float32
    whatever the inputs, under autocast too; `state=None` is zero.
    """
    with torch.autocast(q.device.type, enabled=False):
        return _outer(q, k, v, state)


def _outer(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=wide)
    if (earlier := k.shape[2] - q.shape[2]) > 0:
        state = state + k[:, :, :earlier].to(wide).mT @ v[:, :, :earlier].to(wide)
        k, v = k[:, :, earlier:], v[:, :, earlier:]
    if q.shape[2] == 1:
        state = state + k.to(wide).mT * v.to(wide)
        return (q.to(wide) @ state).to(q.dtype), state
    return _chunked(q, k, v, state)


def _groups(rows: int, length: int) -> Iterator[tuple[slice, list[tuple[int, int, int]]]]:
    """Rows (batch × heads) worked on together, with their spans (start, chunks, chunk)."""
    whole, rest = divmod(length, CHUNK)
    spans = [(g * CHUNK, min(GROUP, whole - g), CHUNK) for g in range(0, whole, GROUP)]
    if rest:
        spans.append((whole * CHUNK, 1, rest))
    together = max(1, GROUP // max(whole, 1))
    for start in range(0, rows, together):
        yield slice(start, min(start + together, rows)), spans


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        batch, heads, length, _ = q.shape
        flat = [t.reshape(batch * heads, *t.shape[2:]) for t in (q, k, v)]
        wide = state.dtype
        o = torch.empty_like(flat[2])
        final = torch.empty_like(state).flatten(0, 1)
        groups = -(-(length // CHUNK) // GROUP) + (length % CHUNK > 0)
        borders = state.new_empty(groups, *final.shape)
        for rows, spans in _groups(batch * heads, length):
            running = state.flatten(0, 1)[rows]
            for g, (start, n, chunk) in enumerate(spans):
                borders[g, rows] = running
                span = rows, slice(start, start + n * chunk)
                qs, ks, vs = (_split(t[span], n, chunk, wide) for t in flat)
                before, running = _states(ks, vs, running, n)
                inside = (qs @ ks.mT).tril_()
                out = torch.bmm(inside, vs).baddbmm_(qs, before)
                o[span] = out.view(-1, n * chunk, out.shape[-1])
            final[rows] = running
        ctx.save_for_backward(*flat, borders)
        ctx.heads = batch, heads
        return o.view(batch, heads, *o.shape[1:]), final.view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(do.device.type, enabled=False):
            return _Outer.gradients(ctx, do, dfinal)

    @staticmethod
    def gradients(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor, ...]:
        *flat, borders = ctx.saved_tensors
        wide = borders.dtype
        do = do.reshape(-1, *do.shape[2:])
        grads = [torch.empty_like(t) for t in flat]
        dstate = torch.empty_like(dfinal).flatten(0, 1)
        for rows, spans in _groups(do.shape[0], do.shape[1]):
            later = dfinal.flatten(0, 1)[rows]  # gradient of the state that leaves the group
            for g, (start, n, chunk) in reversed(list(enumerate(spans))):
                span = rows, slice(start, start + n * chunk)
                qs, ks, vs, ds = (_split(t[span], n, chunk, wide) for t in (*flat, do))
                before, _ = _states(ks, vs, borders[g, rows], n)
                # The same sums from the right: what reaches each chunk's state from later chunks.
                after, later = _states(qs, ds, later, n, reverse=True)
                inside, dinside = (qs @ ks.mT).tril_(), (ds @ vs.mT).tril_()
                dq = torch.bmm(ds, before.mT).baddbmm_(dinside, ks)
                dk = torch.bmm(vs, after.mT).baddbmm_(dinside.mT, qs)
                dv = torch.bmm(ks, after).baddbmm_(inside.mT, ds)
                for grad, part in zip(grads, (dq, dk, dv), strict=True):
                    grad[span] = part.view(-1, n * chunk, part.shape[-1])
            dstate[rows] = later
        shaped = [t.view(*ctx.heads, *t.shape[1:]) for t in (*grads, dstate)]
        return tuple(shaped)


def _split(t: Tensor, n: int, chunk: int, dtype: torch.dtype) -> Tensor:
    return t.reshape(t.shape[0] * n, chunk, t.shape[-1]).to(dtype)


def _states(
    a: Tensor, b: Tensor, running: Tensor, n: int, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Sums of aᵀb over the chunks before each (after each), and over all, added to `running`."""
    sums = torch.bmm(a.mT, b)
    if n == 1:
        return running, running + sums
    sums = sums.view(-1, n, sums.shape[1] * sums.shape[2])
    start = running.flatten(1)[:, None]
    ones = a.new_ones(n, n)
    # One small triangular product sums over chunks faster than a cumulative sum does.
    triangle = ones.triu(1) if reverse else ones.tril(-1)
    others = torch.matmul(triangle, sums).add_(start)
    end = others[:, 0] + sums[:, 0] if reverse else others[:, -1] + sums[:, -1]
    return others.view(-1, *running.shape[1:]), end.view_as(running)


# A Python loop over groups that dynamo would unroll: eager under torch.compile.
_chunked: Any = torch.compiler.disable(_Outer.apply)
