"""Performer's first version, FAVOR (Choromanski et al., 2020a)."""

import math
from typing import Literal

import torch
from torch import Tensor

from longspan.card import Card
from longspan.engines import features as feature
from longspan.errors import LongspanError, nearest
from longspan.nn.featured import FeatureAttention
from longspan.registry import mechanism


@mechanism(
    Card(
        id="performer-favor",
        name="Performer with FAVOR",
        kind="attention",
        family="kernel",
        paper="Masked Language Modeling for Proteins via Linearly Scalable Long-Context "
        "Transformers",
        cite="Choromanski et al., 2020",
        link="https://arxiv.org/abs/2006.03555",
        what="Estimates softmax attention by sines and cosines along random directions, or "
        "replaces it by another kernel.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*M*D + L*M*V",
        memory="M*V",
        tiny={"head_width": 8, "features": 16},
    )
)
class PerformerFavor(FeatureAttention):
    """D⁻¹ Q′ (K′ᵀ V) with Q′ = g(Q) φ(Q), K′ = φ(K) h(K) and D = diag(Q′ K′ᵀ 1) (Sec. 2.2).

    Softmax kernel (no `activation`), x = q or k times D^(−1/4): g(x) = h(x) = exp(|x|²/2),

        φ(x) = [cos(w_1·x), …, sin(w_M·x)] / √M, or with `phase` √(2/M) cos(w_i·x + b_i)

    g cancels. The features have both signs, and so may a row's denominator: it is held at least
    `eps` from 0, in units of the largest h(k) so far. Generalised: φ(x) = f(W x) / √M + offset,
    g = h = 1. Hadamard and Givens directions are kept as matrices: one product is faster here
    than their fast transforms.

    Args:
        activation: f; None is the softmax kernel.
        projected: False for φ(x) = f(x) / √D + offset.

    Raises:
        LongspanError: an unknown activation; the softmax kernel without directions.
    """

    phase: Tensor | None

    def __init__(
        self,
        *,
        head_width: int,
        causal: bool = False,
        features: int = 128,
        activation: str | None = None,
        projected: bool = True,
        phase: bool = False,
        directions: Literal["orthogonal", "hadamard", "givens", "iid"] = "orthogonal",
        norms: Literal["chi", "fixed"] = "chi",
        redraw_every: int | None = None,
        seed: int = 0,
        offset: float = 1e-3,
        eps: float = 1e-3,
    ) -> None:
        if activation is not None and activation not in feature.ENTRYWISE:
            raise LongspanError(
                f"performer-favor has no activation '{activation}'"
                f"{nearest(activation, feature.ENTRYWISE)} It has: {', '.join(feature.ENTRYWISE)}."
            )
        if activation is None and not projected:
            raise LongspanError(
                "performer-favor's softmax kernel needs directions: give an activation, or leave "
                "projected=True."
            )
        options = {"kind": directions, "norms": norms, "redraw_every": redraw_every, "seed": seed}
        rows = feature.Directions(features, head_width, **options) if projected else None
        size = head_width if rows is None else features * (2 if activation is None else 1)
        super().__init__(causal=causal, directions=rows, size=size, eps=eps)
        self.activation, self.offset = activation, offset
        draws = torch.rand(features, generator=torch.Generator().manual_seed(seed + 1))
        self.register_buffer("phase", draws * (2 * math.pi) if phase else None)

    def features(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.activation is not None or rows is None:
            f = feature.ENTRYWISE[self.activation or "identity"]
            return feature.generalised(x, rows, f, self.offset)
        x = x * x.shape[-1] ** -0.25
        if self.phase is not None:
            return feature.phased(x, rows, self.phase)
        return feature.trigonometric(x, rows)
