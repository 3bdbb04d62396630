"""Shortformer (Press et al., 2020)."""

from longspan.card import Card
from longspan.nn.blockwise import BlockAttention
from longspan.registry import mechanism


@mechanism(
    Card(
        id="shortformer",
        name="Shortformer",
        kind="memory",
        family="training",
        paper="Shortformer: Better Language Modeling using Shorter Inputs",
        cite="Press et al., ACL 2021",
        link="https://arxiv.org/abs/2012.15832",
        what="Adds positions to queries and keys only, so that a segment's vectors can be kept and "
        "attended to by the next under new positions.",
        modes={"causal", "step"},
        time="L*C*E + L*E*E",
        memory="C*E",
        tiny={"width": 24, "heads": 3, "segment": 8, "memory": 8},
        exact={"width": 24, "heads": 3, "segment": 8, "memory": 0},
    )
)
def shortformer(
    *, width: int, heads: int, segment: int = 512, memory: int | None = None
) -> BlockAttention:
    """Position-infused attention to the segment and the L' inputs kept before it (Sec. 4).

        y_i = softmax_j((x_i + P_i) W_q · (x_j + P_j) W_k / √D) x_j W_v W_o

    What was kept has the positions 0 … L' − 1, always, and the segment those after it; the first
    segment, with nothing before it, starts at 0. A text is cut into segments of L tokens however
    it comes: whole, segment by segment, or, as in generation, token by token, where the visible
    positions grow to L' + L and start over at L' + 1. Give the model position=None.

    Args:
        segment: L. memory: L', by default L.
    """
    return BlockAttention(
        width=width,
        heads=heads,
        block=segment,
        memory=segment if memory is None else memory,
        infused=True,
    )
