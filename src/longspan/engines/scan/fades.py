"""Decays within one span of chunks: never the exponential of a positive sum.

A fade answers for chunks (N C D): how much of a chunk's start is left at each token (`rising`), of
each token at the chunk's end (`falling`), the decayed products of two tokens (`pairs`) with their
gradients (`spread`), the states between chunks, and the decays' own gradient.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor


class Fade(ABC):
    total: Tensor  # what each chunk leaves of the state before it: N (D|1) 1

    @abstractmethod
    def rising(self, t: Tensor) -> Tensor:
        """t as far as the chunk's start reaches each token."""

    @abstractmethod
    def falling(self, t: Tensor) -> Tensor:
        """t as far as each token reaches the chunk's end."""

    @abstractmethod
    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        """Σ_d a_id b_jd Π_{j<t≤i} exp(decay_td) for j ≤ i, else 0."""

    @abstractmethod
    def spread(self, d: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> None:
        """Add to da and db what the gradient d of pairs(a, b) gives; d may be written over."""

    @abstractmethod
    def states(
        self, a: Tensor, b: Tensor, running: Tensor, *, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Decayed sums of aᵀb over the chunks before each (after each), and all, from `running`."""

    @abstractmethod
    def gradient(self, taken: Tensor, left: Tensor) -> Tensor:
        """Of the decays (rows, tokens …): a decay scales all that later tokens take from it and
        earlier ones, and the end. `taken` is N C D, `left` rows D V."""


def fading(decay: Tensor | None, n: int, like: Tensor) -> Fade:
    """Of decays rows × tokens (× channels), None for none, over n chunks a row."""
    if decay is None or decay.dim() == 2:
        return Shared(decay, n, like)
    return ByChannel(decay, n, like)


class Shared(Fade):
    """Decays that the channels of a head share, or none: weights on the products of a chunk."""

    def __init__(self, decay: Tensor | None, n: int, like: Tensor) -> None:
        # Most spans of a running maximum do not decay; looking is free where it needs no sync.
        self.free = decay is None or (decay.device.type == "cpu" and not decay.any())
        if decay is None or self.free:
            self.passing = like.new_ones(1, n + 1, n + 1).tril_()
            self.total = like.new_ones(1, 1, 1).expand(len(like), 1, 1)
            return
        # Sums of many logarithms differ by little: in float64.
        sums = decay.double().reshape(-1, decay.shape[-1] // n).cumsum(-1)  # rows·n C
        self.rise, self.fall = (
            t.exp().to(like.dtype)[..., None] for t in (sums, sums[:, -1:] - sums)
        )
        self.total = self.rise[:, -1:]
        self.weights = _differences(sums, like)
        self.passing = _differences(F.pad(sums[:, -1].view(-1, n).cumsum(-1), (1, 0)), like)

    def rising(self, t: Tensor) -> Tensor:
        return t if self.free else t * self.rise

    def falling(self, t: Tensor) -> Tensor:
        return t if self.free else t * self.fall

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        return self._weigh(torch.bmm(a, b.mT))

    def spread(self, d: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> None:
        d = self._weigh(d)
        da.baddbmm_(d, b)
        db.baddbmm_(d.mT, a)

    def _weigh(self, scores: Tensor) -> Tensor:
        return scores.tril_() if self.free else scores.mul_(self.weights)

    def states(
        self, a: Tensor, b: Tensor, running: Tensor, *, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        # One small triangular product sums over chunks faster than a cumulative sum does.
        passing = self.passing.mT if reverse else self.passing
        n, rows, shape = passing.shape[-1] - 1, running.shape[0], running.shape[1:]
        sums = torch.bmm(a.mT, b).view(rows, n, -1)
        start = running.reshape(rows, 1, -1)
        if reverse:
            every = torch.matmul(passing[..., :n], sums).addcmul_(passing[..., n:], start)
            return every[:, 1:].reshape(-1, *shape), every[:, 0].view_as(running)
        every = torch.matmul(passing[..., 1:], sums).addcmul_(passing[..., :1], start)
        return every[:, :n].reshape(-1, *shape), every[:, n].view_as(running)

    def gradient(self, taken: Tensor, left: Tensor) -> Tensor:
        each = taken.sum(-1).view(left.shape[0], -1)
        return each.flip(-1).cumsum(-1).flip(-1) + left.sum((1, 2))[:, None]


class ByChannel(Fade):
    """Decays of a channel and token: one product a level of halving, and the diagonal."""

    def __init__(self, decay: Tensor, n: int, like: Tensor) -> None:
        halves = _Halves(decay, n, like.dtype)
        self.chunks, self.length, self.size = n, halves.length, halves.size
        self.levels, self.rise, self.fall = halves.levels, halves.rise, halves.fall
        self.total = self.rise[:, -1, :, None]

    def rising(self, t: Tensor) -> Tensor:
        return t * self.rise

    def falling(self, t: Tensor) -> Tensor:
        return t * self.fall

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        out = a.new_zeros(a.shape[0], self.size, self.size)
        a, b = self._whole(a), self._whole(b)
        out.diagonal(dim1=1, dim2=2).copy_((a * b).sum(-1))
        for rise, fall in self.levels:
            block = _blocks(out, rise.shape[2])
            right, left = (_half(a, 1, rise) * rise), (_half(b, 0, fall) * fall)
            block.copy_(torch.matmul(right, left.mT))
        return out[:, : self.length, : self.length]

    def spread(self, d: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> None:
        own = d.diagonal(dim1=1, dim2=2)[..., None]
        da.addcmul_(own, b)
        db.addcmul_(own, a)
        missing = self.size - self.length
        d = F.pad(d, (0, missing, 0, missing)).contiguous()
        a, b, to_a, to_b = (self._whole(t) for t in (a, b, da, db))
        for rise, fall in self.levels:
            block = _blocks(d, rise.shape[2])
            right, left = (_half(a, 1, rise) * rise), (_half(b, 0, fall) * fall)
            _half(to_a, 1, rise).addcmul_(torch.matmul(block, left), rise)
            _half(to_b, 0, fall).addcmul_(torch.matmul(block.mT, right), fall)
        if missing:
            da.copy_(to_a[:, : self.length])
            db.copy_(to_b[:, : self.length])

    def _whole(self, t: Tensor) -> Tensor:
        missing = self.size - self.length
        return F.pad(t, (0, 0, 0, missing)) if missing else t

    def states(
        self, a: Tensor, b: Tensor, running: Tensor, *, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        new = torch.bmm(a.mT, b).unflatten(0, (-1, self.chunks))
        total = self.total.unflatten(0, (-1, self.chunks))
        every = torch.empty_like(new)
        for c in reversed(range(self.chunks)) if reverse else range(self.chunks):
            every[:, c] = running
            running = torch.addcmul(new[:, c], total[:, c], running)
        return every.flatten(0, 1), running

    def gradient(self, taken: Tensor, left: Tensor) -> Tensor:
        later = taken.new_ones(self.length, self.length).triu_()
        chunks = taken.new_ones(self.chunks, self.chunks).triu_(1)
        inside = torch.matmul(later, taken).unflatten(0, (-1, self.chunks))
        after = torch.matmul(chunks, inside[:, :, 0]) + left.sum(-1)[:, None]
        return (inside + after[:, :, None]).flatten(1, 2)


class _Halves:
    """Decays of a chunk as products of factors exp(decay) ≤ 1.

    A block of 2w tokens is two of w: what its right half takes of its left one passes the border b
    between, Π_{b<t≤i} exp(a_t) on the right (`rise`) and Π_{j<t≤b} exp(a_t) on the left (`fall`).
    Those of 2w are those of w times a whole half: one exp a decay, for w = 1, 2, 4, … C.
    """

    def __init__(self, decay: Tensor, n: int, dtype: torch.dtype) -> None:
        step = decay.reshape(decay.shape[0] * n, -1, decay.shape[-1]).to(dtype).exp()
        self.length = step.shape[1]
        self.size = 1 << (self.length - 1).bit_length()
        missing = self.size - self.length
        rise = F.pad(step, (0, 0, 0, missing), value=1.0) if missing else step
        fall = torch.ones_like(rise)
        self.levels: list[tuple[Tensor, Tensor]] = []  # N J w D
        width = 1
        while width < self.size:
            left, right = rise.unflatten(1, (-1, 2, width)).unbind(2)
            before = fall.unflatten(1, (-1, 2, width))[:, :, 0]
            self.levels.append((right.clone(), before.clone()))
            before *= right[:, :, -1:]
            right *= left[:, :, -1:]
            width *= 2
        self.rise, self.fall = rise[:, : self.length], fall[:, : self.length]


def _half(t: Tensor, which: int, like: Tensor) -> Tensor:
    """The left (0) or right (1) halves of the blocks of t: N J w D."""
    return t.unflatten(1, (-1, 2, like.shape[2]))[:, :, which]


def _blocks(pairs: Tensor, width: int) -> Tensor:
    """The blocks under the diagonal, right half × left half, of contiguous N C C: N J w w."""
    n, size, _ = pairs.shape
    strides = size * size, 2 * width * (size + 1), size, 1
    return pairs.as_strided((n, size // (2 * width), width, width), strides, width * size)


def _differences(sums: Tensor, like: Tensor) -> Tensor:
    """exp(s_i − s_j) for j ≤ i, else 0."""
    size = sums.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=sums.device).triu_(1)
    room = like.new_empty(*sums.shape, size)
    torch.sub(sums[..., :, None], sums[..., None, :], out=room)
    return room.masked_fill_(later, -torch.inf).exp_()
