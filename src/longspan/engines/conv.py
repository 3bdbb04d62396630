"""Long convolutions and linear state spaces, whole, in chunks and by step.

A state space x_t = A x_{t−1} + B u_t, y_t = C x_t is, with a fresh state, the convolution of u with
K_l = C A^l B. Real systems come with complex eigenvalues in conjugate pairs: one of each pair is
kept (the axis M), y doubles the real part, and a state holds (re, im) as its last axis. Written
out as 2M real numbers re_1, im_1, re_2, …, the same system is real; `dense` gives its matrices.

Letters: B batch, E features (each its own system), L tokens, M conjugate pairs, C tokens a chunk.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Pairs = Complex[Tensor, "E M"]
Signal = Float[Tensor, "B E L"]
Kernel = Float[Tensor, "E K"]
PairState = Float[Tensor, "B E M 2"]

# Elements of one temporary, 4 MiB in float32: larger ones are given back to the system at every
# free and fault in anew.
_BLOCK = 1 << 20


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _exact(device: torch.device) -> torch.dtype:
    """The complex type small tables are made in: double wherever the device has it."""
    return torch.complex64 if device.type == "mps" else torch.complex128


def convolve(u: Signal, kernel: Kernel, *, origin: int = 0) -> Signal:
    """y_i = Σ_j kernel[i − j + origin] u_j by FFT, each feature with its own kernel.

    `origin` is the index of lag 0: 0 makes it causal, K = 2L − 1 with L − 1 reaches both ways.
    Spectra are made anew in the backward pass, so memory is O(E L).
    """
    return _by_spectra(u, kernel, origin)


def _fast_length(least: int) -> int:
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
            k = torch.fft.rfft(kernel[rows].to(_wide(u)), n)
            spectrum = torch.fft.rfft(u[:, rows].to(_wide(u)), n) * k
            y[:, rows] = torch.fft.irfft(spectrum, n)[..., origin : origin + u.shape[2]]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        u, kernel = ctx.saved_tensors
        du, dkernel = torch.empty_like(u), torch.empty_like(kernel)
        for rows, n in _Convolve.groups(u, kernel, ctx.origin):
            grown = F.pad(dy[:, rows].to(_wide(u)), (ctx.origin, 0))
            g = torch.fft.rfft(grown, n)
            k = torch.fft.rfft(kernel[rows].to(_wide(u)), n)
            du[:, rows] = torch.fft.irfft(g * k.conj(), n)[..., : u.shape[2]]
            g = (g * torch.fft.rfft(u[:, rows].to(_wide(u)), n).conj()).sum(0)
            dkernel[rows] = torch.fft.irfft(g, n)[..., : kernel.shape[1]]
        return du, dkernel, None

    @staticmethod
    def groups(u: Tensor, kernel: Tensor, origin: int) -> Iterator[tuple[slice, int]]:
        """Features at a time, and an FFT long enough that what wraps round is cut off."""
        (batch, features, length), taps = u.shape, kernel.shape[1]
        n = _fast_length(max(length + taps - 1 - origin, length + origin, taps))
        group = max(1, _BLOCK // (batch * n))
        for start in range(0, features, group):
            yield slice(start, min(start + group, features)), n


_by_spectra: Any = torch.compiler.disable(_Convolve.apply)


def discretise(
    eigenvalues: Pairs, b: Pairs, step: Float[Tensor, "E"], method: Literal["zoh", "bilinear"]
) -> tuple[Pairs, Pairs]:
    """x' = Λ x + b u, sampled every `step`: the transition and input of x_t = a x_{t−1} + b̄ u_t.

    zoh holds u between samples: a = exp(ΔΛ), b̄ = (a − 1)/Λ b; bilinear is the trapezoid rule:
    a = (1 + ΔΛ/2)/(1 − ΔΛ/2), b̄ = Δ b/(1 − ΔΛ/2).
    """
    exact = _exact(eigenvalues.device)
    eigenvalues, b, width = eigenvalues.to(exact), b.to(exact), step.to(exact)[:, None]
    if method == "zoh":
        a = torch.exp(width * eigenvalues)
        return a, (a - 1) / eigenvalues * b
    below = 1 - width * eigenvalues / 2
    return (1 + width * eigenvalues / 2) / below, width * b / below


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


def readout(c: Complex[Tensor, "*E M"]) -> Float[Tensor, "*E X"]:
    """The real row that takes a state's 2M real numbers to 2 Re(c x)."""
    return 2 * torch.view_as_real(c.conj().resolve_conj()).flatten(-2)


def diagonal_kernel(a: Pairs, v: Pairs, length: int, dtype: torch.dtype) -> Float[Tensor, "E K"]:
    """K_l = 2 Re Σ_m v_m a_m^l for l < length (a Vandermonde product), v = c b̄.

    With l = i·m + j it is one real product of two tables of √length powers each.
    """
    coarse, fine = _ladder(a.to(_exact(a.device)), length)
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
    wide = _wide(u)
    chunk = min(chunk, u.shape[2])
    if state is None:
        state = u.new_zeros(*u.shape[:2], a.shape[1], 2, dtype=wide)
    if chunk == 0:
        return u, state
    with torch.autocast(u.device.type, enabled=False):
        a, v = a.to(_exact(a.device)), v.to(_exact(a.device))
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
            near = _toeplitz(kernel[rows])
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
            near = _toeplitz(kernel[rows])
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
                turned = _complex(before).conj() * _complex(after)
                djump[rows] += torch.view_as_real(turned.sum(1))
                dx = dstates[:, 0].unflatten(2, (-1, 2)).transpose(0, 1)
            dkernel[rows] = _diagonal_sums(dnear)
            dstate[:, rows] = dx
        return du, dkernel, dwrite, dread, dhop, drest, dstate

    @staticmethod
    def plan(u: Tensor, chunk: int) -> tuple[list[_Piece], list[slice]]:
        """Pieces in order, the ragged last chunk on its own, and groups of features."""
        batch, features, length = u.shape
        group = min(features, max(1, _BLOCK // (max(batch, 1) * chunk * 16)))
        span = max(1, _BLOCK // (max(batch, 1) * group * chunk))
        whole = length // chunk
        pieces = [
            _Piece(start * chunk, min(span, whole - start), chunk)
            for start in range(0, whole, span)
        ]
        if rest := length % chunk:
            pieces.append(_Piece(whole * chunk, 1, rest))
        return pieces, [slice(at, min(at + group, features)) for at in range(0, features, group)]


_chunked: Any = torch.compiler.disable(_Diagonal.apply)  # loops over chunks: eager under compile


def _complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


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
    pairs, turn = _complex(states), torch.view_as_complex(hop.contiguous())[:, None]
    turn = turn.conj().resolve_conj() if backwards else turn
    slots = pairs.unbind(1)
    if backwards:
        slots = slots[::-1]
    for before, after in pairwise(slots):
        after.addcmul_(turn, before)
    return states


def _toeplitz(kernel: Tensor) -> Tensor:
    """E C → the matrices [i, j] = kernel[j − i], 0 below the diagonal: E C C."""
    features, taps = kernel.shape
    rows = F.pad(kernel, (0, taps))[:, None].expand(-1, taps, -1).flatten(1)
    # One element fewer a row shifts each row one further to the right.
    return rows[:, : taps * (2 * taps - 1)].view(features, taps, -1)[:, :, :taps]


def _diagonal_sums(matrices: Tensor) -> Tensor:
    """The adjoint of `_toeplitz`."""
    taps = matrices.shape[1]
    rows = F.pad(F.pad(matrices, (0, taps - 1)).flatten(1), (0, taps))
    return rows.unflatten(1, (taps, 2 * taps))[..., :taps].sum(1)


def diagonal_step(
    u: Float[Tensor, "B E"], a: Pairs, v: Pairs, state: PairState | None = None
) -> tuple[Float[Tensor, "B E"], PairState]:
    """One token of `diagonal`, in O(E M)."""
    wide = _wide(u)
    x = u.to(wide)[..., None] + 0j
    if state is not None:
        x = x + a.to(x.dtype) * torch.view_as_complex(state.to(wide))
    y = 2 * (v.to(x.dtype) * x).real.sum(-1)
    return y.to(u.dtype), torch.view_as_real(x.expand(-1, -1, a.shape[1]).contiguous())


def hippo(
    measure: Literal["legs", "legt", "lagt"], size: int
) -> tuple[Float[Tensor, "X X"], Float[Tensor, "X"]]:
    """A and B of c' = A c + B f, the coefficients of f's history in orthogonal polynomials.

    legs: Legendre, all of the past alike; legt: Legendre, a window of length 1; lagt: Laguerre,
    exponentially fading, with −1/2 on the diagonal as in the authors' later code. Double.
    """
    n = torch.arange(size, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    lower = torch.ones(size, size, dtype=torch.float64).tril(-1)
    if measure == "legs":
        return -(root[:, None] * root * lower + torch.diag(n + 1)), root
    if measure == "legt":
        signs = (-1.0) ** (n[:, None] - n)
        return -root[:, None] * root * torch.where(n[:, None] >= n, 1.0, signs), root
    return -(lower + torch.eye(size, dtype=torch.float64) / 2), torch.ones_like(n)


def normal_plus_low_rank(
    measure: Literal["legs", "legt", "lagt"], size: int
) -> tuple[
    Complex[Tensor, "M"], Complex[Tensor, "R M"], Complex[Tensor, "M"], Complex[Tensor, "X X"]
]:
    """Λ, p, b, V of A = V (Λ − p p*) V*, b = V* B: the positive half of each; V is whole.

    A + P Pᵀ is a multiple of the identity plus a skew matrix, whose unitary eigenvectors eigh
    finds in double (eig loses them). `size` is even. V is [V₊, conj V₊], p and b follow suit.
    """
    a, b = hippo(measure, size)
    n = torch.arange(size, dtype=torch.float64)
    if measure == "legs":
        low = (n + 0.5).sqrt()[None]
    elif measure == "legt":
        low = (2 * n + 1).sqrt() * torch.stack([n % 2 == 0, n % 2 == 1])
    else:
        low = torch.full((1, size), 0.5, dtype=torch.float64).sqrt()
    normal = a + low.mT @ low
    real = normal.diagonal().mean()
    skew = (normal - normal.mT) / 2
    turns, vectors = torch.linalg.eigh(skew * -1j)
    upper, turns = vectors[:, size // 2 :], turns[size // 2 :]
    return (
        real + 1j * turns,
        low.to(upper.dtype) @ upper.conj(),
        upper.mH @ b.to(upper.dtype),
        torch.cat([upper, upper.conj()], 1),
    )


def spectrum(
    init: Literal["lin", "inv", "legs", "real"], size: int
) -> tuple[Complex[Tensor, "M"], Complex[Tensor, "M"]]:
    """Λ and b of a diagonal system of `size` states, one of each conjugate pair.

    lin: −1/2 + iπn; inv: −1/2 + i (N/π)(N/(2n+1) − 1); real: −(n+1), all with b = 1; legs: those
    of HiPPO-LegS without its low-rank part. Double.
    """
    if init == "legs":
        eigenvalues, _, b, _ = normal_plus_low_rank("legs", size)
        return eigenvalues, b
    n = torch.arange(size // 2, dtype=torch.float64)
    if init == "lin":
        eigenvalues = -0.5 + 1j * math.pi * n
    elif init == "inv":
        eigenvalues = -0.5 + 1j * (size / math.pi) * (size / (2 * n + 1) - 1)
    else:
        eigenvalues = -(n + 1) + 0j
    return eigenvalues, torch.ones_like(eigenvalues)


class LowRank(NamedTuple):
    """x' = (Λ − p p*) x + b u, one of each conjugate pair, sampled every `step` (bilinear)."""

    eigenvalues: Complex[Tensor, "E M"]
    p: Complex[Tensor, "E R M"]
    b: Complex[Tensor, "E M"]
    step: Float[Tensor, "E"]


def dense(system: LowRank) -> tuple[Float[Tensor, "E X X"], Float[Tensor, "E X"]]:
    """Transition and input of the sampled system as real matrices on 2M numbers, in double.

    A_d = (I − Δ/2 A)⁻¹ (I + Δ/2 A),   B_d = (I − Δ/2 A)⁻¹ Δ B
    """
    exact = _exact(system.b.device)
    eigenvalues, p, b = (t.to(exact) for t in system[:3])
    step = system.step.to(eigenvalues.real.dtype)[:, None, None]
    turn = torch.stack(
        [eigenvalues.real, -eigenvalues.imag, eigenvalues.imag, eigenvalues.real], -1
    ).unflatten(-1, (2, 2))
    blocks = torch.eye(turn.shape[1], dtype=turn.dtype, device=turn.device)[:, None, :, None]
    a = (blocks * turn[:, :, :, None]).flatten(3).flatten(1, 2)
    low = torch.view_as_real(p.resolve_conj()).flatten(2)
    a = (a - 2 * low.mT @ low) * step / 2
    unit = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    input = torch.view_as_real(b.resolve_conj()).flatten(1)[..., None] * step
    both = torch.linalg.solve(unit - a, torch.cat([unit + a, input], -1))
    return both[..., :-1], both[..., -1]


def krylov(
    transition: Float[Tensor, "E X X"], start: Float[Tensor, "E X"], count: int
) -> Float[Tensor, "E K X"]:
    """start, A start, A² start, … by doubling, `count` rows."""
    rows = start[:, None]
    while rows.shape[1] < count:
        rows = torch.cat([rows, rows @ transition.mT], 1)
        transition = transition @ transition
    return rows[:, :count]


def truncated(
    c: Complex[Tensor, "E M"], transition: Float[Tensor, "E X X"], length: int
) -> Complex[Tensor, "E M"]:
    """C̃ = C (I − A^length), whose generating function at the roots of unity is that of L taps."""
    row = readout(c)[:, None].to(transition.dtype)
    return _column(row - row @ torch.linalg.matrix_power(transition, length))


def untruncated(
    c: Complex[Tensor, "E M"], transition: Float[Tensor, "E X X"], length: int
) -> Complex[Tensor, "E M"]:
    """C = C̃ (I − A^length)⁻¹."""
    unit = torch.eye(transition.shape[-1], dtype=transition.dtype, device=transition.device)
    faded = unit - torch.linalg.matrix_power(transition, length)
    return _column(torch.linalg.solve(faded, readout(c)[:, None].to(unit.dtype), left=False))


def doubled(
    c: Complex[Tensor, "E M"], transition: Float[Tensor, "E X X"], length: int
) -> Complex[Tensor, "E M"]:
    """C̃ for 2·length from C̃ for length: C̃ (I + A^length)."""
    row = readout(c)[:, None].to(transition.dtype)
    return _column(row + row @ torch.linalg.matrix_power(transition, length))


def _column(row: Tensor) -> Tensor:
    """The complex row that `readout` wrote as E 1 2M."""
    return _complex(row[:, 0].contiguous()).conj() / 2


def low_rank_kernel(
    system: LowRank, c: Complex[Tensor, "E M"], length: int, dtype: torch.dtype
) -> Float[Tensor, "E K"]:
    """The taps C A_d^l B_d, l < length, from C̃ = C (I − A_d^length), given as `c`.

    At the roots of unity z = e^{−iθ}, with k_xy = Σ_n x_n y_n/(g − λ_n), g = (2/Δ)(1−z)/(1+z),

        K̂(z) = 2/(1+z) [ k_CB − k_Cp (I + k_p*p)⁻¹ k_p*B ]

    and an inverse FFT. Since 1 − z = e^{−iθ/2} 2i sin(θ/2) and 1 + z = e^{−iθ/2} 2 cos(θ/2), the
    sums are made over 1/(iη − sλ), η = (4/Δ) sin(θ/2), s = 2 cos(θ/2): finite at z = −1 too.
    Memory is O(E (M + L)): some nodes at a time, and again in the backward pass.
    """
    exact = _exact(c.device)
    eigenvalues, p, b, c = (t.to(exact) for t in (*system[:3], c))
    rank = p.shape[1]
    left, right = torch.cat([c[:, None], p.conj()], 1), torch.cat([b[:, None], p], 1)
    v = (left[:, :, None] * right[:, None]).flatten(1, 2)  # E (1+R)² M
    sums = torch.cat([v.real, (v * eigenvalues.conj()[:, None]).real], 1).mT * 2

    def nodes(theta: Tensor, modulus: Tensor, decay: Tensor, step: Tensor, sums: Tensor) -> Tensor:
        eta = 4 / step[:, None] * (theta / 2).sin()  # E X
        s = 2 * (theta / 2).cos()
        # 1/((iη − sλ)(iη − s conj λ)), its real part as a product lest η ≈ s|λ| cancel.
        real = (s[:, None] * modulus[:, None] - eta[..., None]) * (
            s[:, None] * modulus[:, None] + eta[..., None]
        )
        imag = -2 * eta[..., None] * s[:, None] * decay[:, None]
        norm = (real.square() + imag.square()).reciprocal()
        at_real, at_imag = (real * norm) @ sums, (imag * norm) @ -sums
        first, second = at_real.shape[-1] // 2, s[:, None]
        k = torch.complex(
            -eta[..., None] * at_imag[..., :first] - second * at_real[..., first:],
            eta[..., None] * at_real[..., :first] - second * at_imag[..., first:],
        ).unflatten(-1, (1 + rank, 1 + rank))
        s = s[:, None, None]
        unit = torch.eye(rank, dtype=k.dtype, device=k.device)
        inner = torch.linalg.solve(unit + s * k[..., 1:, 1:], k[..., 1:, :1])
        value = (k[..., :1, :1] - s * k[..., :1, 1:] @ inner)[..., 0, 0]
        return 2 * torch.polar(torch.ones_like(theta), theta / 2) * value

    theta = torch.arange(length // 2 + 1, device=c.device, dtype=sums.dtype) * (
        2 * math.pi / length
    )
    inputs = [t.to(dtype) for t in (eigenvalues.abs(), eigenvalues.real, system.step, sums)]
    group = max(1, _BLOCK // eigenvalues.numel())
    parts = [
        checkpoint(nodes, part.to(dtype), *inputs, use_reentrant=False, preserve_rng_state=False)
        for part in theta.split(group)
    ]
    return torch.fft.irfft(torch.cat(parts, 1), length)


def low_rank_step(
    u: Float[Tensor, "B E"],
    system: LowRank,
    c: Complex[Tensor, "E M"],
    state: PairState | None = None,
) -> tuple[Float[Tensor, "B E"], PairState]:
    """One token in O(E M R): x_t = (2/Δ − A)⁻¹ [(2/Δ + A) x_{t−1} + 2 B u_t], y_t = 2 Re(C x_t).

    By Woodbury, with D = (2/Δ − Λ)⁻¹, the inverse is D − D p (I + p* D p)⁻¹ p* D.
    """
    wide = _wide(u)
    eigenvalues, p, b, c = (t.to(wide.to_complex()) for t in (*system[:3], c))
    rate = 2 / system.step.to(wide)[:, None]
    driven = 2 * b * u.to(wide)[..., None]
    if state is not None:
        x = torch.view_as_complex(state.to(wide))
        driven = driven + (rate + eigenvalues) * x - _span(p, _measure(p, x))
    spread = p / (rate - eigenvalues)[:, None]  # D p
    unit = torch.eye(p.shape[1], dtype=wide, device=u.device)
    inner = unit + 2 * (p.conj() @ spread.mT).real
    y = driven / (rate - eigenvalues)
    x = y - _span(spread, torch.linalg.solve(inner, _measure(p, y)[..., None])[..., 0])
    return (2 * (c * x).real.sum(-1)).to(u.dtype), torch.view_as_real(x)


def _measure(p: Tensor, x: Tensor) -> Tensor:
    """p* x over both halves, real: E R M, B E M → B E R."""
    return 2 * (p.conj() * x[:, :, None]).real.sum(-1)


def _span(p: Tensor, weights: Tensor) -> Tensor:
    return (p * weights[..., None]).sum(2)


def dense_state(
    u: Signal,
    transition: Float[Tensor, "E X X"],
    input: Float[Tensor, "E X"],
    state: Float[Tensor, "B E X"] | None = None,
    *,
    chunk: int = 64,
) -> Float[Tensor, "B E X"]:
    """x_L of x_t = A x_{t−1} + B u_t: a product within chunks, a loop from chunk to chunk."""
    wide = _wide(u)
    chunk = min(chunk, max(1, u.shape[2]))
    write = krylov(transition, input, chunk).to(wide).flip(1)  # E C X
    hop = torch.linalg.matrix_power(transition, chunk).to(wide)
    if state is None:
        state = u.new_zeros(*u.shape[:2], input.shape[1], dtype=wide)
    x = state.to(wide)
    whole = u.shape[2] // chunk * chunk
    tokens = u[..., :whole].to(wide).unflatten(2, (-1, chunk)) if whole else u.new_zeros(0)
    inputs = torch.einsum("benc,ecx->nbex", tokens, write) if whole else ()
    for part in inputs:
        x = torch.einsum("bex,eyx->bey", x, hop) + part
    if rest := u.shape[2] - whole:
        x = torch.einsum("bex,eyx->bey", x, torch.linalg.matrix_power(transition, rest).to(wide))
        x = x + torch.einsum("bec,ecx->bex", u[..., whole:].to(wide), write[:, chunk - rest :])
    return x


def dense_response(
    state: Float[Tensor, "B E X"],
    transition: Float[Tensor, "E X X"],
    c: Float[Tensor, "E X"],
    length: int,
    *,
    chunk: int = 64,
) -> Float[Tensor, "B E L"]:
    """C A^{l+1} x for l < length: what a carried state adds to the outputs."""
    chunk = min(chunk, max(1, length))
    read = krylov(transition.mT, (c[:, None].to(transition.dtype) @ transition)[:, 0], chunk).to(
        state.dtype
    )
    hop = torch.linalg.matrix_power(transition, chunk).to(state.dtype)
    states = [state]
    for _ in range(chunk, length, chunk):
        states.append(torch.einsum("bex,eyx->bey", states[-1], hop))
    return torch.einsum("nbex,ecx->benc", torch.stack(states), read).flatten(2)[..., :length]
