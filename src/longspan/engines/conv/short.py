"""Convolutions of a few taps that heads share, the taps fixed or given anew for every token."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engines.conv import shapes

# Tokens worked on as one product with a band of CHUNK × (CHUNK + K − 1).
CHUNK = 16


def short(
    x: Float[Tensor, "B S E"], taps: Float[Tensor, "H K"] | Float[Tensor, "B L H K"]
) -> Float[Tensor, "B L E"]:
    """y_i = Σ_j taps_j x_{i+j}, L = S − K + 1; each head has its taps and E/H adjacent channels.

    The caller pads x. Products with bands of a few tokens, made anew in the backward pass: time
    is O(L E (K + CHUNK)), memory that of the inputs and y.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _banded(x, taps)


class _Piece(NamedTuple):
    """`chunks` chunks of `chunk` tokens, for some rows of the batch."""

    rows: slice
    start: int
    chunks: int
    chunk: int
    window: int
    heads: int
    dynamic: bool
    dtype: torch.dtype

    def windows(self, x: Tensor) -> Tensor:
        """What each chunk sees of x: (G N H) W D, or H W (G N D) with fixed taps."""
        seen = x[self.rows, self.start : self.start + self.chunks * self.chunk + self.reach]
        return self._matrices(seen.unfold(1, self.window, self.chunk).transpose(2, 3))

    def outputs(self, y: Tensor) -> Tensor:
        """The same of y's own tokens: (G N H) C D, or H C (G N D)."""
        return self._matrices(self.place(y))

    def place(self, y: Tensor) -> Tensor:
        tokens = y[self.rows, self.start : self.start + self.chunks * self.chunk]
        return tokens.unflatten(1, (self.chunks, self.chunk))  # G N C E

    def bands(self, taps: Tensor) -> Tensor:
        """Row i of a band holds token i's taps from column i on."""
        if self.dynamic:
            taps = self.place(taps.flatten(2)).unflatten(3, taps.shape[2:])  # G N C H K
            taps = taps.transpose(2, 3).flatten(0, 2)
        else:
            taps = taps[:, None].expand(-1, self.chunk, -1)
        band = taps.new_zeros(len(taps), self.chunk, self.window, dtype=self.dtype)
        self._slanted(band).copy_(taps)
        return band

    def learn(self, dtaps: Tensor, dbands: Tensor) -> None:
        """Adds the gradient of the bands to that of the taps."""
        found = self._slanted(dbands)
        if self.dynamic:
            found = found.unflatten(0, (-1, self.chunks, self.heads)).transpose(2, 3)
            self.place(dtaps.flatten(2)).copy_(found.flatten(3))
        else:
            dtaps.add_(found.sum(1))

    def tokens(self, matrices: Tensor) -> Tensor:
        """The inverse of `outputs` and `windows`: G N X E."""
        count = self.chunks
        if self.dynamic:
            return matrices.unflatten(0, (-1, count, self.heads)).transpose(2, 3).flatten(3)
        batch = self.rows.stop - self.rows.start
        return matrices.unflatten(2, (batch, count, -1)).permute(2, 3, 1, 0, 4).flatten(3)

    def overlay(self, dx: Tensor, dwindows: Tensor) -> None:
        """Adds windows that overlap, what lies within one chunk at a time."""
        for at in range(0, self.window, self.chunk):
            part = dwindows[:, :, at : at + self.chunk]
            size = part.shape[2]
            span = (self.chunks - 1) * self.chunk + size
            to = dx[self.rows].narrow(1, self.start + at, span).unfold(1, size, self.chunk)
            to.add_(part.transpose(2, 3))

    @property
    def reach(self) -> int:
        return self.window - self.chunk

    def _matrices(self, x: Tensor) -> Tensor:
        x = x.unflatten(3, (self.heads, -1)).to(self.dtype)  # G N X H D
        if self.dynamic:
            return x.transpose(2, 3).flatten(0, 2)
        return x.permute(3, 2, 0, 1, 4).flatten(2)

    def _slanted(self, band: Tensor) -> Tensor:
        size = len(band), self.chunk, self.reach + 1
        return band.as_strided(size, (self.chunk * self.window, self.window + 1, 1))


def _pieces(y: Tensor, taps: Tensor) -> Iterator[_Piece]:
    (batch, length, width), (heads, count) = y.shape, taps.shape[-2:]
    if not y.numel():
        return
    dtype = torch.promote_types(shapes.wide(y), shapes.wide(taps))
    chunk = min(CHUNK, length)
    # All of a piece stays in cache: windows, outputs and bands together are about a quarter block.
    block = shapes.BLOCK / 4
    token = (width + heads * chunk) * (chunk + count - 1) / chunk
    rows = max(1, int(block / (token * length)))
    chunks = max(1, int(block / (token * chunk * min(rows, batch))))
    whole = length // chunk
    spans = [(n * chunk, min(chunks, whole - n), chunk) for n in range(0, whole, chunks)]
    if rest := length % chunk:
        spans.append((whole * chunk, 1, rest))
    for start in range(0, batch, rows):
        for span in spans:
            among = slice(start, min(start + rows, batch))
            window = span[2] + count - 1
            yield _Piece(among, *span, window, heads, taps.dim() == 4, dtype)


class _Bands(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps)
        y = x.new_empty(x.shape[0], x.shape[1] - taps.shape[-1] + 1, x.shape[2])
        for piece in _pieces(y, taps):
            out = torch.bmm(piece.bands(taps), piece.windows(x))
            piece.place(y).copy_(piece.tokens(out))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, taps = ctx.saved_tensors
        dx = torch.zeros_like(x, dtype=shapes.wide(x), memory_format=torch.contiguous_format)
        dtaps = torch.zeros_like(
            taps, dtype=shapes.wide(taps), memory_format=torch.contiguous_format
        )
        for piece in _pieces(dy, taps):
            out = piece.outputs(dy)
            piece.overlay(dx, piece.tokens(torch.bmm(piece.bands(taps).mT, out)))
            piece.learn(dtaps, torch.bmm(out, piece.windows(x).mT))
        return dx.to(x.dtype), dtaps.to(taps.dtype)


_banded: Any = torch.compiler.disable(_Bands.apply)  # loops over pieces: eager under compile
