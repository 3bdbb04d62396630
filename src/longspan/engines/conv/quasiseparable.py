"""Quasiseparable state matrices."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from longspan.engines.conv.projection import Measure, measure


class Quasiseparable(NamedTuple):
    """A = P (D + T⁻¹) Q with diagonal P, D, Q and T tridiagonal: the diagonals below, on, above."""

    p: Float[Tensor, "X"]
    d: Float[Tensor, "X"]
    t: Float[Tensor, "3 X"]
    q: Float[Tensor, "X"]


def decompose(name: Measure, size: int) -> Quasiseparable:
    """HiPPO's A as these parts, in double.

    P⁻¹ A Q⁻¹ is ±1 above and below its diagonal, or 0 above. With ones on the diagonal its inverse
    is tridiagonal; D takes the rest.
    """
    a, _ = measure(name, size)
    n = torch.arange(size, dtype=a.dtype)
    root = (2 * n + 1).sqrt()
    if name == "lagt":
        p, q = -torch.ones_like(n), torch.ones_like(n)
    elif name == "lmu":
        p, q = -(2 * n + 1), torch.ones_like(n)
    else:
        p, q = -root, root
    inner = a / p[:, None] / q
    lower = torch.ones_like(inner).tril()
    whole = inner - torch.diag(inner.diagonal()) + torch.eye(size, dtype=a.dtype)
    inverse = torch.linalg.inv(whole if bool(inner.triu(1).any()) else lower)
    t = inverse.new_zeros(3, size)
    t[0, 1:], t[1], t[2, :-1] = (inverse.diagonal(k) for k in (-1, 0, 1))
    return Quasiseparable(p, inner.diagonal() - 1, t, q)


def assemble(parts: Quasiseparable) -> Float[Tensor, "X X"]:
    """A as a dense matrix, in double where the device has it."""
    wide = torch.float32 if parts.p.device.type == "mps" else torch.float64
    p, d, t, q = (part.to(wide) for part in parts)
    below, on, above = t
    tridiagonal = torch.diag(below[1:], -1) + torch.diag(on) + torch.diag(above[:-1], 1)
    return p[:, None] * (torch.diag(d) + torch.linalg.inv(tridiagonal)) * q
