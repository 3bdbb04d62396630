"""Layers that lend their attention weights to others."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from longspan.engines import dense, given
from longspan.errors import LongspanError
from longspan.nn.heads import MultiHead, MultiHeadState
from longspan.nn.protocols import Attention, Bias, Position
from longspan.shapes import Context, Inputs, Keep, Marks, Outputs, Queries


class KeptAttention(Attention):
    """softmax(q kᵀ / √D + bias) v; its state is `Lent`, with the weights of the call."""

    takes_bias = True
    grouped = True

    def __init__(self, *, causal: bool, dropout: float) -> None:
        super().__init__(causal=causal)
        self.dropout = dropout

    def forward(
        self,
        q: Queries,
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S V"],
        state: given.Past | None = None,
        *,
        keep: Keep | None = None,
        bias: Bias | None = None,
    ) -> tuple[Outputs, given.Lent]:
        whole = state is None and keep is None
        past = given.extended(state, k, v, keep)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in past[:2])
        at = torch.arange(k.shape[2], device=q.device)
        of_queries = at[k.shape[2] - q.shape[2] :]
        seen = None if whole else past.keep[:, None, None]
        if self.causal:
            order = at <= of_queries[:, None]
            seen = order if seen is None else order & seen
        o, weights, _ = dense.explicit(
            q,
            k,
            v,
            seen=seen,
            bias=bias and bias(q, k, of_queries, at),
            dropout=self.dropout if self.training else 0.0,
        )
        return o, given.Lent(weights, past if self.causal else None)


class Lending(MultiHead):
    """A layer that attends and lends its weights, or a `lazy` one, W_v and W_o around lent ones.

    State goes in and comes out as `Lent(weights, own)`: the weights are of this call, what a layer
    carries to the next is its own.

    Args:
        position, dropout: of the weights, so not of a lazy layer.

    Raises:
        LongspanError: of a lazy layer: no weights; a context or marks, which they know nothing of.
    """

    def __init__(
        self,
        *,
        lazy: bool,
        width: int,
        heads: int,
        head_width: int | None = None,
        kv_heads: int | None = None,
        causal: bool = False,
        position: Position | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            KeptAttention(causal=causal, dropout=dropout),
            width=width,
            heads=heads,
            head_width=head_width,
            kv_heads=kv_heads,
            position=None if lazy else position,
        )
        self.lazy = lazy
        if lazy:
            del self.project["q"], self.project["k"]

    def forward(
        self,
        x: Inputs,
        state: given.Lent | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, given.Lent]:
        if not self.lazy:
            own = None if state is None else state.own
            y, after = super().forward(x, own, keep=keep, context=context, marks=marks)
            assert after is not None
            weights, past = after.attention
            return y, given.Lent(weights, past and MultiHeadState(past, after.seen))
        if state is None or state.weights is None or context is not None or marks is not None:
            raise LongspanError(
                "a lazy layer mixes one sequence by the weights of another layer: give these as "
                "state=Lent(weights, own), and neither context nor marks."
            )
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
        v = rearrange(self.project["v"](x), "B L (H V) -> B H L V", H=self.kv_heads)
        past = given.extended(state.own, v[..., :0], v, keep)
        o = given.mix(state.weights, past.v.repeat_interleave(self.heads // self.kv_heads, 1))
        y = self.output(rearrange(o, "B H L V -> B L (H V)"))
        y = y if keep is None else y.masked_fill(~keep[..., None], 0)
        return y, given.Lent(state.weights, past if self.attention.causal else None)
