"""Scaled dot-product attention (Vaswani et al., 2017)."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from longspan.card import Card
from longspan.engines import dense, tiles
from longspan.engines.pattern import History
from longspan.errors import LongspanError
from longspan.nn import Attention, Bias, Spread
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries


@mechanism(
    Card(
        id="multi-head-attention",
        name="Scaled dot-product and multi-head attention",
        kind="attention",
        family="dense",
        paper="Attention Is All You Need",
        cite="Vaswani et al., NeurIPS 2017",
        link="https://arxiv.org/abs/1706.03762",
        what="Every token attends to all that it may see, weighted by a softmax of dot products.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*S*D + L*S*V",
        memory="S*D + S*V",
        exact={},
    )
)
class SoftmaxAttention(Attention):
    """o_i = Σ_j softmax_j(q_i·k_j / √D + bias_ij) v_j over the keys that i may see (Eq. 1).

    Causally j ≤ i + S − L. The state is every key and value so far; a row that sees nothing
    gives 0 with gradient 0.

    Args:
        backend: `fused` (SDPA, or flash tiles where it lacks a form), `tiled` (O(L) memory,
            recomputed backward), `explicit` (the weights written out). All agree.
        multiplier: (pos_q, pos_k) → factor on the scaled scores before the softmax.
        gate: (pos_q, pos_k) → factor on the weights after it.
        dropout: of the weights, in training.

    Raises:
        LongspanError: an unknown backend; `fused` with a multiplier or gate, which it lacks.
    """

    takes_bias = takes_spread = True
    grouped = True

    def __init__(
        self,
        *,
        causal: bool = False,
        backend: Literal["fused", "tiled", "explicit"] = "fused",
        multiplier: Callable[[Tensor, Tensor], Tensor] | None = None,
        gate: Callable[[Tensor, Tensor], Tensor] | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> None:
        super().__init__(causal=causal)
        if backend not in ("fused", "tiled", "explicit"):
            raise LongspanError(f"no backend '{backend}'; expected fused, tiled or explicit.")
        if backend == "fused" and (multiplier is not None or gate is not None):
            raise LongspanError(
                "the fused backend has no multiplier or gate: build with backend='tiled'."
            )
        self.backend, self.multiplier, self.gate = backend, multiplier, gate
        self.dropout, self.scale = dropout, scale

    def forward(
        self,
        q: Queries,
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S V"],
        state: History | None = None,
        *,
        keep: Keep | None = None,
        bias: Bias | None = None,
        spread: Spread | None = None,
    ) -> tuple[Outputs, History | None]:
        k, v, keep, carried = tiles.carry(k, v, state, keep, causal=self.causal)
        copies = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(copies, 1) if copies > 1 else t for t in (k, v))
        return self._attend(q, k, v, keep, bias, spread), carried

    def weights(
        self, q: Queries, k: Keys, *, keep: Keep | None = None, bias: Bias | None = None
    ) -> Float[Tensor, "B H L S"]:
        """The weights themselves, before dropout."""
        return self._explicit(q, k, k, keep, bias, None, dropout=0.0)[1]

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Keep | None,
        bias: Bias | None,
        spread: Spread | None,
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if self.backend == "explicit":
            return self._explicit(q, k, v, keep, bias, spread, dropout)[0]
        hooks: Any = {"causal": self.causal, "keep": keep, "bias": bias, "spread": spread}
        hooks |= {"dropout": dropout, "scale": self.scale}
        if self.backend == "fused":
            return dense.attend(q, k, v, **hooks)
        return dense.tiled(q, k, v, multiplier=self.multiplier, gate=self.gate, **hooks)[0]

    def _explicit(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Keep | None,
        bias: Bias | None,
        spread: Spread | None,
        dropout: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        length, keys = q.shape[2], k.shape[2]
        pos_k = torch.arange(keys, device=q.device)
        pos_q = torch.arange(keys - length, keys, device=q.device)
        seen = None if keep is None else keep[:, None, None]
        if self.causal:
            order = pos_k <= pos_q[:, None]
            seen = order if seen is None else seen & order
        return dense.explicit(
            q,
            k,
            v,
            seen=seen,
            bias=bias and bias(q, k, pos_q, pos_k),
            multiplier=self.multiplier and self.multiplier(pos_q, pos_k),
            gate=self.gate and self.gate(pos_q, pos_k),
            spread=spread and (lambda weights: spread(weights, pos_q, pos_k)),
            dropout=dropout,
            scale=self.scale,
        )
