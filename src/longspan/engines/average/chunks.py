"""A causal sum segment by segment, and a segment as N chunks of C tokens side by side."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# Tokens a segment, and elements of one temporary: 1 MiB in float32 stays in a core's cache.
SEGMENT, ELEMENTS = 1024, 1 << 18
# Below every exponent and finite: exp(−inf − LOWEST) is 0 where exp(−inf + inf) is undefined.
LOWEST = -1e30


class Sums(NamedTuple):
    """Σ exp(k) v and Σ exp(k), both divided by exp(peak); a row of zeros has seen nothing."""

    total: Float[Tensor, "B H *L D"]
    weight: Float[Tensor, "B H *L D"]
    peak: Float[Tensor, "B H *L D"]


class Segment:
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
            weight = positive(self.weight[1:])
            return self.total[1:] / weight, weight, weight, weight
        bonus = bonus[:, None].expand(-1, self.n, -1).reshape(self.k.shape[1:])
        lifted = self.k + bonus
        top = torch.maximum(self.peak[:-1], lifted)
        old, new = (self.peak[:-1] - top).exp_(), (lifted - top).exp_()
        weight = positive(torch.addcmul(new, old, self.weight[:-1]))
        o = torch.addcmul(new * self.v, old, self.total[:-1]) / weight
        return o, weight, old, new


def segments(length: int) -> list[slice]:
    """The tokens, SEGMENT at a time."""
    return [slice(s, min(s + SEGMENT, length)) for s in range(0, length, SEGMENT)]


def blocks(batch_heads: int, length: int, width: int) -> Iterator[tuple[slice, list[slice]]]:
    """Rows worked on together, with their segments of tokens."""
    together = max(1, ELEMENTS // (min(length, SEGMENT) * max(width, 1)))
    spans = segments(length)
    for start in range(0, batch_heads, together):
        yield slice(start, min(start + together, batch_heads)), spans


def positive(weight: Tensor) -> Tensor:
    """The weight, kept from 0, by which a total can be divided."""
    return weight.clamp(min=torch.finfo(weight.dtype).tiny)


def spans_of(k: Tensor) -> Iterator[slice]:
    """Tokens worked on together, all rows at once."""
    size = max(256, ELEMENTS // max(k.shape[0] * k.shape[1] * k.shape[3], 1))
    for start in range(0, k.shape[2], size):
        yield slice(start, min(start + size, k.shape[2]))
