"""Averages whose weights also depend on where the key is seen from."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engines.average.chunks import LOWEST, Sums, spans_of
from longspan.engines.average.sums import Keyed, quotient


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


def _product(w: Tensor, k: Tensor, v: Tensor, peak: Tensor) -> Sums:
    new, heads = (k - peak).exp(), k.shape[1]
    both = torch.cat([new * v, new], dim=1)
    sums = w @ rearrange(both, "B H S D -> B S (H D)")
    total, weight = rearrange(sums, "B L (T H D) -> T B H L D", T=2, H=heads)
    return Sums(total, weight, peak)


class _Corrected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, total: Tensor, weight: Tensor, peak: Tensor,
        factors: Tensor, offsets: tuple[int, ...], length: int,
    ) -> Tensor:  # fmt: skip
        o = v.new_empty(*v.shape[:2], length, v.shape[3])
        for span in spans_of(o):
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
        for span in spans_of(do):
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


# A Python loop that dynamo would unroll: eager under torch.compile.
_corrected: Any = torch.compiler.disable(_Corrected.apply)
