"""Diagonal state spaces: kernel, chunked scan with its own backward, and step.

A state space x_t = A x_{t−1} + B u_t, y_t = C x_t is, with a fresh state, the convolution of u with
K_l = C A^l B. Real systems come with complex eigenvalues in conjugate pairs: one of each pair is
kept (the axis M), y doubles the real part, and a state holds (re, im) as its last axis. Written
out as 2M real numbers re_1, im_1, re_2, …, the same system is real; `dense` gives its matrices.

Letters: B batch, E features (each its own system), L tokens, M conjugate pairs, C tokens a chunk.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engines.conv import shapes
from longspan.engines.conv.shapes import Pairs, PairState, Signal, readout


def _ladder(a: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """a^(m i) and a^j whose products are at least `count` powers; a: E M → E X M, E m M."""
    fine = _powers(a, 1 << max(0, math.ceil(math.log2(count) / 2)))
    return _powers(fine[:, -1] * a, -(-count // fine.shape[1])), fine


def _powers(a: Tensor, count: int) -> Tensor:
    rows, square = torch.ones_like(a)[:, None], a[:, None]
    while rows.shape[1] < count:
        rows, square = torch.cat([rows, rows * square], 1), square * square
    return rows if rows.shape[1] == count else rows[:, :count]


def _power(a: Tensor, count: int) -> Tensor:
    result = torch.ones_like(a)
    while count:
        if count % 2:
            result = result * a
        a, count = a * a, count // 2
    return result


def _product(coarse: Tensor, fine: Tensor, dtype: torch.dtype) -> Tensor:
    """E X M and E Y M → real pairs E (X Y) 2M."""
    table = coarse.to(dtype.to_complex())[:, :, None] * fine.to(dtype.to_complex())[:, None]
    return torch.view_as_real(table.flatten(1, 2)).flatten(2)


def diagonal_kernel(a: Pairs, v: Pairs, length: int, dtype: torch.dtype) -> Float[Tensor, "E K"]:
    """K_l = 2 Re Σ_m v_m a_m^l for l < length (a Vandermonde product), v = c b̄.

    With l = i·m + j it is one real product of two tables of √length powers each.
    """
    coarse, fine = _ladder(a.to(shapes.exact(a.device)), length)
    left, right = readout(v[:, None] * coarse), torch.view_as_real(fine).flatten(2)
    taps = (left.to(dtype) @ right.to(dtype).mT).flatten(1)
    return taps if taps.shape[1] == length else taps[:, :length]


def diagonal(
    u: Signal,
    a: Pairs,
    v: Pairs,
    state: PairState | None = None,
    *,
    skip: Float[Tensor, "E"] | None = None,
    chunk: int = 64,
) -> tuple[Signal, PairState]:
    """x_t = a x_{t−1} + u_t, y_t = 2 Re Σ_m v_m x_tm + skip u_t, and the last x.

    The input weight is part of v = c b̄. Two levels, real products only: within chunks of C tokens
    a Toeplitz matrix; from chunk to chunk the state, read out by powers of a. Time is
    O(B E L (C + M)), memory that of u and y; any length, computed in at least float32.
    """
    wide = shapes.wide(u)
    chunk = min(chunk, u.shape[2])
    if state is None:
        state = u.new_zeros(*u.shape[:2], a.shape[1], 2, dtype=wide)
    if chunk == 0:
        return u, state
    with torch.autocast(u.device.type, enabled=False):
        a, v = a.to(shapes.exact(a.device)), v.to(shapes.exact(a.device))
        kernel = diagonal_kernel(a, v, chunk, wide)
        if skip is not None:
            kernel = kernel + F.pad(skip.to(wide)[:, None], (0, chunk - 1))
        coarse, fine = _ladder(a, chunk)
        write = _product(coarse.flip(1), fine.flip(1), wide)  # …, a^(C−1), …, a^0
        read = _product((2 * v * a).conj()[:, None] * coarse.conj(), fine.conj(), wide)
        if write.shape[1] > chunk:
            write, read = write[:, -chunk:], read[:, :chunk]
        rest = u.shape[2] % chunk
        hops = [torch.view_as_real(_power(a, n).to(wide.to_complex())) for n in (chunk, rest)]
        return _chunked(u, kernel, write, read, *hops, state.to(wide))


class _Piece(NamedTuple):
    """Tokens that one round of products covers: `chunks` chunks of `chunk` tokens each."""

    start: int
    chunks: int
    chunk: int

    def load(self, x: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """B E L → E (chunks B) C, as one matrix a feature."""
        tokens = x[:, rows, self.start : self.start + self.chunks * self.chunk]
        tokens = tokens.unflatten(2, (self.chunks, self.chunk)).permute(1, 2, 0, 3)
        # Of unit stride along C, or every product would copy it matrix by matrix.
        return tokens.to(dtype).contiguous().flatten(1, 2)

    def store(self, x: Tensor, rows: slice, values: Tensor) -> None:
        tokens = x[:, rows, self.start : self.start + self.chunks * self.chunk]
        tokens = tokens.unflatten(2, (self.chunks, self.chunk))
        tokens.copy_(values.unflatten(1, (self.chunks, -1)).permute(2, 0, 1, 3))


class _Diagonal(torch.autograd.Function):
    """The chunked products of `diagonal`, with states made anew in the backward pass.

    u: B E L; kernel: E C; write, read: E C 2M; hop, rest_hop: E M 2; state: B E M 2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        kernel: Tensor,
        write: Tensor,
        read: Tensor,
        hop: Tensor,
        rest_hop: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y, last = torch.empty_like(u), torch.empty_like(state)
        chunk = kernel.shape[1]
        pieces, groups = _Diagonal.plan(u, chunk)
        borders = state.new_empty(len(pieces), *state.shape)
        for rows in groups:
            near = shapes.toeplitz(kernel[rows])
            x = state[:, rows]
            for index, piece in enumerate(pieces):
                borders[index][:, rows] = x
                c = piece.chunk
                tokens = piece.load(u, rows, kernel.dtype)
                jump = hop if c == chunk else rest_hop
                states = _carry(tokens, write[rows, chunk - c :], jump[rows], x)
                out = torch.bmm(tokens, near[:, :c, :c])
                before = states[:, : piece.chunks].flatten(1, 2)
                piece.store(y, rows, out.baddbmm_(before, read[rows, :c].mT))
                x = states[:, -1].unflatten(2, (-1, 2)).transpose(0, 1)
            last[:, rows] = x
        ctx.save_for_backward(u, kernel, write, read, hop, rest_hop, borders)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor, ...]:
        u, kernel, write, read, hop, rest_hop, borders = ctx.saved_tensors
        chunk = kernel.shape[1]
        pieces, groups = _Diagonal.plan(u, chunk)
        du, dstate = torch.empty_like(u), torch.empty_like(dlast)
        dkernel = torch.empty_like(kernel)
        dwrite, dread, dhop, drest = (torch.zeros_like(t) for t in (write, read, hop, rest_hop))
        for rows in groups:
            near = shapes.toeplitz(kernel[rows])
            dnear = torch.zeros_like(near)
            dx = dlast[:, rows]
            for index in reversed(range(len(pieces))):
                piece = pieces[index]
                c, count = piece.chunk, piece.chunks
                jump, djump = (hop, dhop) if c == chunk else (rest_hop, drest)
                into, out_of = write[rows, chunk - c :], read[rows, :c]
                tokens = piece.load(u, rows, kernel.dtype)
                dout = piece.load(dy, rows, kernel.dtype)
                states = _carry(tokens, into, jump[rows], borders[index][:, rows])
                dstates = _carry(dout, out_of, jump[rows], dx, backwards=True)
                before, after = states[:, :count].flatten(1, 2), dstates[:, 1:].flatten(1, 2)
                dtokens = torch.bmm(dout, near[:, :c, :c].mT)
                piece.store(du, rows, dtokens.baddbmm_(after, into.mT))
                dnear[:, :c, :c].baddbmm_(tokens.mT, dout)
                dwrite[rows, chunk - c :].baddbmm_(tokens.mT, after)
                dread[rows, :c].baddbmm_(dout.mT, before)
                turned = shapes.as_complex(before).conj() * shapes.as_complex(after)
                djump[rows] += torch.view_as_real(turned.sum(1))
                dx = dstates[:, 0].unflatten(2, (-1, 2)).transpose(0, 1)
            dkernel[rows] = shapes.diagonal_sums(dnear)
            dstate[:, rows] = dx
        return du, dkernel, dwrite, dread, dhop, drest, dstate

    @staticmethod
    def plan(u: Tensor, chunk: int) -> tuple[list[_Piece], list[slice]]:
        """Pieces in order, the ragged last chunk on its own, and groups of features."""
        batch, features, length = u.shape
        group = min(features, max(1, shapes.BLOCK // (max(batch, 1) * chunk * 16)))
        span = max(1, shapes.BLOCK // (max(batch, 1) * group * chunk))
        whole = length // chunk
        pieces = [
            _Piece(start * chunk, min(span, whole - start), chunk)
            for start in range(0, whole, span)
        ]
        if rest := length % chunk:
            pieces.append(_Piece(whole * chunk, 1, rest))
        return pieces, [slice(at, min(at + group, features)) for at in range(0, features, group)]


_chunked: Any = torch.compiler.disable(_Diagonal.apply)  # loops over chunks: eager under compile


def _carry(
    tokens: Tensor, write: Tensor, hop: Tensor, state: Tensor, *, backwards: bool = False
) -> Tensor:
    """States at all borders of chunks: s_{i+1} = hop s_i + tokens_i write, E (N + 1) B 2M.

    `backwards`: s_i = hop* s_{i+1} + tokens_i write, from the last border to the first.
    """
    features, batch = tokens.shape[0], state.shape[0]
    count = tokens.shape[1] // batch
    states = tokens.new_empty(features, count + 1, batch, write.shape[2])
    first = 0 if backwards else 1
    states[:, first : first + count] = torch.bmm(tokens, write).unflatten(1, (count, batch))
    states[:, count if backwards else 0] = state.transpose(0, 1).flatten(2)
    pairs, turn = shapes.as_complex(states), torch.view_as_complex(hop.contiguous())[:, None]
    turn = turn.conj().resolve_conj() if backwards else turn
    slots = pairs.unbind(1)
    if backwards:
        slots = slots[::-1]
    for before, after in pairwise(slots):
        after.addcmul_(turn, before)
    return states


def diagonal_step(
    u: Float[Tensor, "B E"], a: Pairs, v: Pairs, state: PairState | None = None
) -> tuple[Float[Tensor, "B E"], PairState]:
    """One token of `diagonal`, in O(E M)."""
    wide = shapes.wide(u)
    x = u.to(wide)[..., None] + 0j
    if state is not None:
        x = x + a.to(x.dtype) * torch.view_as_complex(state.to(wide))
    y = 2 * (v.to(x.dtype) * x).real.sum(-1)
    return y.to(u.dtype), torch.view_as_real(x.expand(-1, -1, a.shape[1]).contiguous())
