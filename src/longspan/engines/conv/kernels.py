"""Diagonal plus low-rank state spaces, and systems given as dense matrices: kernels and states.

Letters: B batch, E features (each its own system), L tokens, M conjugate pairs, C tokens a chunk.
"""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longspan.engines.conv import shapes
from longspan.engines.conv.shapes import PairState, Signal, readout
from longspan.engines.conv.systems import LowRank, krylov


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
    return shapes.as_complex(row[:, 0].contiguous()).conj() / 2


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
    exact = shapes.exact(c.device)
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
    group = max(1, shapes.BLOCK // eigenvalues.numel())
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
    wide = shapes.wide(u)
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
    wide = shapes.wide(u)
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
