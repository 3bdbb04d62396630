"""Running sums of outer products, S_t = a_t S_{t−1} + k_t v_tᵀ: at once, by chunk, or by token.

Within a chunk of C tokens the causal part is a masked C × C product; between chunks one D × V
state passes. Groups of chunks are worked on together, so that every temporary stays in cache and
memory beyond inputs and outputs is one state a group, forward and backward. Decays enter as
exponentials of differences that are never positive, so that none overflows. The delta rule, whose
states pass through a D × D matrix a chunk, has the same form after its triangular solve (WY).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
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
    q: Queries,
    k: Keys,
    v: Values,
    state: Float[Tensor, "B H D V"] | None = None,
    *,
    decay: Float[Tensor, " H"] | Float[Tensor, "B H S"] | None = None,
) -> tuple[Outputs, Float[Tensor, "B H D V"]]:
    """o_t = q_tᵀ S_t with S_t = exp(decay_t) S_{t−1} + k_t v_tᵀ, and the last S.

    With S > L, the first S − L keys come before all queries. The state is at least float32
    whatever the inputs, under autocast too; `state=None` is zero. `decay` is a finite logarithm,
    at most 0, of a head or of a head and token; None is no decay.
    """
    with torch.autocast(q.device.type, enabled=False):
        return _outer(q, k, v, state, decay)


def delta(
    q: Queries,
    k: Keys,
    v: Values,
    rate: Float[Tensor, "B H S"],
    state: Float[Tensor, "B H D V"] | None = None,
    *,
    erase: Keys | None = None,
) -> tuple[Outputs, Float[Tensor, "B H D V"]]:
    """o_t = q_tᵀ S_t with S_t = S_{t−1} + rate_t k_t (v_t − S_{t−1}ᵀ e_t)ᵀ, and the last S.

    e is `erase`, by default k: the delta rule, which replaces what k_t retrieves by v_t. With
    S > L, the first S − L keys come before all queries. The state is at least float32. Within a
    chunk, (I + A) U = diag(rate) (V − E S) with A the strict lower triangle of diag(rate) E Kᵀ.
    """
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        if state is None:
            state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=wide)
        erase = k if erase is None else erase
        if k.shape[2] == q.shape[2] == 1:
            error = rate.to(wide)[..., None] * (v.to(wide) - erase.to(wide) @ state)
            state = state + k.to(wide).mT * error
            return (q.to(wide) @ state).to(q.dtype), state
        earlier = k.shape[2] - q.shape[2]
        padded = F.pad(q, (0, 0, earlier, 0))
        o, last = _delta(padded, k, v, erase, rate.to(wide), state)
        return o[:, :, earlier:], last


def _outer(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=wide)
    if decay is not None:
        decay = decay.to(wide)
        decay = decay[:, None].expand(k.shape[:3]) if decay.dim() == 1 else decay
    if (earlier := k.shape[2] - q.shape[2]) > 0:
        first, before = k[:, :, :earlier].to(wide), 1.0
        if decay is not None:
            fall = decay[:, :, :earlier].cumsum(-1)
            before = fall[..., -1:, None].exp()
            first = first * (fall[..., -1:] - fall).exp()[..., None]
            decay = decay[:, :, earlier:]
        state = state * before + first.mT @ v[:, :, :earlier].to(wide)
        k, v = k[:, :, earlier:], v[:, :, earlier:]
    if q.shape[2] == 1:
        state = state if decay is None else state * decay[..., None].exp()
        state = state + k.to(wide).mT * v.to(wide)
        return (q.to(wide) @ state).to(q.dtype), state
    return _chunked(q, k, v, state, decay)


def _groups(rows: int, length: int) -> Iterator[tuple[slice, list[tuple[int, int, int]]]]:
    """Rows (batch × heads) worked on together, with their spans (start, chunks, chunk)."""
    whole, rest = divmod(length, CHUNK)
    spans = [(g * CHUNK, min(GROUP, whole - g), CHUNK) for g in range(0, whole, GROUP)]
    if rest:
        spans.append((whole * CHUNK, 1, rest))
    together = max(1, GROUP // max(whole, 1))
    for start in range(0, rows, together):
        yield slice(start, min(start + together, rows)), spans


def _borders(state: Tensor, length: int) -> Tensor:
    """Room for the state before every span and after the last, which starts as `state`."""
    spans = -(-(length // CHUNK) // GROUP) + (length % CHUNK > 0)
    borders = state.new_empty(spans + 1, *state.flatten(0, 1).shape)
    borders[0] = state.flatten(0, 1)
    return borders


class _Decays:
    """The exponentials of one span: inside a chunk, to its end, from its start, between chunks."""

    def __init__(self, decay: Tensor | None, n: int, like: Tensor) -> None:
        # Most spans of a running maximum do not decay; looking is free where it needs no sync.
        still = decay is None or (decay.device.type == "cpu" and not decay.any())
        self.free = still
        if decay is None or still:
            self.passing = like.new_ones(1, n + 1, n + 1).tril_()
            return
        sums = decay.reshape(-1, decay.shape[-1] // n).cumsum(-1)  # rows·n C
        self.rise, self.fall = sums.exp()[..., None], (sums[:, -1:] - sums).exp()[..., None]
        self.pairs = _differences(sums)
        self.passing = _differences(F.pad(sums[:, -1].view(-1, n).cumsum(-1), (1, 0)))

    def rising(self, t: Tensor) -> Tensor:
        return t if self.free else t * self.rise

    def falling(self, t: Tensor) -> Tensor:
        return t if self.free else t * self.fall

    def inside(self, scores: Tensor) -> Tensor:
        return scores.tril_() if self.free else scores.mul_(self.pairs)


def _differences(sums: Tensor) -> Tensor:
    """exp(s_i − s_j) for j ≤ i, else 0."""
    later = torch.ones(sums.shape[-1], sums.shape[-1], dtype=torch.bool, device=sums.device)
    return (sums[..., :, None] - sums[..., None, :]).masked_fill_(later.triu_(1), -torch.inf).exp_()


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        flat = [t.flatten(0, 1) for t in (q, k, v)]
        fades = None if decay is None else decay.flatten(0, 1)
        wide = state.dtype
        o, borders = torch.empty_like(flat[2]), _borders(state, q.shape[2])
        for rows, spans in _groups(*o.shape[:2]):
            for g, (start, n, chunk) in enumerate(spans):
                span = rows, slice(start, start + n * chunk)
                qs, ks, vs = (_split(t[span], n, chunk, wide) for t in flat)
                fade = _Decays(None if fades is None else fades[span], n, qs)
                before, borders[g + 1, rows] = _states(fade, fade.falling(ks), vs, borders[g, rows])
                out = torch.bmm(fade.inside(qs @ ks.mT), vs).baddbmm_(fade.rising(qs), before)
                o[span] = out.view(-1, n * chunk, out.shape[-1])
        ctx.save_for_backward(*flat, borders[:-1], fades)
        ctx.heads = q.shape[:2]
        return o.view(v.shape), borders[-1].clone().view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(do.device.type, enabled=False):
            return _Outer.gradients(ctx, do, dfinal)

    @staticmethod
    def gradients(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        *flat, borders, fades = ctx.saved_tensors
        wide = borders.dtype
        do = do.flatten(0, 1)
        grads = [torch.empty_like(t) for t in flat]
        dstate = dfinal.flatten(0, 1).clone()
        dfades = torch.empty_like(fades) if ctx.needs_input_grad[4] else None
        for rows, spans in _groups(do.shape[0], do.shape[1]):
            later = dstate[rows]  # gradient of the state that leaves the group
            for g, (start, n, chunk) in reversed(list(enumerate(spans))):
                span = rows, slice(start, start + n * chunk)
                qs, ks, vs, ds = (_split(t[span], n, chunk, wide) for t in (*flat, do))
                fade = _Decays(None if fades is None else fades[span], n, qs)
                falling, end = fade.falling(ks), later
                before, last = _states(fade, falling, vs, borders[g, rows])
                # The same sums from the right: what reaches each chunk's state from later chunks.
                after, later = _states(fade, fade.rising(qs), ds, later, reverse=True)
                inside, dinside = fade.inside(qs @ ks.mT), fade.inside(ds @ vs.mT)
                dq = fade.rising(torch.bmm(ds, before.mT)).baddbmm_(dinside, ks)
                dk = fade.falling(torch.bmm(vs, after.mT)).baddbmm_(dinside.mT, qs)
                dv = torch.bmm(falling, after).baddbmm_(inside.mT, ds)
                for grad, part in zip(grads, (dq, dk, dv), strict=True):
                    grad[span] = part.view(-1, n * chunk, part.shape[-1])
                if dfades is not None:
                    # A decay scales all that later tokens take from earlier ones, and the end.
                    taken = ((qs * dq).sum(-1) - (ks * dk).sum(-1)).view(-1, n * chunk)
                    left = (last * end).sum((1, 2))[:, None]
                    dfades[span] = taken.flip(-1).cumsum(-1).flip(-1) + left
            dstate[rows] = later
        shaped = [t.view(*ctx.heads, *t.shape[1:]) for t in (*grads, dstate)]
        return (*shaped, None if dfades is None else dfades.view(*ctx.heads, do.shape[1]))


def _split(t: Tensor, n: int, chunk: int, dtype: torch.dtype) -> Tensor:
    return t.reshape(t.shape[0] * n, chunk, t.shape[-1]).to(dtype)


def _states(
    fade: _Decays, a: Tensor, b: Tensor, running: Tensor, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Decayed sums of aᵀb over the chunks before each (after each), and over all, from `running`.

    One small triangular product sums over chunks faster than a cumulative sum does.
    """
    passing = fade.passing.mT if reverse else fade.passing
    n, rows, shape = passing.shape[-1] - 1, running.shape[0], running.shape[1:]
    sums = torch.bmm(a.mT, b).view(rows, n, -1)
    start = running.reshape(rows, 1, -1)
    if reverse:
        every = torch.matmul(passing[..., :n], sums).addcmul_(passing[..., n:], start)
        return every[:, 1:].reshape(-1, *shape), every[:, 0].view_as(running)
    every = torch.matmul(passing[..., 1:], sums).addcmul_(passing[..., :1], start)
    return every[:, :n].reshape(-1, *shape), every[:, n].view_as(running)


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, erase: Tensor, rate: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        flat = [t.flatten(0, 1) for t in (q, k, v, erase, rate[..., None])]
        o, borders = torch.empty_like(flat[2]), _borders(state, q.shape[2])
        for rows, spans in _groups(*o.shape[:2]):
            for g, (start, n, chunk) in enumerate(spans):
                span = rows, slice(start, start + n * chunk)
                qs, ks, vs, es, bs = (_split(t[span], n, chunk, state.dtype) for t in flat)
                before, borders[g + 1, rows], written, _, _ = _written(
                    ks, vs, es, bs, borders[g, rows]
                )
                out = torch.bmm((qs @ ks.mT).tril_(), written).baddbmm_(qs, before)
                o[span] = out.view(-1, n * chunk, out.shape[-1])
        ctx.save_for_backward(*flat, borders[:-1])
        ctx.heads = q.shape[:2]
        return o.view(v.shape), borders[-1].clone().view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(do.device.type, enabled=False):
            return _Delta.gradients(ctx, do, dfinal)

    @staticmethod
    def gradients(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor, ...]:
        *flat, borders = ctx.saved_tensors
        do = do.flatten(0, 1)
        grads = [torch.empty_like(t) for t in flat]
        dstate = dfinal.flatten(0, 1).clone()
        for rows, spans in _groups(*do.shape[:2]):
            later = dstate[rows]
            for g, (start, n, chunk) in reversed(list(enumerate(spans))):
                span = rows, slice(start, start + n * chunk)
                parts = (_split(t[span], n, chunk, borders.dtype) for t in (*flat, do))
                qs, ks, vs, es, bs, ds = parts
                before, _, written, inverse, erased = _written(ks, vs, es, bs, borders[g, rows])
                dwritten = torch.bmm((qs @ ks.mT).tril_().mT, ds)
                direct = torch.bmm(qs.mT, ds).baddbmm_(erased.mT, dwritten, alpha=-1)
                after, later = _march(erased, ks, direct, later, reverse=True)
                dwritten.baddbmm_(ks, after)
                # (I + A) U = diag(rate) (V − E S) for given dU: the transposed system.
                y = torch.bmm(inverse.mT, dwritten)
                dv = bs * y
                weights = torch.bmm(dv, written.mT).tril_(-1)
                dinside = torch.bmm(ds, written.mT).tril_()
                dq = torch.bmm(ds, before.mT).baddbmm_(dinside, ks)
                de = torch.bmm(dv, before.mT).baddbmm_(weights, ks).neg_()
                dk = torch.bmm(written, after.mT).baddbmm_(dinside.mT, qs)
                dk.baddbmm_(weights.mT, es, alpha=-1)
                error = torch.baddbmm(vs, es, before, alpha=-1)
                error.baddbmm_((es @ ks.mT).tril_(-1), written, alpha=-1)
                db = (y * error).sum(-1, keepdim=True)
                for grad, part in zip(grads, (dq, dk, dv, de, db), strict=True):
                    grad[span] = part.view(-1, n * chunk, part.shape[-1])
            dstate[rows] = later
        dq, dk, dv, de, db, ds = (t.view(*ctx.heads, *t.shape[1:]) for t in (*grads, dstate))
        return dq, dk, dv, de, db[..., 0], ds


def _written(
    k: Tensor, v: Tensor, erase: Tensor, rate: Tensor, running: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """States before each chunk and after all, U, (I + A)⁻¹ and (I + A)⁻¹ diag(rate) E."""
    pairs = torch.bmm(rate * erase, k.mT)
    one = torch.eye(k.shape[1], dtype=k.dtype, device=k.device)
    inverse = torch.linalg.solve_triangular(pairs.tril_(-1) + one, one, upper=False)
    erased, written = torch.bmm(inverse, rate * erase), torch.bmm(inverse, rate * v)
    before, end = _march(erased, k, torch.bmm(k.mT, written), running)
    return before, end, written.baddbmm_(erased, before, alpha=-1), inverse, erased


def _march(
    erased: Tensor, k: Tensor, new: Tensor, running: Tensor, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """S ← (I − KᵀW) S + N chunk by chunk: S before each and the last; reversed, its transpose."""
    rows = running.shape[0]
    passing = torch.bmm(erased.mT, k) if reverse else torch.bmm(k.mT, erased)
    passing = passing.neg_().unflatten(0, (rows, -1))
    new = new.unflatten(0, (rows, -1))
    states, n = torch.empty_like(new), new.shape[1]
    for c in range(n - 1, -1, -1) if reverse else range(n):
        states[:, c] = running
        running = torch.baddbmm(new[:, c], passing[:, c], running).add_(running)
    return states.flatten(0, 1), running


# Python loops over groups that dynamo would unroll: eager under torch.compile.
_chunked: Any = torch.compiler.disable(_Outer.apply)
_delta: Any = torch.compiler.disable(_Delta.apply)
