"""Averages with exponential weights, o = Σ exp(k) v / Σ exp(k), channel by channel.

Every sum is kept relative to its largest exponent so far, its peak, as total · exp(peak): nothing
overflows, and causally the peak looks at no later token. The quotient does not depend on the
peaks, so they are constants to every gradient.

A causal sum is a recurrence in each channel, F ← f·F + x. A segment of it is worked on as N chunks
of C tokens side by side: sums over chunks, a recurrence over N chunks, then one over C tokens. What
a segment computes is computed again in the backward pass, so that memory beyond inputs and outputs
is one state a segment.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.errors import LongspanError

# Tokens a segment, and elements of one temporary: 1 MiB in float32 stays in a core's cache.
SEGMENT, ELEMENTS = 1024, 1 << 18
# Below every exponent and finite: exp(−inf − LOWEST) is 0 where exp(−inf + inf) is undefined.
LOWEST = -1e30

Keyed = Float[Tensor, "B H S D"]
Channels = Float[Tensor, "#H D"]


class Sums(NamedTuple):
    """Σ exp(k) v and Σ exp(k), both divided by exp(peak); a row of zeros has seen nothing."""

    total: Float[Tensor, "B H *L D"]
    weight: Float[Tensor, "B H *L D"]
    peak: Float[Tensor, "B H *L D"]


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
    return sums.total / _positive(sums.weight)


def biases(w: Float[Tensor, "*shape J"]) -> tuple[Tensor, Tensor]:
    """Factors c and scale g with c / g = exp(w) − 1, neither ever overflowing.

    g = exp(−max(w, 0)) over the last axis, constant to the gradient.
    """
    with torch.autocast(w.device.type, enabled=False):
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        peak = w.detach().amax(-1, keepdim=True).clamp(min=0)
        above, below = w.clamp(min=0), w.clamp(max=0)
        above = torch.where(w > 0, above, torch.zeros_like(above))
        factors = -torch.expm1(-above) * (above - peak).exp() + torch.expm1(below) * (-peak).exp()
        return factors, (-peak).exp()[..., 0]


def corrected(
    k: Keyed,
    v: Keyed,
    sums: Sums,
    factors: Float[Tensor, "#B #H #L J"],
    scale: Float[Tensor, "#B #H #L"] | None,
    offsets: Sequence[int],
    *,
    queries: int | None = None,
) -> Float[Tensor, "B H L D"]:
    """o_t = (g_t Σ_t + Σ_j c_tj e_j v_j) / (g_t Σ'_t + Σ_j c_tj e_j), e_j = exp(k_j − peak_t).

    Σ and Σ' are the total and weight of `sums`; c_tj = factors[t, j] belongs to the key
    `offsets[j]` places after token t, and g is `scale`, 1 where None. The tokens
    are the last `queries` keys, by default all; keys beyond either end do not exist.

    Where c = exp(w) − 1 of a very negative w nearly cancels all the weight there is, log₂ exp(−w)
    bits are lost, as in the formula.
    """
    with torch.autocast(k.device.type, enabled=False):
        total, weight, peak = sums
        if scale is not None:
            total, weight = total * scale[..., None], weight * scale[..., None]
        length = k.shape[2] if queries is None else queries
        return _corrected(k, v, total, weight, peak, factors, tuple(offsets), length)


def positioned(
    k: Keyed, v: Keyed, w: Float[Tensor, "#B L S"], *, causal: bool = False, block: int = 64
) -> Float[Tensor, "B H L D"]:
    """o_t = Σ_s exp(k_s + w_ts) v_s / Σ_s exp(k_s + w_ts) by matrix products, O(L S) in memory.

    Causally the last query stands at the last key. A block of queries then meets the keys before
    the block in one product, relative to the largest of them, and the block's own key by key.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    with torch.autocast(k.device.type, enabled=False):
        queries, keys = w.shape[-2:]
        earlier = keys - queries
        w, k = w.to(wide), k.to(wide)
        if causal:
            w = w.masked_fill(
                w.new_ones(queries, keys, dtype=torch.bool).triu(1 + earlier), -torch.inf
            )
        w = (w - w.detach().amax(-1, keepdim=True)).exp()
        if not causal:
            peak = k.detach().amax(2, keepdim=True).clamp(min=LOWEST)
            return quotient(_product(w, k, v, peak)).to(v.dtype)
        peaks = k.detach().cummax(2).values.clamp(min=LOWEST)
        outs = []
        for start in range(0, queries, block):
            rows, at = slice(start, min(start + block, queries)), start + earlier
            own = slice(at, at + rows.stop - start)
            before = (
                peaks[:, :, max(at - 1, 0) : max(at, 1)] if at else peaks[:, :, :1] * 0 + LOWEST
            )
            sums = _product(w[:, rows, :at], k[:, :, :at], v[:, :, :at], before)
            fade = (before - peaks[:, :, own]).exp()
            sums = Sums(sums.total * fade, sums.weight * fade, peaks[:, :, own])
            size = own.stop - own.start
            # The block's own weights by distance: place j holds the key size − 1 − j before.
            places = torch.arange(size, device=k.device)
            back = (places[:, None] + places - (size - 1)).clamp(min=0)
            near = w[:, rows, own].gather(2, back.expand(len(w), -1, -1))
            offsets = range(1 - size, 1)
            outs.append(corrected(k[:, :, own], v[:, :, own], sums, near[:, None], None, offsets))
        return torch.cat(outs, 2) if outs else v[:, :, :0]


def reordered(t: Float[Tensor, "B H S D"], order: Int[Tensor, "B R"]) -> Float[Tensor, "B H R D"]:
    """The tokens order[b] of every row b."""
    batch, heads, length, width = t.shape
    row = torch.arange(batch * heads, device=t.device).view(batch, heads, 1) * length
    places = (row + order[:, None]).flatten()
    picked = t.reshape(-1, width).index_select(0, places)
    return picked.view(batch, heads, order.shape[1], width)


def latest(
    t: Float[Tensor, "B H S D"], count: int, unused: Int[Tensor, "B"] | None = None
) -> Float[Tensor, "B H C D"]:
    """The last `count` tokens before each row's `unused` ones; zeros before the first."""
    length = t.shape[2]
    if unused is None:
        return F.pad(t[:, :, max(length - count, 0) :], (0, 0, max(count - length, 0), 0))
    places = torch.arange(count, device=t.device) + length - unused[:, None]
    return reordered(F.pad(t, (0, 0, count, 0)), places)


def shifted(
    x: Float[Tensor, "B L E"], last: Float[Tensor, "B E"] | None
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E"]]:
    """The token before each, `last` (or 0) before the first; and the last token."""
    first = x.new_zeros(len(x), x.shape[2]) if last is None else last.to(x.dtype)
    every = torch.cat([first[:, None], x], 1)
    return every[:, :-1], every[:, -1]


def refuse_others(name: str, context: Any, marks: Any) -> None:
    """Refuse what a recurrence over one sequence cannot take."""
    if context is not None or marks is not None:
        raise LongspanError(
            f"{name} mixes one sequence, all of its tokens alike, and got a context or marks: "
            "leave them out, or use an attention (longspan.find(mode='cross'))."
        )


def _product(w: Tensor, k: Tensor, v: Tensor, peak: Tensor) -> Sums:
    new, heads = (k - peak).exp(), k.shape[1]
    both = torch.cat([new * v, new], dim=1)
    sums = w @ rearrange(both, "B H S D -> B S (H D)")
    total, weight = rearrange(sums, "B L (T H D) -> T B H L D", T=2, H=heads)
    return Sums(total, weight, peak)


def _positive(weight: Tensor) -> Tensor:
    return weight.clamp(min=torch.finfo(weight.dtype).tiny)


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


class _Segment:
    """Tokens start … stop of some rows, laid out as C × (rows · N) × D, and their sums.

    `total`, `weight`, `peak` have C + 1 places: place 0 is what a chunk starts from.
    """

    def __init__(self, k: Tensor, v: Tensor, before: Sums, decay: Tensor | None) -> None:
        rows, self.length, width = k.shape
        self.rows, self.wide = rows, before.total.dtype
        self.c = math.ceil(math.sqrt(self.length))
        self.n = -(-self.length // self.c)
        self.k, self.v = self.folded(k, -math.inf), self.folded(v)
        places = self.c + 1, rows * self.n, width
        self.total, self.weight, self.peak = (self.k.new_empty(places) for _ in range(3))
        self.decay: Tensor | None = None
        if decay is not None:
            self.decay = decay[:, None].expand(rows, self.n, width).reshape(-1, width)
        self._start(before)
        for c in range(self.c):
            faded = self.peak[c] if self.decay is None else self.peak[c] - self.decay
            torch.maximum(faded, self.k[c], out=self.peak[c + 1])
        self.fade = self.peak[:-1] - self.peak[1:]
        if self.decay is not None:
            self.fade -= self.decay
        self.fade.exp_()
        self.new = (self.k - self.peak[1:]).exp_()
        torch.mul(self.new, self.v, out=self.total[1:])
        self.weight[1:] = self.new
        for c in range(self.c):
            self.total[c + 1].addcmul_(self.fade[c], self.total[c])
            self.weight[c + 1].addcmul_(self.fade[c], self.weight[c])

    def folded(self, t: Tensor, fill: float = 0.0) -> Tensor:
        """rows × tokens × D → C × (rows · N) × D, missing tokens filled."""
        missing = self.n * self.c - t.shape[1]
        t = F.pad(t.to(self.wide), (0, 0, 0, missing), value=fill) if missing else t.to(self.wide)
        t = t.view(self.rows, self.n, self.c, -1).permute(2, 0, 1, 3)
        return t.reshape(self.c, self.rows * self.n, -1)

    def flat(self, t: Tensor) -> Tensor:
        """C × (rows · N) × D → rows × tokens × D."""
        t = t.view(self.c, self.rows, self.n, -1).permute(1, 2, 0, 3)
        return t.reshape(self.rows, self.n * self.c, -1)[:, : self.length]

    def last(self) -> Sums:
        """The sums after the last token, rows × D."""
        chunk, place = divmod(self.length - 1, self.c)
        return Sums(
            *(
                t[place + 1].view(self.rows, self.n, -1)[:, chunk]
                for t in (self.total, self.weight, self.peak)
            )
        )

    def _start(self, before: Sums) -> None:
        """Fill place 0: the sums that each chunk starts from."""
        ages = None
        if self.decay is not None:
            ages = torch.arange(self.c - 1, -1, -1, device=self.k.device, dtype=self.wide)
            ages = ages[:, None, None] * self.decay
        aged = self.k if ages is None else self.k - ages
        peak = aged.amax(0).clamp_(min=LOWEST)
        new = (aged - peak).exp_()
        parts = (new * self.v).sum(0), new.sum(0), peak
        totals, weights, peaks = (t.view(self.rows, self.n, -1) for t in parts)
        first = [t[0].view(self.rows, self.n, -1) for t in (self.total, self.weight, self.peak)]
        total, weight, peak = before
        passing = None
        if self.decay is not None:
            passing = self.c * self.decay.view(self.rows, self.n, -1)[:, 0]
        for n in range(self.n):
            for place, now in zip(first, (total, weight, peak), strict=True):
                place[:, n] = now
            old = peak if passing is None else peak - passing
            peak = torch.maximum(old, peaks[:, n])
            kept, new = (old - peak).exp_(), (peaks[:, n] - peak).exp_()
            total = torch.addcmul(totals[:, n] * new, kept, total)
            weight = torch.addcmul(weights[:, n] * new, kept, weight)

    def adjoint(self, d: Tensor) -> Tensor:
        """From gradients of the places of a sum (in place), those of all that leads to them."""
        spans = self.peak[:1] - self.peak
        if self.decay is not None:
            places = torch.arange(self.c + 1, device=self.k.device, dtype=self.wide)
            spans -= places[:, None, None] * self.decay
        spans.exp_()
        local = (spans * d).sum(0).view(self.rows, self.n, -1)
        across = spans[-1].view(self.rows, self.n, -1)
        ends = d[-1].view(self.rows, self.n, -1)
        later = torch.zeros_like(local[:, 0])
        for n in range(self.n - 1, -1, -1):
            ends[:, n] += later
            later = torch.addcmul(local[:, n], across[:, n], later)
        for c in range(self.c - 1, -1, -1):
            d[c].addcmul_(self.fade[c], d[c + 1])
        return d

    def place_last(self, d: Tensor, value: Tensor) -> None:
        """Add the gradient of the last sum to its place."""
        chunk, place = divmod(self.length - 1, self.c)
        d[place + 1].view(self.rows, self.n, -1)[:, chunk] += value

    def averages(self, bonus: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(o, weight, share of the sums before, share of the token), C × (rows · N) × D each."""
        if bonus is None:
            weight = _positive(self.weight[1:])
            return self.total[1:] / weight, weight, weight, weight
        bonus = bonus[:, None].expand(-1, self.n, -1).reshape(self.k.shape[1:])
        lifted = self.k + bonus
        top = torch.maximum(self.peak[:-1], lifted)
        old, new = (self.peak[:-1] - top).exp_(), (lifted - top).exp_()
        weight = _positive(torch.addcmul(new, old, self.weight[:-1]))
        o = torch.addcmul(new * self.v, old, self.total[:-1]) / weight
        return o, weight, old, new


def _blocks(batch_heads: int, length: int, width: int) -> Iterator[tuple[slice, list[slice]]]:
    """Rows worked on together, with their segments of tokens."""
    together = max(1, ELEMENTS // (min(length, SEGMENT) * max(width, 1)))
    spans = [slice(s, min(s + SEGMENT, length)) for s in range(0, length, SEGMENT)]
    for start in range(0, batch_heads, together):
        yield slice(start, min(start + together, batch_heads)), spans


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
        segments = -(-length // SEGMENT)
        borders = total.new_empty(segments + 1, 3, *state[0].shape)
        for rows, spans in _blocks(*flat[0].shape):
            now = _sums(tuple(t[rows] for t in state))
            for i, span in enumerate(spans):
                borders[i, :, rows] = torch.stack(now)
                segment = _Segment(flat[0][rows, span], flat[1][rows, span], now, _of(rates, rows))
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
        for rows, spans in _blocks(*flat[0].shape):
            for i in range(len(spans) - 1, -1, -1):
                span = rows, spans[i]
                now = _sums(borders[i, :, rows])
                s = _Segment(flat[0][span], flat[1][span], now, _of(rates, rows))
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
        borders = total.new_empty(-(-length // SEGMENT), 3, *state[0].shape)
        for rows, spans in _blocks(*flat[0].shape):
            now = _sums(tuple(t[rows] for t in state))
            for i, span in enumerate(spans):
                borders[i, :, rows] = torch.stack(now)
                s = _Segment(flat[0][rows, span], flat[1][rows, span], now, None)
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
        for rows, spans in _blocks(*flat[0].shape):
            for i in range(len(spans) - 1, -1, -1):
                span = rows, spans[i]
                s = _Segment(flat[0][span], flat[1][span], _sums(borders[i, :, rows]), None)
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
        for span in _spans(k):
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
        for span in _spans(k):
            new = (k[:, :, span] - peak).exp_()
            dk[:, :, span] = torch.addcmul(dweight, dtotal, v[:, :, span].to(new)).mul_(new)
            dv[:, :, span] = new.mul_(dtotal)
        return dk, dv, None


def _spans(k: Tensor) -> Iterator[slice]:
    """Tokens worked on together, all rows at once."""
    size = max(256, ELEMENTS // max(k.shape[0] * k.shape[1] * k.shape[3], 1))
    for start in range(0, k.shape[2], size):
        yield slice(start, min(start + size, k.shape[2]))


class _Corrected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, total: Tensor, weight: Tensor, peak: Tensor,
        factors: Tensor, offsets: tuple[int, ...], length: int,
    ) -> Tensor:  # fmt: skip
        o = v.new_empty(*v.shape[:2], length, v.shape[3])
        for span in _spans(o):
            up, down = _terms(k, v, total, weight, peak, factors, offsets, span, length)
            o[:, :, span] = up / _signed(down)
        ctx.save_for_backward(k, v, total, weight, peak, factors)
        ctx.offsets, ctx.length = offsets, length
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        k, v, total, weight, peak, factors = ctx.saved_tensors
        wide, length = total.dtype, ctx.length
        dk, dv = (torch.zeros_like(t, dtype=wide) for t in (k, v))
        dtotal, dweight = torch.zeros_like(total), torch.zeros_like(weight)
        dfactors = torch.zeros_like(factors)
        for span in _spans(do):
            up, down = _terms(k, v, total, weight, peak, factors, ctx.offsets, span, length)
            down = _signed(down)
            dup = do[:, :, span].to(wide) / down
            ddown = (up / down).mul_(dup).neg_()
            for d, given in ((dtotal, dup), (dweight, ddown)):
                part = _along(d, span)
                part += given.sum_to_size(part.shape)
            for j, (here, there) in _taps(ctx.offsets, span, k.shape[2], length):
                new = _new(k, peak, span, here, there)
                c = _along(factors, span, here)[..., j, None]
                values = v[:, :, there].to(wide)
                dv[:, :, there] += (new * dup[:, :, here]).mul_(c)
                felt = torch.addcmul(ddown[:, :, here], dup[:, :, here], values).mul_(new)
                dc = _along(dfactors, span, here)[..., j]
                dc += felt.sum(-1).sum_to_size(dc.shape)
                dk[:, :, there] += felt.mul_(c)
        return dk.to(k.dtype), dv.to(v.dtype), dtotal, dweight, None, dfactors, None, None


def _terms(
    k: Tensor, v: Tensor, total: Tensor, weight: Tensor, peak: Tensor, factors: Tensor,
    offsets: tuple[int, ...], span: slice, length: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Numerator and denominator of the tokens of one span."""
    shape = *k.shape[:2], span.stop - span.start, k.shape[3]
    up, down = (_along(t, span).expand(shape).clone() for t in (total, weight))
    for j, (here, there) in _taps(offsets, span, k.shape[2], length):
        new = _new(k, peak, span, here, there).mul_(_along(factors, span, here)[..., j, None])
        down[:, :, here] += new
        up[:, :, here] += new.mul_(v[:, :, there])
    return up, down


def _new(k: Tensor, peak: Tensor, span: slice, here: slice, there: slice) -> Tensor:
    return (k[:, :, there] - _along(peak, span, here)).exp_()


def _signed(down: Tensor) -> Tensor:
    """The denominator, kept from exact 0 where a row sees nothing."""
    return torch.where(down == 0, torch.finfo(down.dtype).tiny, down)


def _along(t: Tensor, span: slice, here: slice | None = None) -> Tensor:
    """The tokens of a span, and of those some, where `t` has tokens at all."""
    if t.shape[2] == 1:
        return t
    t = t[:, :, span]
    return t if here is None else t[:, :, here]


def _taps(
    offsets: tuple[int, ...], span: slice, keys: int, length: int
) -> Iterator[tuple[int, tuple[slice, slice]]]:
    """For every offset that has any: which tokens of the span have a key there, and the keys."""
    for j, offset in enumerate(offsets):
        shift = keys - length + offset
        first = max(span.start, -shift)
        last = min(span.stop, keys - shift)
        if first < last:
            here = slice(first - span.start, last - span.start)
            yield j, (here, slice(first + shift, last + shift))


# Python loops that dynamo would unroll: eager under torch.compile.
_running: Any = torch.compiler.disable(_Running.apply)
_prefix: Any = torch.compiler.disable(_Prefix.apply)
_pooled: Any = torch.compiler.disable(_Pooled.apply)
_corrected: Any = torch.compiler.disable(_Corrected.apply)
