"""Dense systems by strides: Krylov matrices kept as their factors, and exact scans by chunk.

Letters: E features (each its own system), X states, M channels that read them, C tokens a stride.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from longspan.engines.conv import shapes
from longspan.engines.conv.shapes import Signal


class Stride(NamedTuple):
    """B, A B, … A^{C−1} B, and A, A², A⁴, … A^C: any Krylov matrix of the system, factored."""

    near: Float[Tensor, "E C X"]
    powers: Float[Tensor, "F E X X"]


def stride(transition: Float[Tensor, "E X X"], input: Float[Tensor, "E X"], count: int) -> Stride:
    """The factors for strides of C = `count`, a power of 2."""
    powers = [transition]
    while 1 << (len(powers) - 1) < count:
        powers.append(powers[-1] @ powers[-1])
    near = _grown(input[:, None], [power.mT for power in powers[:-1]])
    return Stride(near[:, 0], torch.stack(powers))


def _grown(rows: Tensor, powers: Sequence[Tensor]) -> Tensor:
    """r, r A, r A², … for each of the rows E M X: E M K X."""
    rows = rows[:, :, None]
    for power in powers:
        rows = torch.cat([rows, rows @ power[:, None]], 2)
    return rows


def strided_kernel(
    c: Float[Tensor, "E M X"], factors: Stride, length: int
) -> Float[Tensor, "E M K"]:
    """C A^l B for l < length, as (C A^{aC}) (A^b B): O(E X (L/C + C + X)) beside the kernel."""
    near, hops = factors.near, [factors.powers[-1]]
    while near.shape[1] << len(hops) < length:
        hops.append(hops[-1] @ hops[-1])
    far = _grown(c.to(near), hops if length > near.shape[1] else [])
    far = far[:, :, : -(-length // near.shape[1])]
    return (far @ near.mT[:, None]).flatten(2)[..., :length]


def strided(
    u: Signal,
    factors: Stride,
    c: Float[Tensor, "E M X"],
    skip: Float[Tensor, "E M"],
    state: Float[Tensor, "B E X"] | None = None,
) -> tuple[Float[Tensor, "B E M L"], Float[Tensor, "B E X"]]:
    """x_t = A x_{t−1} + B u_t, y_t = C x_t + skip u_t, and x_L: products within strides, a loop.

    Strictly causal, bit for bit, in O(L (M C + M X + X²/C)) a feature.
    """
    (batch, features, length), wide = u.shape, shapes.wide(u)
    near, powers = factors.near, factors.powers
    count = near.shape[1]
    taps = strided_kernel(c, factors, count) + F.pad(skip.to(near)[..., None], (0, count - 1))
    within = shapes.toeplitz(taps.flatten(0, 1)).unflatten(0, (features, -1))  # E M C C
    read = _grown(c.to(near), powers[:-1].unbind()) @ powers[:1, :, None].squeeze(0)  # E M C X
    write, hop = near.flip(1).to(wide), powers[-1].mT.to(wide)
    pieces = -(-length // count)
    tokens = F.pad(u.to(wide).transpose(0, 1), (0, pieces * count - length))
    tokens = tokens.unflatten(2, (pieces, count))  # E B N C
    full = length // count
    inputs = (tokens[:, :, :full].flatten(1, 2) @ write).unflatten(1, (batch, full))
    x = tokens.new_zeros(features, batch, near.shape[2])
    x = x if state is None else state.to(wide).transpose(0, 1)
    states = [x]
    for part in inputs.unbind(2):
        states.append(states[-1] @ hop + part)
    y = tokens.flatten(1, 2) @ within.transpose(1, 2).flatten(2).to(wide)
    before = torch.stack(states[:pieces], 2).flatten(1, 2)
    y = y + before @ read.flatten(1, 2).mT.to(wide)
    y = y.view(features, batch, pieces, -1, count).permute(1, 0, 3, 2, 4)
    x = states[-1]
    if rest := length - full * count:
        for n, power in enumerate(powers[:-1].unbind()):
            x = x @ power.mT.to(wide) if rest >> n & 1 else x
        x = x + tokens[:, :, -1, :rest] @ write[:, count - rest :]
    return y.flatten(3)[..., :length].to(u.dtype), x.transpose(0, 1)
