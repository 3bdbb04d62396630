"""Running, prefix and whole sums, each with a backward pass that computes its chunks again."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engines.average.chunks import (
    LOWEST,
    Segment,
    Sums,
    blocks,
    positive,
    segments,
    spans_of,
)

Keyed = Float[Tensor, "B H S D"]
Channels = Float[Tensor, "#H D"]


def running(
    k: Keyed,
    v: Keyed,
    state: Sums | None = None,
    *,
    decay: Channels | None = None,
    bonus: Channels | None = None,
) -> tuple[Keyed, Sums]:
    """o_t = Σ_{i≤t} exp(k_i − (t−i)·decay) v_i / Σ_{i≤t} exp(k_i − (t−i)·decay), and the last sums.

    With a `bonus`, o_t weighs token t by exp(k_t + bonus) and token i < t by
    exp(k_i − (t−1−i)·decay); the sums are the same. A key of −inf is no key; where there is none,
    o is 0. Computed and carried in at least float32, under autocast too.
    """
    with torch.autocast(k.device.type, enabled=False):
        start, rates = _started(k, state), _rates(k, decay)
        extra = None if bonus is None else bonus.to(start.total.dtype).expand(k.shape[1], -1)
        if k.shape[2] == 1:
            o, last = _step(k[:, :, 0], v[:, :, 0], start, rates, extra)
            return o[:, :, None].to(v.dtype), last
        if not k.numel():
            return torch.zeros_like(v), start
        o, *last = _running(k, v, *start, rates, extra)
        return o, Sums(*last)


def prefix(k: Keyed, v: Keyed, state: Sums | None = None) -> tuple[Sums, Sums]:
    """The sums over i ≤ t for every t, B H S D each, and the last of them.

    Raw material for `corrected`; the peaks carry no gradient.
    """
    with torch.autocast(k.device.type, enabled=False):
        start = _started(k, state)
        if not k.numel():
            return Sums(*(t.new_zeros(k.shape) for t in start)), start
        every = Sums(*_prefix(k, v, *start, _rates(k, None)))
        return every, Sums(*(t[:, :, -1] for t in every))


def pooled(k: Keyed, v: Keyed) -> Sums:
    """The sums over all keys, B H 1 D."""
    wide = torch.promote_types(k.dtype, torch.float32)
    with torch.autocast(k.device.type, enabled=False):
        if not k.shape[2]:
            nothing = k.new_zeros(*k.shape[:2], 1, k.shape[3], dtype=wide)
            return Sums(nothing, nothing, nothing)
        peak = k.detach().amax(2, keepdim=True).to(wide).clamp(min=LOWEST)
        total, weight = _pooled(k, v, peak)
        return Sums(total, weight, peak)


def quotient(sums: Sums) -> Tensor:
    """total / weight, and 0 where nothing was seen."""
    return sums.total / positive(sums.weight)


def _started(k: Tensor, state: Sums | None) -> Sums:
    wide = torch.promote_types(k.dtype, torch.float32)
    if state is None:
        nothing = k.new_zeros(k.shape[0], k.shape[1], k.shape[3], dtype=wide)
        return Sums(nothing, nothing, nothing + LOWEST)
    seen = state.weight > 0
    return Sums(state.total, state.weight, torch.where(seen, state.peak.detach(), LOWEST))


def _rates(k: Tensor, decay: Tensor | None) -> Tensor | None:
    if decay is None:
        return None
    wide = torch.promote_types(k.dtype, torch.float32)
    return decay.to(wide).expand(k.shape[1], -1)


def _step(
    k: Tensor, v: Tensor, before: Sums, decay: Tensor | None, bonus: Tensor | None
) -> tuple[Tensor, Sums]:
    """One token of the recurrence; k and v: B H D."""
    k, v = k.to(before.total.dtype), v.to(before.total.dtype)
    faded = before.peak if decay is None else before.peak - decay.detach()
    peak = torch.maximum(faded, k.detach())
    kept = before.peak - peak if decay is None else before.peak - decay - peak
    kept, new = kept.exp(), (k - peak).exp()
    after = Sums(kept * before.total + new * v, kept * before.weight + new, peak)
    if bonus is None:
        return quotient(after), after
    top = torch.maximum(before.peak, (k + bonus).detach())
    kept, new = (before.peak - top).exp(), (k + bonus - top).exp()
    return quotient(Sums(kept * before.total + new * v, kept * before.weight + new, top)), after


def _by_row(per_head: Tensor | None, batch: int) -> Tensor | None:
    return None if per_head is None else per_head.repeat(batch, 1)


class _Running(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, total: Tensor, weight: Tensor, peak: Tensor,
        decay: Tensor | None, bonus: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        batch, heads, length, _ = k.shape
        flat, state = (
            (k.flatten(0, 1), v.flatten(0, 1)),
            [t.flatten(0, 1) for t in (total, weight, peak)],
        )
        rates, extra = _by_row(decay, batch), _by_row(bonus, batch)
        o = torch.empty_like(v, memory_format=torch.contiguous_format).flatten(0, 1)
        borders = total.new_empty(len(segments(length)) + 1, 3, *state[0].shape)
        for rows, spans in blocks(*flat[0].shape):
            now = _sums(tuple(t[rows] for t in state))
            for i, span in enumerate(spans):
                borders[i, :, rows] = torch.stack(now)
                segment = Segment(flat[0][rows, span], flat[1][rows, span], now, _of(rates, rows))
                o[rows, span] = segment.flat(segment.averages(_of(extra, rows))[0]).to(o.dtype)
                now = segment.last()
            borders[-1, :, rows] = torch.stack(now)
        ctx.save_for_backward(k, v, decay, bonus, borders[:-1])
        last = [t.view(batch, heads, -1).clone() for t in borders[-1]]
        ctx.mark_non_differentiable(last[2])
        return (o.view(batch, heads, *o.shape[1:]), *last)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, do: Tensor, dtotal: Tensor, dweight: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        k, v, decay, bonus, borders = ctx.saved_tensors
        batch, heads = k.shape[:2]
        flat = k.flatten(0, 1), v.flatten(0, 1)
        rates, extra = _by_row(decay, batch), _by_row(bonus, batch)
        dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in flat)
        later = [dtotal.flatten(0, 1).clone(), dweight.flatten(0, 1).clone()]
        ddecay, dbonus = (None if t is None else torch.zeros_like(t) for t in (rates, extra))
        do = do.flatten(0, 1)
        for rows, spans in blocks(*flat[0].shape):
            for i in range(len(spans) - 1, -1, -1):
                span = rows, spans[i]
                now = _sums(borders[i, :, rows])
                s = Segment(flat[0][span], flat[1][span], now, _of(rates, rows))
                o, weight, old, new = s.averages(_of(extra, rows))
                up = s.folded(do[span]) / weight
                down = (up * o).neg_()
                totals, weights = torch.empty_like(s.total), torch.empty_like(s.weight)
                if extra is None:
                    totals[1:], weights[1:] = up, down
                    totals[0], weights[0] = 0, 0
                else:
                    torch.mul(old, up, out=totals[:-1])
                    torch.mul(old, down, out=weights[:-1])
                    totals[-1], weights[-1] = 0, 0
                s.place_last(totals, later[0][rows])
                s.place_last(weights, later[1][rows])
                totals, weights = s.adjoint(totals), s.adjoint(weights)
                gv = s.new * totals[1:]
                gk = torch.addcmul(gv * s.v, s.new, weights[1:])
                if dbonus is not None:
                    gv.addcmul_(new, up)
                    lifted = torch.addcmul(down, up, s.v).mul_(new)
                    gk += lifted
                    dbonus[rows] += lifted.sum(0).view(s.rows, s.n, -1).sum(1)
                if ddecay is not None:
                    faded = torch.addcmul(s.total[:-1] * totals[1:], s.weight[:-1], weights[1:])
                    ddecay[rows] -= (faded * s.fade).sum(0).view(s.rows, s.n, -1).sum(1)
                dk[span], dv[span] = s.flat(gk).to(dk.dtype), s.flat(gv).to(dv.dtype)
                for t, d in zip(later, (totals, weights), strict=True):
                    t[rows] = d[0].view(s.rows, s.n, -1)[:, 0]
        shaped = (t.view(batch, heads, *t.shape[1:]) for t in (dk, dv, *later))
        sums = (None if t is None else t.view(batch, heads, -1).sum(0) for t in (ddecay, dbonus))
        return (*shaped, None, *sums)


class _Prefix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, total: Tensor, weight: Tensor, peak: Tensor,
        decay: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        batch, heads, length, width = k.shape
        flat, state = (
            (k.flatten(0, 1), v.flatten(0, 1)),
            [t.flatten(0, 1) for t in (total, weight, peak)],
        )
        every = [total.new_empty(batch * heads, length, width) for _ in range(3)]
        borders = total.new_empty(len(segments(length)), 3, *state[0].shape)
        for rows, spans in blocks(*flat[0].shape):
            now = _sums(tuple(t[rows] for t in state))
            for i, span in enumerate(spans):
                borders[i, :, rows] = torch.stack(now)
                s = Segment(flat[0][rows, span], flat[1][rows, span], now, None)
                for t, part in zip(every, (s.total, s.weight, s.peak), strict=True):
                    t[rows, span] = s.flat(part[1:])
                now = s.last()
        ctx.save_for_backward(k, v, borders)
        out = tuple(t.view(batch, heads, length, width) for t in every)
        ctx.mark_non_differentiable(out[2])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dweight: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        k, v, borders = ctx.saved_tensors
        batch, heads = k.shape[:2]
        flat = k.flatten(0, 1), v.flatten(0, 1)
        dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in flat)
        later = [torch.zeros_like(borders[0, 0]) for _ in range(2)]
        for rows, spans in blocks(*flat[0].shape):
            for i in range(len(spans) - 1, -1, -1):
                span = rows, spans[i]
                s = Segment(flat[0][span], flat[1][span], _sums(borders[i, :, rows]), None)
                grads = []
                for given, after in zip((dtotal, dweight), later, strict=True):
                    d = F.pad(s.folded(given.flatten(0, 1)[span]), (0, 0, 0, 0, 1, 0))
                    s.place_last(d, after[rows])
                    grads.append(s.adjoint(d))
                    after[rows] = d[0].view(s.rows, s.n, -1)[:, 0]
                gv = s.new * grads[0][1:]
                gk = torch.addcmul(gv * s.v, s.new, grads[1][1:])
                dk[span], dv[span] = s.flat(gk).to(dk.dtype), s.flat(gv).to(dv.dtype)
        return (*(t.view(batch, heads, *t.shape[1:]) for t in (dk, dv, *later)), None, None)


def _sums(parts: Tensor | tuple[Tensor, ...]) -> Sums:
    return Sums(parts[0], parts[1], parts[2])


def _of(per_row: Tensor | None, rows: slice) -> Tensor | None:
    return None if per_row is None else per_row[rows]


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
        total, weight = torch.zeros_like(peak), torch.zeros_like(peak)
        for span in spans_of(k):
            new = (k[:, :, span] - peak).exp_()
            weight += new.sum(2, keepdim=True)
            total += new.mul_(v[:, :, span]).sum(2, keepdim=True)
        ctx.save_for_backward(k, v, peak)
        return total, weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dweight: Tensor) -> tuple[Tensor | None, ...]:
        k, v, peak = ctx.saved_tensors
        dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k, v))
        for span in spans_of(k):
            new = (k[:, :, span] - peak).exp_()
            dk[:, :, span] = torch.addcmul(dweight, dtotal, v[:, :, span].to(new)).mul_(new)
            dv[:, :, span] = new.mul_(dtotal)
        return dk, dv, None


# Python loops that dynamo would unroll: eager under torch.compile.
_running: Any = torch.compiler.disable(_Running.apply)
_prefix: Any = torch.compiler.disable(_Prefix.apply)
_pooled: Any = torch.compiler.disable(_Pooled.apply)
