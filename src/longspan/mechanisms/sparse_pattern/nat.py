"""Neighborhood Attention (Hassani et al., 2022)."""

from collections.abc import Sequence
from typing import Literal

from longspan.card import Card
from longspan.nn.grid import NeighbourhoodAttention
from longspan.registry import mechanism


@mechanism(
    Card(
        id="nat",
        name="Neighborhood Attention (NAT)",
        kind="attention",
        family="sparse-pattern",
        paper="Neighborhood Attention Transformer",
        cite="Hassani et al., CVPR 2023",
        link="https://arxiv.org/abs/2204.07143",
        what="Every cell of a sequence, image or volume sees the same number of nearest cells; at "
        "a border the window is shifted inward.",
        modes={"bidirectional", "causal", "step"},
        time="L*C*D + L*C*V",
        memory="C*D + C*V",
        tiny={"window": 5, "heads": 3},
        exact={"window": 1000001},
    )
)
def nat(
    *,
    causal: bool | Sequence[bool] = False,
    window: int | Sequence[int] = 7,
    shape: Sequence[int] | None = None,
    heads: int | None = None,
    short: Literal["whole", "refuse"] = "whole",
) -> NeighbourhoodAttention:
    """Query i sees the keys s_i … s_i + k − 1 of each axis, s_i = clamp(i − ⌊k/2⌋, 0, L − k).

    The learned bias is indexed by the true j − i (Eq. 2). The causal form (after NATTEN; the paper
    has none) sees max(0, i − k + 1) … i. An even window has no middle and is refused unless causal.

    Args:
        window: k of the paper.
    """
    return NeighbourhoodAttention(
        causal=causal, window=window, shape=shape, heads=heads, short=short
    )
