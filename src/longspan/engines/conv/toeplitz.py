"""Products of features weighed by how far apart two tokens are: Σ_j c_{i−j} (q_i·k_j) v_j.

Near tokens meet in tiles, whose weights are written out; far ones by FFT, some pairs of a feature
and a value channel at a time. Causally the sequence is halved again and again, so that no later
token enters a transform whose result an earlier one reads.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engines.conv import shapes
from longspan.engines.conv.fft import fast_length

TILE = 256


def toeplitz(
    q: Float[Tensor, "B H L M"],
    k: Float[Tensor, "B H S M"],
    v: Float[Tensor, "B H S V"],
    lags: Float[Tensor, "H R"],
    *,
    causal: bool,
    base: int | None = None,
) -> Float[Tensor, "B H L V"]:
    """o_i = Σ_j lags[i − j + S − 1] (q_i·k_j) v_j; lags has R = L + S − 1 entries a head.

    Causally only j ≤ i + S − L count. Up to `base` tokens tiles are used, beyond it FFTs; None
    takes FFTs where they win. Time is O(L (base (M + V) + M V log L)), causally with another
    logarithm; memory that of inputs and outputs. Returns at least float32.
    """
    if base is None:
        # A pair costs a tile 2 (M + V) operations; a token costs a transform about 60 M V of
        # them, at a fifth of a tile's speed.
        base = 288 * q.shape[3] * v.shape[3] // (q.shape[3] + v.shape[3])
    if causal:
        lags = lags.clone()
        lags[:, : k.shape[2] - 1 - (k.shape[2] - q.shape[2])] = 0
    dtype = shapes.wide(q)
    with torch.autocast(q.device.type, enabled=False):
        return _weighed(q.to(dtype), k.to(dtype), v.to(dtype), lags.to(dtype), causal, base)


class _Meeting(NamedTuple):
    """Queries and keys that meet once, in a tile or by FFT."""

    queries: slice
    keys: slice
    tile: bool

    def lags(self, all: Tensor, keys: int) -> Tensor:
        """H (queries + keys − 1), of the first query and the last key first."""
        start = self.queries.start - self.keys.stop + keys
        size = self.queries.stop - self.queries.start + self.keys.stop - self.keys.start
        return all[:, start : start + size - 1]


def _meetings(queries: int, keys: int, causal: bool, base: int) -> Iterator[_Meeting]:
    if not causal:
        yield from _rectangle(0, queries, 0, keys, base)
        return
    early = keys - queries
    yield from _rectangle(0, queries, 0, early, base)
    yield from _triangle(0, queries, early, base)


def _rectangle(q0: int, q1: int, k0: int, k1: int, base: int) -> Iterator[_Meeting]:
    if q0 == q1 or k0 == k1:
        return
    if q1 - q0 + k1 - k0 > 2 * base:
        yield _Meeting(slice(q0, q1), slice(k0, k1), False)
        return
    # Tiles at the same lag one after the other, for their weights are the same.
    rows, columns = -(-(q1 - q0) // TILE), -(-(k1 - k0) // TILE)
    for lag in range(1 - columns, rows):
        for i in range(max(lag, 0), min(rows, columns + lag)):
            at, to = q0 + i * TILE, k0 + (i - lag) * TILE
            spans = slice(at, min(at + TILE, q1)), slice(to, min(to + TILE, k1))
            yield _Meeting(*spans, True)


def _triangle(start: int, stop: int, early: int, base: int) -> Iterator[_Meeting]:
    """Queries start … stop and the keys among them, `early` keys being before all queries."""
    if stop - start <= max(base, 32):
        for lag in range(-(-(stop - start) // TILE)):
            for at in range(start + lag * TILE, stop, TILE):
                to = at - lag * TILE
                keys = slice(early + to, early + min(to + TILE, stop))
                yield _Meeting(slice(at, min(at + TILE, stop)), keys, True)
        return
    middle = (start + stop) // 2
    yield from _triangle(start, middle, early, base)
    yield _Meeting(slice(middle, stop), slice(early + start, early + middle), False)
    yield from _triangle(middle, stop, early, base)


def _matrix(lags: Tensor, queries: int) -> Tensor:
    """[i, j] = lags[i − j + keys − 1]: H R → H queries keys."""
    return lags.flip(1).unfold(1, lags.shape[1] - queries + 1, 1).flip(1)


def _lag_sums(matrices: Tensor) -> Tensor:
    """The adjoint of `_matrix`: H queries keys → H R."""
    _, queries, keys = matrices.shape
    rows = torch.nn.functional.pad(matrices.flip(1), (0, queries)).flatten(1)
    rows = rows[:, : queries * (queries + keys - 1)]
    return rows.unflatten(1, (queries, -1)).sum(1).flip(1)


class _Weighed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lags: Tensor, causal: bool, base: int
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, lags)
        ctx.plan = list(_meetings(q.shape[2], k.shape[2], causal, base))
        o = v.new_zeros(*q.shape[:3], v.shape[3])
        for meeting, weights in _weighted(ctx.plan, lags, k.shape[2]):
            queries, keys = meeting.queries, meeting.keys
            parts = q[:, :, queries], k[:, :, keys], v[:, :, keys]
            if meeting.tile:
                o[:, :, queries] += ((parts[0] @ parts[1].mT) * weights) @ parts[2]
            else:
                _far(*parts, weights, o[:, :, queries])
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lags = ctx.saved_tensors
        dq, dk, dv, dlags = (torch.zeros_like(t) for t in (q, k, v, lags))
        for meeting, weights in _weighted(ctx.plan, lags, k.shape[2]):
            queries, keys = meeting.queries, meeting.keys
            parts = q[:, :, queries], k[:, :, keys], v[:, :, keys], do[:, :, queries]
            into = dq[:, :, queries], dk[:, :, keys], dv[:, :, keys]
            to = meeting.lags(dlags, k.shape[2])
            if not meeting.tile:
                _far_gradients(*parts, weights, *into, to)
                continue
            qs, ks, vs, ds = parts
            scores, dweights = qs @ ks.mT, ds @ vs.mT
            into[2].add_((scores * weights).mT @ ds)
            to += _lag_sums((scores * dweights).sum(0))
            dscores = dweights.mul_(weights)
            into[0].add_(dscores @ ks)
            into[1].add_(dscores.mT @ qs)
        return dq, dk, dv, dlags, None, None


_weighed: Any = torch.compiler.disable(_Weighed.apply)  # loops over tiles: eager under compile


def _weighted(plan: list[_Meeting], lags: Tensor, keys: int) -> Iterator[tuple[_Meeting, Tensor]]:
    """Each meeting with its matrix of weights, or its lags where an FFT wants them."""
    made: tuple[Any, Tensor | None] = None, None
    for meeting in plan:
        own = meeting.lags(lags, keys)
        if meeting.tile:
            size = meeting.queries.stop - meeting.queries.start
            key = own.storage_offset(), own.shape, size
            if made[0] != key or made[1] is None:
                made = key, _matrix(own, size).contiguous()
            own = made[1]
        yield meeting, own


def _channels(q: Tensor, v: Tensor, n: int) -> Iterator[tuple[tuple[int, int], slice, slice]]:
    """(row, head), features and value channels whose spectra fit one block."""
    columns = min(v.shape[3], max(1, shapes.BLOCK // n))
    features = max(1, shapes.BLOCK // (n * columns))
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            for m in range(0, q.shape[3], features):
                for c in range(0, v.shape[3], columns):
                    yield (row, head), slice(m, m + features), slice(c, c + columns)


def _far(q: Tensor, k: Tensor, v: Tensor, lags: Tensor, o: Tensor) -> None:
    """o_i += Σ_m q_im (c * (k_m ∘ v))_i, one transform a pair of channels."""
    keys, n = k.shape[2], fast_length(lags.shape[1])
    spectra = torch.fft.rfft(lags, n)
    for at, m, c in _channels(q, v, n):
        qs, ks, vs, os = q[at][:, m].mT, k[at][:, m].mT, v[at][:, c].mT, o[at][:, c]
        products = ks[:, None] * vs  # M V S
        sums = torch.fft.irfft(torch.fft.rfft(products, n) * spectra[at[1]], n)
        os += (sums[..., keys - 1 : lags.shape[1]] * qs[:, None]).sum(0).mT


def _far_gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lags: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, dlags: Tensor,
) -> None:  # fmt: skip
    keys, reach = k.shape[2], lags.shape[1]
    n = fast_length(reach)
    spectra = torch.fft.rfft(lags, n)
    for at, m, c in _channels(q, v, n):
        qs, ks, vs, ds = (t.mT for t in (q[at][:, m], k[at][:, m], v[at][:, c], do[at][:, c]))
        seen = torch.fft.rfft(ks[:, None] * vs, n)
        sums = torch.fft.irfft(seen * spectra[at[1]], n)[..., keys - 1 : reach]
        dq[at][:, m] += (sums * ds).sum(1).mT
        # As placed in the forward pass: query i at keys − 1 + i.
        asked = torch.fft.rfft(torch.nn.functional.pad(qs[:, None] * ds, (keys - 1, 0)), n)
        back = torch.fft.irfft(asked * spectra[at[1]].conj(), n)[..., :keys]
        dk[at][:, m] += (back * vs).sum(1).mT
        dv[at][:, c] += (back * ks[:, None]).sum(0).mT
        dlags[at[1]] += torch.fft.irfft((asked * seen.conj()).sum((0, 1)), n)[:reach]
