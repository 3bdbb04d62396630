"""Convolutions and linear state spaces: long ones by FFT, short ones by bands, scans by chunk."""

from longspan.engines.conv.fft import convolve
from longspan.engines.conv.kernels import (
    dense_response,
    dense_state,
    doubled,
    low_rank_kernel,
    low_rank_step,
    truncated,
    untruncated,
)
from longspan.engines.conv.projection import (
    basis,
    legs_step,
    legs_update,
    measure,
    project,
    reconstruct,
    sample,
    scaled,
)
from longspan.engines.conv.quasiseparable import Quasiseparable, assemble, decompose
from longspan.engines.conv.scan import diagonal, diagonal_kernel, diagonal_step
from longspan.engines.conv.shapes import readout
from longspan.engines.conv.short import short
from longspan.engines.conv.strides import Stride, stride, strided, strided_kernel
from longspan.engines.conv.systems import (
    LowRank,
    dense,
    discretise,
    hippo,
    krylov,
    normal_plus_low_rank,
    spectrum,
)
from longspan.engines.conv.toeplitz import toeplitz

__all__ = [
    "LowRank",
    "Quasiseparable",
    "Stride",
    "assemble",
    "basis",
    "convolve",
    "decompose",
    "dense",
    "dense_response",
    "dense_state",
    "diagonal",
    "diagonal_kernel",
    "diagonal_step",
    "discretise",
    "doubled",
    "hippo",
    "krylov",
    "legs_step",
    "legs_update",
    "low_rank_kernel",
    "low_rank_step",
    "measure",
    "normal_plus_low_rank",
    "project",
    "readout",
    "reconstruct",
    "sample",
    "scaled",
    "short",
    "spectrum",
    "stride",
    "strided",
    "strided_kernel",
    "toeplitz",
    "truncated",
    "untruncated",
]
