"""Sequences as functions of t in [0, 1]: a ridge fit on Gaussian bases, read under a density."""

import math
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Density = Literal["softmax", "sparsemax"]


def gaussian(t: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """N(t; mean, variance)."""
    return (-((t - mean) ** 2) / (2 * variance)).exp() / (2 * math.pi * variance).sqrt()


@lru_cache(maxsize=8)
def bases(count: int, widths: tuple[float, ...]) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Centres and deviations of ψ_1 … ψ_N: for each width, N / widths evenly over [0, 1]."""
    each = count // len(widths)
    centres = torch.linspace(0, 1, each, dtype=torch.float64).repeat(len(widths))
    return centres, torch.tensor(widths, dtype=torch.float64).repeat_interleave(each)


@lru_cache(maxsize=32)
def regression(
    count: int,
    widths: tuple[float, ...],
    *,
    old: int,
    new: int,
    share: float,
    penalty: float,
) -> Float[Tensor, "S N"]:
    """G = Fᵀ (F Fᵀ + λ I)^(−1), for which Xᵀ G fits X at its S = old + new positions.

    Old ones lie at share · m / old, new ones evenly on (share, 1]; without old ones, in the middles
    of as many equal parts. Half as many again on either side of [0, 1] stand for zeros, whose rows
    of G are cut off: they keep the fit from running wild at the ends.
    """
    points = old + new
    apart = torch.arange(-(points // 2), points + points // 2, dtype=torch.float64)
    apart = (apart + 0.5) / points
    inside = apart[(apart > 0) & (apart < 1)]
    if old:
        step = torch.arange(1, max(old, new) + 1, dtype=torch.float64)
        inside = torch.cat([share * step[:old] / old, share + (1 - share) * step[:new] / new])
    below, above = apart[apart < 0], apart[apart > 1]
    t = torch.cat([below, inside, above])
    centres, deviations = bases(count, widths)
    f = gaussian(t, centres[:, None], deviations[:, None] ** 2)  # N P
    g = torch.linalg.solve(f @ f.mT + penalty * torch.eye(count, dtype=f.dtype), f).mT
    return g[len(below) : len(below) + points].contiguous()


def expected(
    mean: Float[Tensor, "*q"],
    variance: Float[Tensor, "*q"],
    centres: Float[Tensor, "N"],
    deviations: Float[Tensor, "N"],
    density: Density,
) -> Float[Tensor, "*q N"]:
    """r_j = E_p ψ_j in closed form, p the normal density (`softmax`) or the truncated parabola

    p(t) = c − (t − μ)² / 2σ² where positive,   c = (3 / 2σ)^(2/3) / 2       (`sparsemax`).
    """
    mean, variance = mean[..., None], variance[..., None]
    if density == "softmax":
        return gaussian(mean, centres, deviations**2 + variance)
    top, reach = _parabola(variance)
    shift = mean - centres
    low, high = (shift - reach) / deviations, (shift + reach) / deviations
    inside = torch.special.ndtr(high) - torch.special.ndtr(low)
    bell_low, bell_high = ((-(u**2) / 2).exp() / math.sqrt(2 * math.pi) for u in (low, high))
    second = deviations**2 * (inside + low * bell_low - high * bell_high)
    first = deviations * (bell_low - bell_high)
    spread = second - 2 * shift * first + shift**2 * inside  # ∫ (t − μ)² ψ_j over the support
    return top * inside - spread / (2 * variance)


def below(
    t: Float[Tensor, "bins"],
    mean: Float[Tensor, "*q"],
    variance: Float[Tensor, "*q"],
    density: Density,
) -> Float[Tensor, "*q bins"]:
    """P(T ≤ t) under the density."""
    away = t - mean[..., None]
    variance = variance[..., None]
    if density == "softmax":
        return torch.special.ndtr(away / variance.sqrt())
    top, reach = _parabola(variance)
    away = torch.minimum(torch.maximum(away, -reach), reach)
    return 0.5 + top * away - away**3 / (6 * variance)


def _parabola(variance: Tensor) -> tuple[Tensor, Tensor]:
    """Its height c and half its support."""
    top = (9 / (32 * variance)) ** (1 / 3)
    return top, (2 * top * variance).sqrt()


def quantiles(mass: Float[Tensor, "B bins"], u: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """Places in [0, 1] below which the share u of a histogram lies; even within a bin."""
    bins = mass.shape[1]
    heights = mass / mass.sum(1, keepdim=True)
    heights = torch.where(heights.isfinite(), heights, 1 / bins)
    edges = heights.cumsum(1)
    at = torch.searchsorted(edges, u.contiguous()).clamp(max=bins - 1)
    height = heights.gather(1, at)
    within = (u - (edges.gather(1, at) - height)) / height.clamp(min=1e-30)
    return (at + within.clamp(0, 1)) / bins
