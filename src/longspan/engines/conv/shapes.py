"""Shapes, types and table tricks that the convolutions share."""

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

Pairs = Complex[Tensor, "E M"]
Signal = Float[Tensor, "B E L"]
Kernel = Float[Tensor, "E K"]
PairState = Float[Tensor, "B E M 2"]

# Elements of one temporary, 4 MiB in float32: larger ones are given back to the system at every
# free and fault in anew.
BLOCK = 1 << 20


def wide(x: Tensor) -> torch.dtype:
    """The dtype to compute in: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def exact(device: torch.device) -> torch.dtype:
    """The complex type small tables are made in: double wherever the device has it."""
    return torch.complex64 if device.type == "mps" else torch.complex128


def as_complex(pairs: Tensor) -> Tensor:
    """… 2M real numbers → … M complex."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


def readout(c: Complex[Tensor, "*E M"]) -> Float[Tensor, "*E X"]:
    """The real row that takes a state's 2M real numbers to 2 Re(c x)."""
    return 2 * torch.view_as_real(c.conj().resolve_conj()).flatten(-2)


def toeplitz(kernel: Tensor) -> Tensor:
    """E C → the matrices [i, j] = kernel[j − i], 0 below the diagonal: E C C."""
    features, taps = kernel.shape
    rows = F.pad(kernel, (0, taps))[:, None].expand(-1, taps, -1).flatten(1)
    # One element fewer a row shifts each row one further to the right.
    return rows[:, : taps * (2 * taps - 1)].view(features, taps, -1)[:, :, :taps]


def diagonal_sums(matrices: Tensor) -> Tensor:
    """The adjoint of `toeplitz`."""
    taps = matrices.shape[1]
    rows = F.pad(F.pad(matrices, (0, taps - 1)).flatten(1), (0, taps))
    return rows.unflatten(1, (taps, 2 * taps))[..., :taps].sum(1)
