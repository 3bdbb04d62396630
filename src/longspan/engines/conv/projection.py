"""Online projection onto orthogonal polynomials: measures, bases, sampling, and updates.

c' = A c + B f keeps the coefficients of f's history; `basis` evaluates what they stand for.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Measure = Literal["legs", "legt", "lmu", "lagt"]


def measure(
    name: Measure, size: int, *, theta: float = 1.0, alpha: float = 0.0, beta: float = 1.0
) -> tuple[Float[Tensor, "N N"], Float[Tensor, "N"]]:
    """A and B in double. legs: for c' = (A c + B f)/t; the others as they are.

    legt: a window of `theta`, orthonormal; lmu: the same in the LMU's scaling; lagt: generalised
    Laguerre of `alpha`, tilted by `beta`: 1 has −1 on the diagonal (the paper), 0 has −1/2.
    """
    n = torch.arange(size, dtype=torch.float64)
    root, below = (2 * n + 1).sqrt(), n[:, None] >= n
    signs = (-1.0) ** (n[:, None] - n)
    if name == "legs":
        return -(root[:, None] * root).tril(-1) - torch.diag(n + 1), root
    if name == "legt":
        return -root[:, None] * root * torch.where(below, 1.0, signs) / theta, root / theta
    if name == "lmu":
        rows = (2 * n + 1) / theta
        return rows[:, None] * torch.where(below, -signs, -1.0), rows * (-1.0) ** n
    norm = _laguerre_norm(n, alpha)
    a = -torch.ones(size, size, dtype=n.dtype).tril(-1) - (1 + beta) / 2 * torch.eye(size)
    start = (torch.lgamma(n + alpha + 1) - torch.lgamma(n + 1)).exp()
    start = start / torch.lgamma(torch.tensor(alpha + 1.0, dtype=n.dtype)).exp()
    return a / norm[:, None] * norm, start / norm


def _laguerre_norm(n: Tensor, alpha: float) -> Tensor:
    return ((torch.lgamma(n + alpha + 1) - torch.lgamma(n + 1)) / 2).exp()


def basis(
    name: Measure,
    size: int,
    ages: Float[Tensor, "T"],
    *,
    theta: float = 1.0,
    alpha: float = 0.0,
    beta: float = 1.0,
) -> Float[Tensor, "T N"]:
    """What each coefficient contributes at t − age; for legs `theta` is t, all of the past."""
    x = ages.to(torch.float64)
    n = torch.arange(size, dtype=torch.float64, device=x.device)
    if name == "lagt":
        tilt = torch.where(x > 0, x, 0) ** alpha * (-(1 - beta) / 2 * x).exp()
        rows = [torch.ones_like(x), 1 + alpha - x]
        for i in range(1, size - 1):
            rows.append(((2 * i + 1 + alpha - x) * rows[i] - (i + alpha) * rows[i - 1]) / (i + 1))
        return torch.stack(rows[:size], -1) * tilt[:, None] / _laguerre_norm(n, alpha)
    x = 2 * x / theta - 1 if name == "lmu" else 1 - 2 * x / theta
    rows = [torch.ones_like(x), x]
    for i in range(1, size - 1):
        rows.append(((2 * i + 1) * x * rows[i] - i * rows[i - 1]) / (i + 1))
    legendre = torch.stack(rows[:size], -1)
    return legendre if name == "lmu" else legendre * (2 * n + 1).sqrt()


def reconstruct(c: Float[Tensor, "*B N"], at: Float[Tensor, "T N"]) -> Float[Tensor, "*B T"]:
    """f at the times that a `basis` was evaluated at."""
    return c @ at.to(c).mT


def sample(
    a: Float[Tensor, "*K N N"],
    b: Float[Tensor, "*K N"],
    step: float | Float[Tensor, "*K"],
    method: Literal["euler", "backward", "bilinear", "zoh"] | float,
) -> tuple[Float[Tensor, "*K N N"], Float[Tensor, "*K N"]]:
    """A_d = (I − aΔA)⁻¹ (I + (1−a)ΔA), B_d = (I − aΔA)⁻¹ ΔB.

    zoh: A_d = e^{ΔA}, B_d = ∫₀^Δ e^{sA} B ds, without an inverse of A. A number is a;
    euler, bilinear and backward are 0, ½ and 1.
    """
    step = torch.as_tensor(step, dtype=a.dtype, device=a.device)[..., None]
    a, b = a * step[..., None], b * step
    if method == "zoh":
        both = torch.cat([a, b[..., None]], -1)
        grown = torch.linalg.matrix_exp(torch.nn.functional.pad(both, (0, 0, 0, 1)))
        return grown[..., :-1, :-1], grown[..., :-1, -1]
    share = _share(method)
    unit = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    right = torch.cat([unit + (1 - share) * a, b[..., None]], -1)
    both = torch.linalg.solve(unit - share * a, right)
    return both[..., :-1], both[..., -1]


def _share(method: str | float) -> float:
    named = {"euler": 0.0, "backward": 1.0, "bilinear": 0.5}
    return named[method] if isinstance(method, str) else method


def project(
    f: Float[Tensor, "*B L"],
    a: Float[Tensor, "N N"] | Float[Tensor, "L N N"],
    b: Float[Tensor, "N"] | Float[Tensor, "L N"],
    state: Float[Tensor, "*B N"] | None = None,
    *,
    parallel: bool = True,
) -> Float[Tensor, "*B L N"]:
    """c_t = A_t c_{t−1} + B_t f_t for all t; A and B sampled, fixed or given for each t.

    `parallel` doubles spans: O(log L) products, O(L N² log L) for the states of every channel;
    else a loop over tokens in O(L N²).
    """
    length = f.shape[-1]
    a, b = (t.expand(length, *t.shape[-d:]) for t, d in ((a, 2), (b, 1)))
    c = f[..., None] * b.to(f)
    a = a.to(f)
    if state is not None and length:
        first = c[..., :1, :] + (state[..., None, :] @ a[0].mT)
        c = torch.cat([first, c[..., 1:, :]], -2)
    if not parallel:
        outs = list(c.unbind(-2))
        for t in range(1, length):
            outs[t] = outs[t] + (outs[t - 1][..., None, :] @ a[t].mT)[..., 0, :]
        return torch.stack(outs, -2) if outs else c
    reach = 1
    while reach < length:
        moved = (a[reach:] @ c[..., :-reach, :, None])[..., 0]
        c = torch.cat([c[..., :reach, :], c[..., reach:, :] + moved], -2)
        a = torch.cat([a[:reach], a[reach:] @ a[:-reach]], 0)
        reach *= 2
    return c


def scaled(
    size: int, count: int, method: Literal["euler", "backward", "bilinear", "zoh"] | float
) -> tuple[Float[Tensor, "L N N"], Float[Tensor, "L N"]]:
    """LegS sampled at k = 1 … count, of A/k and B/k."""
    a, b = measure("legs", size)
    step = 1 / torch.arange(1, count + 1, dtype=a.dtype)
    return sample(a.expand(count, -1, -1), b.expand(count, -1), step, method)


def legs_update(
    a: Float[Tensor, "N N"],
    b: Float[Tensor, "N"],
    c: Float[Tensor, "B F N"],
    f: Float[Tensor, "B F"],
    k: Int[Tensor, "B"],
    method: str | float,
) -> Float[Tensor, "B F N"]:
    """(I − aA/k)⁻¹ [(I + (1−a)A/k) c + (B/k) f] for LegS's triangular A, in O(N²).

    Each row is at its own k.
    """
    share = _share(method)
    step = 1 / k.to(c)[:, None, None]
    right = c + step * ((1 - share) * c @ a.mT + f[..., None] * b)
    left = torch.eye(len(b), dtype=c.dtype, device=c.device) - share * step * a
    return torch.linalg.solve_triangular(left, right.mT, upper=False).mT


def legs_step(
    c: Float[Tensor, "*B N"], f: Float[Tensor, "*B"], k: Int[Tensor, "*B"]
) -> Float[Tensor, "*B N"]:
    """(I − A/2k)⁻¹ [(I + A/2k) c + (B/k) f] in O(N): both halves are prefix sums over n."""
    n = torch.arange(c.shape[-1], dtype=c.dtype, device=c.device)
    root, half = (2 * n + 1).sqrt(), 0.5 / k.to(c.dtype)[..., None]
    weighed = (root * c).cumsum(-1) - root * c
    right = c - half * ((n + 1) * c + root * weighed) + 2 * half * root * f[..., None]
    columns, total = [], torch.zeros_like(f)
    for i in range(c.shape[-1]):
        new = right[..., i] - half[..., 0] * root[i] * total
        new = new / (1 + half[..., 0] * (i + 1))
        total = total + root[i] * new
        columns.append(new)
    return torch.stack(columns, -1)
