"""State-space systems: HiPPO's matrices, their structure, and sampling.

Letters: B batch, E features (each its own system), L tokens, M conjugate pairs.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from longspan.engines.conv import shapes
from longspan.engines.conv.shapes import Pairs


def discretise(
    eigenvalues: Pairs, b: Pairs, step: Float[Tensor, "E"], method: Literal["zoh", "bilinear"]
) -> tuple[Pairs, Pairs]:
    """x' = Λ x + b u, sampled every `step`: the transition and input of x_t = a x_{t−1} + b̄ u_t.

    zoh holds u between samples: a = exp(ΔΛ), b̄ = (a − 1)/Λ b; bilinear is the trapezoid rule:
    a = (1 + ΔΛ/2)/(1 − ΔΛ/2), b̄ = Δ b/(1 − ΔΛ/2).
    """
    exact = shapes.exact(eigenvalues.device)
    eigenvalues, b, width = eigenvalues.to(exact), b.to(exact), step.to(exact)[:, None]
    if method == "zoh":
        a = torch.exp(width * eigenvalues)
        return a, (a - 1) / eigenvalues * b
    below = 1 - width * eigenvalues / 2
    return (1 + width * eigenvalues / 2) / below, width * b / below


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
    exact = shapes.exact(system.b.device)
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
