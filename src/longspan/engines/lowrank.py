"""Attention to a compressed side: few slots or landmarks M stand for all S keys.

Slots are made of the tokens that are kept, in their order, so that padding moves none of them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longspan.shapes import Keep, Keys, Outputs, Queries, Values

# Tokens a block, tokens worked on at once, what stands for no exponent so far, and by how much the
# exponents of a block may exceed those before it until it is halved.
BLOCK, SPAN, LOWEST, RISE = 32, 512, -1e30, 60.0
# Tokens whose kernel with all landmarks is held at once.
TILE = 2048


def aligned(keep: Keep, *ts: Float[Tensor, "B H S _"]) -> tuple[Tensor, ...]:
    """Each row's kept tokens first, in order, and zeros behind them."""
    batch, tokens = keep.shape
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
    empty = torch.arange(tokens, device=keep.device) >= keep.sum(1)[:, None]
    out = []
    for t in ts:
        heads = torch.arange(batch * t.shape[1], device=t.device).view(batch, -1, 1) * tokens
        # Rows of one flat matrix: far cheaper than a gather with an expanded index.
        rows = t.reshape(-1, t.shape[3]).index_select(0, (heads + order[:, None]).flatten())
        out.append(rows.view(t.shape).masked_fill(empty[:, None, :, None], 0))
    return tuple(out)


def windows(x: Float[Tensor, "B H S D"], size: int, fill: float = 0) -> Float[Tensor, "B H N C D"]:
    """The tokens in runs of `size`, the last filled up."""
    short = -x.shape[2] % size
    if short:
        x = F.pad(x, (0, 0, 0, short), value=fill)
    return x.unflatten(2, (-1, size))


def segment_means(
    x: Float[Tensor, "B H S D"], segments: int, keep: Keep | None = None
) -> tuple[Float[Tensor, "B H M D"], Int[Tensor, "B M"]]:
    """Means over contiguous segments of the kept tokens, and each segment's number of tokens.

    Of n kept tokens the first n mod M segments hold ⌈n / M⌉ and the others ⌊n / M⌋; with n < M
    the first n segments are the tokens, and the others 0 and empty.
    """
    batch, heads, tokens, width = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    count = torch.full((batch,), tokens, device=x.device) if keep is None else keep.sum(1)
    size, longer = count // segments, count % segments
    sizes = size[:, None] + (torch.arange(segments, device=x.device) < longer[:, None])
    if keep is None and tokens >= segments:
        few, cut = tokens // segments, (tokens % segments) * (tokens // segments + 1)
        parts = [(x[:, :, :cut], few + 1), (x[:, :, cut:], few)]
        means = [t.unflatten(2, (-1, n)).mean(3, dtype=wide) for t, n in parts if t.shape[2]]
        return torch.cat(means, 2).to(x.dtype), sizes
    if keep is None:
        keep = torch.ones(batch, tokens, dtype=torch.bool, device=x.device)
    rank = keep.cumsum(1) - 1
    cut = (longer * (size + 1))[:, None]
    later = longer[:, None] + (rank - cut) // size.clamp(min=1)[:, None]
    segment = torch.where(rank < cut, rank // (size[:, None] + 1), later)
    segment = segment.masked_fill(~keep, segments)[:, None]  # a last one, for what is masked
    start = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * (segments + 1)
    sums = x.new_zeros(batch * heads * (segments + 1), width, dtype=wide)
    rows = x.masked_fill(~keep[:, None, :, None], 0).reshape(-1, width).to(wide)
    sums = sums.index_add(0, (start + segment).flatten(), rows)
    sums = sums.view(batch, heads, segments + 1, width)[:, :, :segments]
    return (sums / sizes.clamp(min=1)[:, None, :, None]).to(x.dtype), sizes


def pooled(
    weights: Float[Tensor, "B H S M"], u: Float[Tensor, "B H S D"]
) -> Float[Tensor, "B H M D"]:
    """Σ_s weights[s, m] u_s of every slot, in the weights' precision."""
    with torch.autocast(u.device.type, enabled=False):
        return weights.mT @ u.to(weights.dtype)


def inverse(
    a: Float[Tensor, "B H L M"], steps: int, *, together: bool = False
) -> Float[Tensor, "B H M L"]:
    """The pseudo-inverse of small matrices of non-negative entries, by an iteration of order 3:

        Z_0 = Aᵀ / max column sum,  Z ← Z (13 I − A Z (15 I − A Z (7 I − A Z))) / 4

    It converges where no row of A sums to more than 1; in at least float32.

    Args:
        together: one maximum for all matrices, which then depend on each other.
    """
    with torch.autocast(a.device.type, enabled=False):
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        top = a.sum(-2).amax(-1)[..., None, None]
        if together:
            top = top.amax()
        z = a.mT / top.masked_fill(top == 0, 1)
        eye = torch.eye(a.shape[-2], dtype=a.dtype, device=a.device)
        for _ in range(steps):
            az = a @ z
            z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


def depthwise(
    x: Float[Tensor, "B H L D"], weight: Float[Tensor, "H C"], *, block: int = 64
) -> Float[Tensor, "B H L D"]:
    """o_t = Σ_c weight[c] x_{t + c − ⌊C / 2⌋}: one odd kernel a head, along the tokens.

    A product of banded block × (block + C − 1) matrices: a CPU runs it several times faster than
    a grouped convolution.
    """
    heads, taps = weight.shape
    length, reach = x.shape[2], block + taps - 1
    x = F.pad(x, (0, 0, taps // 2, taps // 2 + -length % block))
    band = F.pad(weight, (0, block)).repeat(1, block)[:, : block * reach]
    band = band.view(heads, 1, block, reach)
    return (band @ x.unfold(2, reach, block).mT).flatten(2, 3)[:, :, :length]


def gaussian(
    x: Float[Tensor, "B H L D"], z: Float[Tensor, "B H A M D"], u: Float[Tensor, "B H M V"]
) -> Float[Tensor, "B H L V"]:
    """κ(x, z) u, κ(x, z_m) = mean_a exp(−|x − z_am|² / 2), recomputed backward."""
    return torch.cat([_recomputed(_kernel_times, part, z, u) for part in x.split(TILE, 2)], 2)


def gaussian_sums(
    z: Float[Tensor, "B H A M D"], k: Float[Tensor, "B H S D"], v: Float[Tensor, "B H S V"]
) -> Float[Tensor, "B H M V"]:
    """κ(z, k) v, with the κ of `gaussian`, recomputed backward."""
    parts = zip(k.split(TILE, 2), v.split(TILE, 2), strict=True)
    return torch.stack([_recomputed(_kernel_sums, *part, z) for part in parts]).sum(0)


def gaussian_inverse(
    z: Float[Tensor, "B H A M D"], ridge: float, steps: int | None
) -> Float[Tensor, "B H M M"]:
    """(κ(z, z) + ridge · I)⁻¹, preconditioned by its row sums, the ridge in them.

    By `steps` of `inverse`, or exactly.
    """
    eye = torch.eye(z.shape[3], dtype=z.dtype, device=z.device)
    m = gaussian(z.flatten(2, 3), z, eye.expand(*z.shape[:2], -1, -1))
    m = m.unflatten(2, z.shape[2:4]).mean(2) + ridge * eye
    if steps is None:
        return torch.linalg.inv(m)
    half = m.sum(-1).rsqrt()
    both = half[..., :, None] * half[..., None, :]
    return both * inverse(both * m, steps)


def sampled(
    x: Float[Tensor, "B H S D"], draws: Int[Tensor, "A M"], keep: Keep | None
) -> Float[Tensor, "B H A M D"]:
    """Rows of x among its kept ones: a draw of 0 … 2³¹ − 1 is a share of their number."""
    batch, heads, tokens, width = x.shape
    if keep is None:
        at = ((draws * tokens) >> 31).flatten().expand(batch, -1)
    else:
        order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
        at = order.gather(1, (draws.flatten() * keep.sum(1)[:, None]) >> 31)
    start = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * tokens
    rows = x.reshape(-1, width).index_select(0, (start + at[:, None]).flatten())
    return rows.view(batch, heads, *draws.shape, width)


def _kernel_times(x: Tensor, z: Tensor, u: Tensor) -> Tensor:
    return _kernel(x, z) @ u


def _kernel_sums(k: Tensor, v: Tensor, z: Tensor) -> Tensor:
    return _kernel(k, z).mT @ v


def _kernel(x: Tensor, z: Tensor) -> Tensor:
    flat = z.flatten(2, 3)
    scores = (x * x).sum(-1, keepdim=True) + (flat * flat).sum(-1)[:, :, None]
    return (x @ flat.mT - scores / 2).exp().unflatten(3, z.shape[2:4]).mean(3)


def _checkpointed(work: Callable[..., Any], *ts: Any) -> Any:
    return checkpoint(work, *ts, use_reentrant=False) if torch.is_grad_enabled() else work(*ts)


_recomputed: Any = torch.compiler.disable(_checkpointed)


class Slots(NamedTuple):
    """Averages with exponential weights: Σ exp(w) u and Σ exp(w), both over exp(peak), by slot."""

    sums: Float[Tensor, "B H M _"]
    weight: Float[Tensor, "B H M"]
    peak: Float[Tensor, "B H M"]


class _Level:
    """What the tokens of one span see of its slots, until an exponent rises by more than RISE.

    Blocks of C tokens side by side. In a block all weights are exp(w_s − peak) with peak the
    largest exponent before it or of its first token: finite, no later token in it, and at least
    one that every token sees is 1. Where a block's own exponents are larger than that can hold,
    they are cut off; from there on, `steep` (B H L), another way must be taken.
    """

    def __init__(self, write: Tensor, u: Tensor, state: Slots) -> None:
        self.length, size = write.shape[2], min(2 * BLOCK, write.shape[2])
        cut, self.u = windows(write, size, -math.inf), windows(u, size)
        start = torch.where(state.weight > 0, state.peak, LOWEST)[:, :, None]
        ends = torch.cat([start, cut.detach().amax(3)], 2).cummax(2).values
        peak = torch.maximum(ends, F.pad(cut.detach()[:, :, :, 0], (0, 0, 0, 1), value=-math.inf))
        rise = cut - peak[:, :, :-1, None]
        steep = (rise.detach() > RISE).any(-1).flatten(2)[:, :, : self.length]
        self.steep = steep.cummax(2).values
        self.weights = rise.clamp(max=RISE).exp()  # B H N C M
        fade, begin = (
            (peak[:, :, :-1] - peak[:, :, 1:]).exp(),
            (start - peak[:, :, :1]).exp()[:, :, 0],
        )
        inside = self.weights.new_ones(size, size).tril_() @ self.weights
        weight = _states(fade * inside[:, :, :, -1], fade, state.weight * begin)
        self.total = inside + weight[:, :, :-1, None]  # 0 or, but for rounding, at least 1
        new, fade = fade[..., None] * (self.weights.mT @ self.u), fade[..., None]
        sums = _states(new, fade, state.sums * begin[..., None])
        self.before = sums[:, :, :-1]
        self.after = Slots(sums[:, :, -1], weight[:, :, -1], peak[:, :, -1])

    def scores(self, q: Tensor) -> Tensor:
        """q_t · ū_t[m], and −inf where nothing was written: B H L M."""
        q = windows(q, self.u.shape[3])
        o = (q @ self.u.mT).tril() @ self.weights + q @ self.before.mT
        o = (o / self.total.clamp(min=0.5)).masked_fill(self.total == 0, -math.inf)
        return o.flatten(2, 3)[:, :, : self.length]

    def read(self, r: Tensor) -> Tensor:
        """Σ_m r_t[m] ū_t[m]: B H L V."""
        r = windows(r, self.u.shape[3]) / self.total.clamp(min=0.5)
        o = (r @ self.weights.mT).tril() @ self.u + r @ self.before
        return o.flatten(2, 3)[:, :, : self.length]


class _Halved:
    """What the tokens of one span see of its slots: earlier blocks by the state, its own by halves.

    Blocks of C tokens side by side. A weight exp(w_s − peak_t), s ≤ t, with peak_t the largest
    exponent up to t, splits at any border b between s and t into exp(w_s − peak_b) and
    exp(peak_b − peak_t), neither above 1 and neither knowing of later tokens. Halving a block
    again and again makes every pair a product of two such factors.
    """

    def __init__(self, write: Tensor, u: Tensor, state: Slots) -> None:
        start = torch.where(state.weight > 0, state.peak, LOWEST)[:, :, None]
        self.length = write.shape[2]
        self.block = block = min(BLOCK, 1 << (self.length - 1).bit_length())
        cut = F.pad(write, (0, 0, 0, -self.length % block), value=-math.inf)
        peak = torch.maximum(cut.detach().cummax(2).values, start)
        cut, peak = (t.unflatten(2, (-1, block)) for t in (cut, peak))
        self.u = windows(u, block)
        self.own = (cut - peak).exp()  # B H N C M
        self.halves = [_halves(cut, peak, 1 << level) for level in range(block.bit_length() - 1)]
        ends = torch.cat([start, peak[:, :, :, -1]], 2)  # B H N+1 M
        self.entering = (ends[:, :, :-1, None] - peak).exp()
        leaving = (cut - ends[:, :, 1:, None]).exp()
        fade = (ends[:, :, :-1] - ends[:, :, 1:]).exp()
        sums = _states(leaving.mT @ self.u, fade[..., None], state.sums)
        self.before = sums[:, :, :-1]
        weights = _states(leaving.sum(3), fade, state.weight)
        total = self._rows(self.own, [left.sum(-2, keepdim=True) for left, _ in self.halves])
        total = total + self.entering * weights[:, :, :-1, None]
        self.empty = total == 0
        self.total = total.masked_fill(self.empty, 1)
        self.after = Slots(sums[:, :, -1], weights[:, :, -1], ends[:, :, -1])

    def _rows(self, own: Tensor, sums: list[Tensor]) -> Tensor:
        """Sums over s ≤ t: a token's own, and those of first halves for second halves."""
        out = own[..., None, :]
        for (_, right), new in zip(self.halves, sums, strict=True):
            first, second = out.unflatten(3, (-1, 2)).unbind(4)
            out = torch.cat([first, torch.addcmul(second, right, new)], -2)
        return out.squeeze(3)

    def scores(self, q: Tensor) -> Tensor:
        """q_t · ū_t[m], and −inf where nothing was written: B H L M."""
        q = windows(q, self.block)
        products, sums = q @ self.u.mT, []
        for left, _ in self.halves:
            size = left.shape[4]
            cut = products.unflatten(4, (-1, 2 * size)).unflatten(3, (-1, 2 * size))
            pairs = cut.diagonal(dim1=3, dim2=5).movedim(-1, 3)  # B H N n 2s 2s
            sums.append(pairs[..., size:, :size] @ left)
        own = products.diagonal(dim1=3, dim2=4)[..., None] * self.own
        o = (self._rows(own, sums) + (q @ self.before.mT) * self.entering) / self.total
        return o.masked_fill(self.empty, -math.inf).flatten(2, 3)[:, :, : self.length]

    def read(self, r: Tensor) -> Tensor:
        """Σ_m r_t[m] ū_t[m]: B H L V."""
        r = windows(r, self.block) / self.total
        pairs = (r * self.own).sum(-1)[..., None, None]
        for left, right in self.halves:
            later = r.unflatten(3, (-1, 2, left.shape[4])).select(4, 1) * right
            first, second = pairs.unflatten(3, (-1, 2)).unbind(4)
            above = torch.cat([first, torch.zeros_like(first)], -1)
            pairs = torch.cat([above, torch.cat([later @ left.mT, second], -1)], -2)
        o = pairs.squeeze(3) @ self.u + (r * self.entering) @ self.before
        return o.flatten(2, 3)[:, :, : self.length]


def _halves(cut: Tensor, peak: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Factors of the first and the second of every two runs of `size` tokens, B H N n s M each."""
    cut, peak = (t.unflatten(3, (-1, 2, size)) for t in (cut, peak))
    border = peak[:, :, :, :, 0, -1:]
    return (cut[:, :, :, :, 0] - border).exp(), (border - peak[:, :, :, :, 1]).exp()


def _states(new: Tensor, fade: Tensor, first: Tensor) -> Tensor:
    """x_n = fade_n x_{n−1} + new_n over blocks, from and with the first: B H N+1 …"""
    states = [first]
    for block, factor in zip(new.unbind(2), fade.unbind(2), strict=True):
        states.append(torch.addcmul(block, factor, states[-1]))
    return torch.stack(states, 2)


def read(
    r: Float[Tensor, "B H L M"],
    write: Float[Tensor, "B H S M"],
    v: Values,
    state: Slots | None = None,
) -> tuple[Outputs, Slots]:
    """o_t = Σ_m r_t[m] v̄_t[m], v̄_t[m] = Σ_{s≤t} exp(w_s[m]) v_s / Σ_{s≤t} exp(w_s[m]), and sums.

    The last query meets the last key. An exponent of −inf writes nothing, and what nothing was
    written to reads 0. At least float32 inside and in the state.
    """
    o, after = _eager(lambda span, r: span.read(r), r, write, v, state)
    return o.to(v.dtype), after


def scores(
    q: Queries,
    write: Float[Tensor, "B H S M"],
    k: Keys,
    state: Slots | None = None,
) -> tuple[Float[Tensor, "B H L M"], Slots]:
    """q_t · k̄_t[m] with the averages of `read`, −inf where nothing was written, and the sums.

    In at least float32: a softmax over the slots, given to `read`, makes an attention of them.
    """
    return _eager(lambda span, q: span.scores(q), q, write, k, state)


def _by_span(
    body: Callable[[_Level | _Halved, Tensor], Tensor],
    q: Tensor,
    write: Tensor,
    u: Tensor,
    state: Any,
) -> tuple[Tensor, Slots]:
    wide = torch.promote_types(q.dtype, torch.float32)
    earlier = write.shape[2] - q.shape[2]
    q = F.pad(q, (0, 0, earlier, 0))
    if state is None:
        none = write.new_zeros(*write.shape[:2], write.shape[3], dtype=wide)
        state = Slots(none[..., None] * u.new_zeros(u.shape[3], dtype=wide), none, none)

    def work(state: Slots, q: Tensor, write: Tensor, u: Tensor) -> tuple[Tensor, Slots]:
        with torch.autocast(q.device.type, enabled=False):
            q, write, u = q.to(wide), write.to(wide), u.to(wide)
            level = _Level(write, u, state)
            if not bool(level.steep.any()):
                return body(level, q), level.after
            halved = _Halved(write, u, state)
            o = torch.where(level.steep[..., None], body(halved, q), body(level, q))
            last = level.steep[:, :, -1:]
            sums, *others = (
                torch.where(last[..., *(None,) * (new.dim() - 3)], new, old)
                for new, old in zip(halved.after, level.after, strict=True)
            )
            return o, Slots(sums, *others)

    outs: list[Tensor] = []
    for parts in zip(*(t.split(SPAN, 2) for t in (q, write, u)), strict=True):
        # What a span compares is many times its inputs: it is computed again backward.
        o, state = _recomputed(work, state, *parts)
        outs.append(o)
    return torch.cat(outs, 2)[:, :, earlier:], state


# A loop over spans that dynamo would unroll: eager under torch.compile.
_eager: Any = torch.compiler.disable(_by_span)
