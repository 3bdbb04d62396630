"""Adaptive attention span (Sukhbaatar et al., 2019)."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import span as spans
from longspan.errors import LongspanError
from longspan.nn.spanned import SpanAttention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


class Usage(NamedTuple):
    """Mean and largest span of the heads, keys a query meets, and FLOPs of a token at them."""

    mean: float
    largest: float
    keys: int
    flops: int


@mechanism(
    Card(
        id="adaptive-attention-span",
        name="Adaptive attention span",
        kind="attention",
        family="adaptive-span",
        paper="Adaptive Attention Span in Transformers",
        cite="Sukhbaatar et al., ACL 2019",
        link="https://arxiv.org/abs/1905.07799",
        what="Each head learns how far back it attends, and keys beyond the farthest are never "
        "touched.",
        modes={"causal", "step"},
        time="L*C*D + L*C*V",
        memory="C*D + C*V",
        tiny={"heads": 3, "head_width": 8, "span": 96, "ramp": 8.0, "start": 0.1},
    )
)
class AdaptiveAttentionSpan(SpanAttention):
    """a_ij = m_z(i − j) exp(s_ij) / Σ m_z(i − j') exp(s_ij') over the S keys before i (Sec. 2.2)

        s_ij = q_i·(k_j + p_{i−j}) / √D,   m_z(x) = clip((R + z − x) / R, 0, 1),   z = S · ratio

    Only keys up to the largest z + R are met, in whole 64s, and kept for later. In training the
    loss grows by λ S · mean(ratio), and ratios are put back into [0, 1] before they are used, the
    optimiser having moved them (`clamp`). The released code counts x from 0 at the nearest key and
    adds 1e-8 to the sum.

    Args:
        span: S. ramp: R. start: of every ratio. cost: λ.
        each: a span for each `head`, or one for the `layer`.
        itself: count the query's own key among the S.
        relative: have p, learned, one for all heads.
        dropout: of the weights, in training.

    Raises:
        LongspanError: a span or ramp below 1, a start outside [0, 1], causal=False.
    """

    def __init__(
        self,
        *,
        causal: bool = True,
        heads: int,
        head_width: int,
        span: int = 1024,
        ramp: float = 32.0,
        start: float = 0.0,
        cost: float = 2e-6,
        each: Literal["head", "layer"] = "head",
        itself: bool = False,
        relative: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            causal=causal,
            head_width=head_width,
            span=span,
            ramp=ramp,
            cost=cost,
            itself=itself,
            relative=relative,
            dropout=dropout,
        )
        if not 0 <= start <= 1:
            raise LongspanError(f"spans got start={start}; expected a share from 0 to 1.")
        self.ratio = nn.Parameter(torch.full((heads if each == "head" else 1,), float(start)))
        self.sizes = heads, head_width

    @property
    def z(self) -> Float[Tensor, "H"]:
        """The span of each head, or the one of all."""
        return self.span * self.ratio.clamp(0, 1)

    def clamp(self) -> None:
        """Put the ratios back into [0, 1]; to be called after an optimiser's step."""
        with torch.no_grad():
            if bool(((self.ratio < 0) | (self.ratio > 1)).any()):
                self.ratio.clamp_(0, 1)

    def mask(self, pos_q: Int[Tensor, "L"], pos_k: Int[Tensor, "S"]) -> Float[Tensor, "_ L S"]:
        """m_z(pos_q − pos_k), 0 outside the window: an attention's gate, which leaves mass lost."""
        x = pos_q[:, None] - pos_k
        outside = (x < self.near) | (x >= self.near + self.span)
        return spans.mask(x, self.z[:, None, None], self.ramp).masked_fill(outside, 0)

    def bias(
        self, q: Queries, k: Keys, pos_q: Int[Tensor, "L"], pos_k: Int[Tensor, "S"]
    ) -> Float[Tensor, "1 _ L S"]:
        """log m_z: an attention's bias hook, under which its weights are normalised."""
        return spans.log(self.mask(pos_q, pos_k))[None]

    def usage(self) -> Usage:
        """What the spans cost now: by the keys a query meets, twice the products with each."""
        z = self.z.detach()
        heads, width = self.sizes
        met = spans.reach(float(z.max()), self.ramp, near=self.near, most=self.span)
        products = 2 if self.table is None else 3
        return Usage(float(z.mean()), float(z.max()), met, 2 * products * heads * met * width)

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: spans.Recent | None = None,
        *,
        keep: Keep | None = None,
    ) -> tuple[Outputs, spans.Recent]:
        if self.training:
            self.clamp()
            self.pays(self.z.mean())
        slack = spans.GRAIN if self.training else 0
        return self.reaching(q, k, v, self.z[:, None], state, keep, slack=slack)
