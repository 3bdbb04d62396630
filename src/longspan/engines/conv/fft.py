"""Convolutions as long as the sequence, by FFT."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engines.conv import shapes
from longspan.engines.conv.shapes import Kernel, Signal


def convolve(u: Signal, kernel: Kernel, *, origin: int = 0) -> Signal:
    """y_i = Σ_j kernel[i − j + origin] u_j by FFT, each feature with its own kernel.

    `origin` is the index of lag 0: 0 makes it causal, K = 2L − 1 with L − 1 reaches both ways.
    Spectra are made anew in the backward pass, so memory is O(E L).
    """
    return _by_spectra(u, kernel, origin)


def fast_length(least: int) -> int:
    """The shortest of a few FFT lengths that are products of 2, 3 and 5."""
    power = 1 << (least - 1).bit_length()
    shorter = (power * odd // 16 for odd in (9, 10, 12, 15) if power >= 16)
    return min((n for n in shorter if n >= least), default=power)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, kernel: Tensor, origin: int) -> Tensor:
        ctx.save_for_backward(u, kernel)
        ctx.origin = origin
        y = torch.empty_like(u)
        for rows, n in _Convolve.groups(u, kernel, origin):
            k = torch.fft.rfft(kernel[rows].to(shapes.wide(u)), n)
            spectrum = torch.fft.rfft(u[:, rows].to(shapes.wide(u)), n) * k
            y[:, rows] = torch.fft.irfft(spectrum, n)[..., origin : origin + u.shape[2]]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        u, kernel = ctx.saved_tensors
        du, dkernel = torch.empty_like(u), torch.empty_like(kernel)
        for rows, n in _Convolve.groups(u, kernel, ctx.origin):
            grown = F.pad(dy[:, rows].to(shapes.wide(u)), (ctx.origin, 0))
            g = torch.fft.rfft(grown, n)
            k = torch.fft.rfft(kernel[rows].to(shapes.wide(u)), n)
            du[:, rows] = torch.fft.irfft(g * k.conj(), n)[..., : u.shape[2]]
            g = (g * torch.fft.rfft(u[:, rows].to(shapes.wide(u)), n).conj()).sum(0)
            dkernel[rows] = torch.fft.irfft(g, n)[..., : kernel.shape[1]]
        return du, dkernel, None

    @staticmethod
    def groups(u: Tensor, kernel: Tensor, origin: int) -> Iterator[tuple[slice, int]]:
        """Features at a time, and an FFT long enough that what wraps round is cut off."""
        (batch, features, length), taps = u.shape, kernel.shape[1]
        n = fast_length(max(length + taps - 1 - origin, length + origin, taps))
        group = max(1, shapes.BLOCK // (batch * n))
        for start in range(0, features, group):
            yield slice(start, min(start + group, features)), n


_by_spectra: Any = torch.compiler.disable(_Convolve.apply)
