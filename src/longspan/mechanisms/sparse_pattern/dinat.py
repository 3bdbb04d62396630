"""Dilated Neighborhood Attention (Hassani and Shi, 2022)."""

from collections.abc import Sequence
from typing import Literal

from longspan.card import Card
from longspan.nn.grid import NeighbourhoodAttention
from longspan.registry import mechanism


@mechanism(
    Card(
        id="dinat",
        name="Dilated Neighborhood Attention (DiNAT)",
        kind="attention",
        family="sparse-pattern",
        paper="Dilated Neighborhood Attention Transformer",
        cite="Hassani and Shi, 2022",
        link="https://arxiv.org/abs/2209.15001",
        what="Neighborhood attention within every residue class of the positions, so that the same "
        "number of keys reaches further.",
        modes={"bidirectional", "causal", "step"},
        time="L*C*D + L*C*V",
        memory="C*D + C*V",
        tiny={"window": 3, "dilation": 4, "heads": 3},
        exact={"window": 1000001, "dilation": 1},
    )
)
def dinat(
    *,
    causal: bool | Sequence[bool] = False,
    window: int | Sequence[int] = 7,
    dilation: int | Literal["max"] | Sequence[int | Literal["max"]] = 2,
    shape: Sequence[int] | None = None,
    heads: int | None = None,
    short: Literal["whole", "refuse"] = "whole",
) -> NeighbourhoodAttention:
    """Query i sees `window` keys j ≡ i (mod δ), shifted inward within that class (Sec. 3.1).

    The bias is indexed by (j − i) / δ. Stacks alternate δ = 1 (`nat`) with a δ near the largest
    (Sec. 3.3): mixers=["nat", {"id": "dinat", "dilation": 8}], or "max" for ⌊L / window⌋.

    Args:
        dilation: δ of the paper; 1 is `nat`.
    """
    return NeighbourhoodAttention(
        causal=causal, window=window, dilation=dilation, shape=shape, heads=heads, short=short
    )
