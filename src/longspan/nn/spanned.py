"""Attention that fades out at the end of a span."""

import torch
from torch import Tensor, nn

from longspan.engines import span as spans
from longspan.errors import LongspanError
from longspan.nn.auxiliary import report
from longspan.nn.protocols import Attention
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


class SpanAttention(Attention):
    """a_ij = m_z(i − j) exp(s_ij) / Σ m_z(i − j') exp(s_ij') over the S keys before i, with

        s_ij = q_i·(k_j + p_{i−j}) / √D,   m_z(x) = clip((R + z − x) / R, 0, 1)

    Distances count kept tokens. The state are the keys that later queries may reach.

    Args:
        span: S. ramp: R. cost: of a token of mean span in the loss.
        itself: count the query's own key among the S.
        relative: have p, learned, one for all heads.
        dropout: of the weights, in training.

    Raises:
        LongspanError: a span or ramp below 1, causal=False.
    """

    one_form = (True, "it sees a span of the past")

    def __init__(
        self,
        *,
        causal: bool = True,
        head_width: int,
        span: int,
        ramp: float,
        cost: float,
        itself: bool,
        relative: bool,
        dropout: float,
    ) -> None:
        super().__init__(causal=causal)
        if span < 1 or ramp < 1:
            raise LongspanError(
                f"{type(self).__name__} got span={span} and ramp={ramp}; expected at least 1."
            )
        self.span, self.ramp, self.cost, self.dropout = span, ramp, cost, dropout
        self.near = 0 if itself else 1
        self.table = nn.Parameter(torch.randn(span, head_width)) if relative else None

    def pays(self, mean: Tensor) -> None:
        """Report what spans of this mean cost."""
        report(self, "span", self.cost * mean)

    def reaching(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        z: Tensor,
        state: spans.Recent | None,
        keep: Keep | None,
        *,
        slack: int,
    ) -> tuple[Outputs, spans.Recent]:
        """The attention under these spans, which broadcast to B H L.

        Args:
            slack: keys kept beyond what spans reach now, for spans that grow.
        """
        return spans.attend(
            q,
            k,
            v,
            z,
            state,
            keep=keep,
            table=self.table,
            ramp=self.ramp,
            most=self.span,
            near=self.near,
            slack=slack,
            dropout=self.dropout if self.training else 0.0,
        )
