"""Linear Transformer (Katharopoulos et al., 2020)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from longspan.card import Card
from longspan.engines import scan
from longspan.nn import Attention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


def elu_plus_one(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1 > 0 (Eq. 7)."""
    return F.elu(x) + 1


@mechanism(
    Card(
        id="linear-transformer",
        name="Linear Transformer",
        kind="attention",
        family="kernel",
        paper="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        cite="Katharopoulos et al., ICML 2020",
        link="https://arxiv.org/abs/2006.16236",
        what="Replaces exp(q·k) by φ(q)·φ(k), so that one running sum stands for all past keys.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*D*V",
        memory="D*V",
    )
)
class LinearTransformer(Attention):
    """Attention with the weights φ(q)·φ(k), where φ(x) = elu(x) + 1 (Eq. 7).

    Causally, with S_t = Σ_{s≤t} φ(k_s) v_sᵀ and z_t = Σ_{s≤t} φ(k_s) (Eqs. 10 and 11),

        o_t = φ(q_t)ᵀ S_t / (φ(q_t)ᵀ z_t + eps)                                  (Eq. 12)

    The state is S with z as its last column, float32 or wider.

    Args:
        features: another non-negative φ, (B H L D) → (B H L M).
        eps: keeps the quotient finite where φ(q) and φ(k) do not meet.
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        features: Callable[[Tensor], Tensor] = elu_plus_one,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(causal=causal)
        self.features, self.eps = features, eps

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: Float[Tensor, "B H M V+1"] | None = None,
        *,
        keep: Keep | None = None,
    ) -> tuple[Outputs, Float[Tensor, "B H M V+1"] | None]:
        unseen = None if keep is None else ~keep[:, None, :, None]
        if unseen is not None:
            k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
        q, k = self.features(q), self.features(k)
        if unseen is not None:
            k = k.masked_fill(unseen, 0)  # after φ: elu(0) + 1 would count as a key
        # With a column of ones beside v, one sum gives the numerator and the denominator.
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        o, state = scan.outer(q, k, v, state) if self.causal else (scan.total(q, k, v), None)
        return o[..., :-1] / (o[..., -1:] + self.eps), state
