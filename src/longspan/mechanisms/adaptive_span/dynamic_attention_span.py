"""Dynamic attention span (Sukhbaatar et al., 2019, Sec. 2.3)."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines.span import Recent
from longspan.nn import MultiHead
from longspan.nn.spanned import SpanAttention
from longspan.registry import mechanism
from longspan.shapes import Inputs, Keep, Keys, Outputs, Queries, Values


class Asked(SpanAttention):
    """Attention over the span that each query asks for, z_i = S σ(asked_i)."""

    extra: dict[str, Literal["q", "k", "v"]] = {"query_span": "q"}  # noqa: RUF012

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: Recent | None = None,
        *,
        keep: Keep | None = None,
        query_span: Float[Tensor, "B H L 1"],
    ) -> tuple[Outputs, Recent]:
        z = self.span * query_span[..., 0].sigmoid()
        if self.training:
            kept = z.new_ones(len(z), z.shape[2]) if keep is None else keep.to(z.dtype)
            self.pays((z.mean(1) * kept).sum() / kept.sum().clamp(min=1))
        # The next token may ask for all.
        return self.reaching(q, k, v, z, state, keep, slack=self.span)


@mechanism(
    Card(
        id="dynamic-attention-span",
        name="Dynamic (input-dependent) attention span",
        kind="mixer",
        family="adaptive-span",
        paper="Adaptive Attention Span in Transformers",
        cite="Sukhbaatar et al., ACL 2019",
        link="https://arxiv.org/abs/1905.07799",
        what="Each token and head decides from the token itself how far back it attends.",
        modes={"causal", "step"},
        time="L*C*E + L*E*E",
        memory="C*E",
        tiny={"width": 24, "heads": 3, "span": 96, "ramp": 8.0, "start": -2.0},
    )
)
class DynamicAttentionSpan(MultiHead):
    """Multi-head attention whose head h at token t reaches back z_t = S σ(v_h·x_t + b_h).

    Otherwise as `adaptive-attention-span`: mask with ramp R, relative keys, S keys at most. Of the
    keys a block of queries meets those that its widest span reaches. In training the loss grows by
    λ · the mean z_t of tokens and heads. The state holds S keys: any token may ask for all.

    Args: those of adaptive-attention-span; start: b.

    Raises:
        LongspanError: a span or ramp below 1.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        head_width: int | None = None,
        span: int = 1024,
        ramp: float = 32.0,
        start: float = -4.0,
        cost: float = 2e-6,
        itself: bool = False,
        relative: bool = True,
        dropout: float = 0.0,
    ) -> None:
        attention = Asked(
            head_width=head_width or width // heads,
            span=span,
            ramp=ramp,
            cost=cost,
            itself=itself,
            relative=relative,
            dropout=dropout,
        )
        super().__init__(attention, width=width, heads=heads, head_width=head_width)
        self.span, asked = span, nn.Linear(width, heads)
        nn.init.zeros_(asked.weight)
        nn.init.constant_(asked.bias, start)
        self.project["query_span"] = asked

    def spans(self, x: Inputs) -> Float[Tensor, "B H L"]:
        """z_t of each head and token, for inspection."""
        return self.span * self.project["query_span"](x).sigmoid().mT
