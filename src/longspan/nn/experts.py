"""A feed-forward that is one of several, or a few, for each token."""

import torch
from torch import Tensor, nn

from longspan.errors import LongspanError
from longspan.nn.auxiliary import report
from longspan.nn.blocks import FeedForward
from longspan.shapes import Inputs


class Experts(nn.Module):
    """y = Σ_e g_e FFN_e(x), g the softmax over the k largest of x W_g (Shazeer et al., 2017).

    Of each token, only the k experts of its largest gates are computed. In training, their balance
    is a loss `experts`: the squared coefficient of variation of Σ_tokens g_e, times `balance`
    (Eq. 7). The noise of Eq. 4 is left out: outputs are those of evaluation.

    Args:
        inner: hidden width of each. active: k.

    Raises:
        LongspanError: fewer experts than are active, or none.
    """

    def __init__(
        self,
        width: int,
        *,
        experts: int,
        active: int = 2,
        inner: int | None = None,
        balance: float = 0.01,
    ) -> None:
        super().__init__()
        if not 1 <= active <= experts:
            raise LongspanError(
                f"{active} of {experts} experts were asked for: at least 1, at most all."
            )
        self.active, self.balance = active, balance
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            FeedForward(width, inner=inner, activation="relu") for _ in range(experts)
        )

    def forward(self, x: Inputs) -> Inputs:
        flat = x.flatten(0, 1)
        top, chosen = self.gate(flat).topk(self.active, -1)
        gates = top.softmax(-1)
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                part = expert(flat.index_select(0, token)) * gates[token, place, None]
                y = y.index_add(0, token, part.to(y.dtype))
        if self.training:
            report(self, "experts", self.balance * self._imbalance(gates, chosen))
        return y.view_as(x)

    def _imbalance(self, gates: Tensor, chosen: Tensor) -> Tensor:
        total = gates.new_zeros(len(self.experts)).index_add(0, chosen.flatten(), gates.flatten())
        mean = total.mean()
        return ((total - mean) ** 2).mean() / mean.clamp(min=1e-9) ** 2
