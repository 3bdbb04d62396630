"""Self-attention does not need O(n²) memory (Rabe & Staats, 2021)."""

import math

import torch
from torch import Tensor

from longspan.card import Card
from longspan.engines import pattern, tiles
from longspan.errors import LongspanError
from longspan.nn import Bias
from longspan.nn.tiled import TiledAttention
from longspan.registry import mechanism
from longspan.shapes import Keep


@mechanism(
    Card(
        id="rabe-staats",
        name="Memory-efficient exact attention (Rabe and Staats)",
        kind="attention",
        family="dense",
        paper="Self-attention Does Not Need O(n^2) Memory",
        cite="Rabe & Staats, 2021",
        link="https://arxiv.org/abs/2112.05682",
        what="Softmax attention summed chunk by chunk and divided at the end, so that no matrix "
        "of weights is ever held.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*S*D + L*S*V",
        memory="S*D + S*V",
        tiny={"query_chunk": 128, "key_chunk": 64},
        exact={},
    )
)
class ChunkedAttention(TiledAttention):
    """o_i = Σ_j exp(s_ij − m_i) v_j / Σ_j exp(s_ij − m_i), the division last (Eq. 2).

    Chunks of keys give (Σ exp(s − m) v, Σ exp(s − m), m) each, joined by rescaling to the larger
    m, a constant to the gradient. Every such summary is computed again in the backward pass
    (Sec. 3), and so is every chunk of queries, so that the summaries of one chunk are held at a
    time. The state is every key and value so far.

    Args:
        query_chunk, key_chunk: tokens of a chunk; `key_chunk=None` takes √S keys, for O(√S) memory
            beside inputs and outputs.
        dropout: of the weights, in training, the same whatever the chunks.
        generator: of the dropout, by default torch's global one.

    Raises:
        LongspanError: chunks of no token, a dropout outside 0 ≤ p < 1.
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        query_chunk: int = 1024,
        key_chunk: int | None = 4096,
        dropout: float = 0.0,
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(causal=causal, dropout=dropout, scale=scale, generator=generator)
        if query_chunk < 1 or (key_chunk is not None and key_chunk < 1) or not 0 <= dropout < 1:
            raise LongspanError(
                f"rabe-staats got query_chunk={query_chunk}, key_chunk={key_chunk}, "
                f"dropout={dropout}: chunks hold at least 1 token, and 0 ≤ dropout < 1."
            )
        self.query_chunk, self.key_chunk = query_chunk, key_chunk

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Keep | None, bias: Bias | None, dropout: float
    ) -> Tensor:
        return tiles.attend(
            q,
            k,
            v,
            shape=pattern.causal if self.causal else pattern.everything,
            seen=None if keep is None else keep[:, None, None],
            bias=bias,
            dropout=dropout,
            generator=self.generator,
            scale=self.scale,
            rows=self.query_chunk,
            cols=self.key_chunk or max(1, math.isqrt(k.shape[2])),
            recompute=True,
        )[0]
