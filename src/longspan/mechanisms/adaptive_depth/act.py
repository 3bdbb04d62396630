"""Adaptive Computation Time (Graves, 2016)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn.auxiliary import report
from longspan.nn.depth import Depth, Step, Went, onward
from longspan.registry import mechanism
from longspan.shapes import Inputs, Keep


@mechanism(
    Card(
        id="act",
        name="Adaptive Computation Time (ACT)",
        kind="depth",
        family="adaptive-depth",
        paper="Adaptive Computation Time for Recurrent Neural Networks",
        cite="Graves, 2016",
        link="https://arxiv.org/abs/1603.08983",
        what="Repeats a step until a learned halting probability has summed to one, for each "
        "position on its own.",
        modes={"bidirectional", "causal", "step"},
        time="L*E*E",
        memory="L*E",
        tiny={"width": 24, "bias": -0.3},
        exact={"width": 24, "bias": -1e6},
    )
)
class AdaptiveComputationTime(Depth):
    """y = Σ_{n≤N} w^n s^n with w^n = p^n for n < N, and w^N = R (Eqs. 5 to 8), where

        p^n = σ(w·s^n + b),   N = min{n : Σ_{m≤n} p^m ≥ 1 − ε, or the last},   R = 1 − Σ_{m<N} p^m

    Halted positions keep their state, and steps do no work for them. In training the loss grows by
    τ · mean(N + R), of which only R has a gradient (Sec. 2.2).

    Args:
        eps, cost, bias: ε, τ, and what b starts at.
        output: `sum` as above, or `running`: y ← w^n s^n + (1 − w^n) y (Dehghani et al., 2018,
            App.), in which earlier states fade.
        reads: p^n from the state `after` its step, or `before` it (Dehghani et al.).
        copies: halted positions keep their state; if not, they go on changing for others to attend
            to, and only their output stands (tensor2tensor).
        each: a decision for each `position`, or one for a `sequence` by its mean p, which peeks
            and is refused where steps carry a state.

    Raises:
        LongspanError: an ε outside (0, 1), an unknown rule; no steps; one decision for a sequence
            over causal steps.
    """

    def __init__(
        self,
        *,
        width: int,
        eps: float = 0.01,
        cost: float = 0.01,
        bias: float = 1.0,
        output: Literal["sum", "running"] = "sum",
        reads: Literal["after", "before"] = "after",
        copies: bool = True,
        each: Literal["position", "sequence"] = "position",
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("output", output, ("sum", "running")),
            ("reads", reads, ("after", "before")),
            ("each", each, ("position", "sequence")),
        ):
            if value not in known:
                raise LongspanError(f"act: {name} is {value!r}; expected {' or '.join(known)}.")
        if not 0 < eps < 1:
            raise LongspanError(f"act: eps is {eps}; expected a number between 0 and 1.")
        self.eps, self.cost = eps, cost
        self.output, self.reads, self.copies, self.each = output, reads, copies, each
        self.halt = nn.Linear(width, 1)
        nn.init.constant_(self.halt.bias, bias)

    def forward(
        self,
        steps: Sequence[Step],
        x: Inputs,
        states: Sequence[Any] | None = None,
        *,
        keep: Keep | None = None,
    ) -> Went:
        if not steps:
            raise LongspanError("act got no steps: give at least one.")
        kept = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        x = x.masked_fill(~kept[..., None], 0)
        wide = torch.promote_types(x.dtype, torch.float32)
        summed = x.new_zeros(x.shape[:2], dtype=wide)
        y, remainder, active = torch.zeros_like(x), summed, kept
        taken, carried, carries = kept.long() * 0, [], True
        for n, step in enumerate(steps):
            before = x
            going = active if self.copies or not (carries or bool(active.any())) else kept
            x, state = onward(step, x, states and states[n], going, carries=carries)
            carries = state is not None
            carried.append(state)
            if carries and self.each == "sequence":
                raise LongspanError(
                    "act decides for whole sequences, which the steps carry on: a position would "
                    "halt by later ones. Build it with each='position'."
                )
            p = self._halting(before if self.reads == "before" else x, kept)
            halts = active & (summed + p >= 1 - self.eps) if n + 1 < len(steps) else active
            rest = 1 - summed
            weight = torch.where(halts, rest, p).masked_fill(~active, 0)
            share = weight[..., None].to(x.dtype)
            # Where a position halted earlier the share is 0, but its state may be anything.
            new = x.masked_fill(~active[..., None], 0)
            y = share * new + (y if self.output == "sum" else (1 - share) * y)
            taken = taken + active
            remainder = torch.where(halts, rest, remainder)
            active = active & ~halts
            summed = summed + weight.masked_fill(halts, 0)
        if self.training:
            ponder = (taken + remainder).masked_fill(~kept, 0).sum() / kept.sum().clamp(min=1)
            report(self, "ponder", self.cost * ponder)
        return Went(y, tuple(carried), taken)

    def _halting(self, s: Inputs, kept: Keep) -> Float[Tensor, "B L"]:
        scores = self.halt(s)[..., 0]
        p = scores.to(torch.promote_types(scores.dtype, torch.float32)).sigmoid()
        if self.each == "position":
            return p
        mean = p.masked_fill(~kept, 0).sum(1) / kept.sum(1).clamp(min=1)
        return mean[:, None].expand_as(p)
