"""DA-Transformer, distance-aware (Wu et al., 2021)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import dense, distance
from longspan.nn import Bias
from longspan.nn.positions import at_least_float32, one_sequence
from longspan.nn.tiled import TiledAttention
from longspan.registry import mechanism
from longspan.shapes import Keep


@mechanism(
    Card(
        id="da-transformer",
        name="DA-Transformer (distance-aware)",
        kind="attention",
        family="position",
        paper="DA-Transformer: Distance-aware Transformer",
        cite="Wu et al., NAACL 2021",
        link="https://arxiv.org/abs/2010.06925",
        what="Multiplies rectified scores by a learned function of the distance, so that each head "
        "favours near or far keys.",
        modes={"bidirectional", "causal", "step"},
        time="L*S*D + L*S*V",
        memory="S*D + S*V",
        tiny={"heads": 3},
    )
)
class DistanceAware(TiledAttention):
    """softmax(relu(Q Kᵀ) ∘ f(α R) / √D) V, with R_ij = |i − j| and, per head,

        f(R) = (1 + exp(β)) / (1 + exp(β − R))                                     (Eq. 3)

    f(0) = 1; α < 0 favours near keys (f → 0), α > 0 far ones (f → 1 + exp(β)). A score of 0 still
    has weight exp(0): only masks hide. The causal form is not in the paper.

    Args:
        heads: H. beta: β at the start.
        alpha: α of the heads at the start, evenly from −alpha to alpha; 0 for plain relu scores.
            The paper gives no start; both signs let gradients pass either way.
        rectified: relu, without which a factor above 1 lowers negative scores (Sec. 4.4).
        saturating: f; without it α R is the factor itself (Sec. 4.4), zero on the diagonal.

    Raises:
        LongspanError: other than as many keys as queries in the bidirectional form.
    """

    def __init__(
        self,
        *,
        heads: int,
        causal: bool = False,
        alpha: float = 0.1,
        beta: float = 1.0,
        rectified: bool = True,
        saturating: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(causal=causal, dropout=dropout)
        self.alpha = nn.Parameter(torch.linspace(-alpha, alpha, heads + heads % 2)[:heads])
        self.beta = nn.Parameter(torch.full((heads,), beta)) if saturating else None
        self.activation = torch.relu if rectified else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Keep | None, bias: Bias | None, dropout: float
    ) -> Tensor:
        if not self.causal:
            one_sequence(type(self).__name__, q, k)
        return dense.tiled(
            q,
            k,
            v,
            causal=self.causal,
            keep=keep,
            bias=bias,
            multiplier=self.factor,
            activation=self.activation,
            dropout=dropout,
        )[0]

    def factor(self, pos_q: Int[Tensor, "L"], pos_k: Int[Tensor, "S"]) -> Float[Tensor, "H L S"]:
        """f(α R), or α R: of all distances once, in at least float32, then put in place."""
        length, keys = len(pos_q), len(pos_k)
        if not length or not keys:
            return self.alpha.new_zeros(len(self.alpha), length, keys)
        apart = torch.arange(length + keys - 1, device=pos_q.device) + pos_k[0] - pos_q[-1]
        # In float64: there are few distances, and α's gradient is a sum weighted by them.
        scaled = self.alpha.double()[:, None] * apart.abs()
        if self.beta is not None:
            beta = self.beta.double()[:, None]
            # log f = softplus(β) − softplus(β − R): no exponential of a distance.
            scaled = (F.softplus(beta) - F.softplus(beta - scaled)).exp()
        return distance.toeplitz(scaled.to(at_least_float32(self.alpha)), length, keys)
