"""Linear Transformer (Katharopoulos et al., 2020)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from longspan.card import Card
from longspan.engines import features as feature_maps
from longspan.engines import scan
from longspan.nn import Attention, Turn
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


def elu_plus_one(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1 > 0 (Eq. 7)."""
    return F.elu(x).add_(1)


ELU = scan.Entrywise(elu_plus_one, lambda y: y.clamp(max=1))  # elu' = exp(x) = y below 0, else 1


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

    The state is S with z as its last column, float32 or wider. With `rotated` features and a
    position that rotates, S is of turned features and z is not (Su et al., 2021, Eq. 19):

        o_t = Σ_{s≤t} (R_t φ(q_t))·(R_s φ(k_s)) v_s / (Σ_{s≤t} φ(q_t)·φ(k_s) + eps)

    Args:
        features: another non-negative φ, (B H L D) → (B H L M).
        eps: keeps the quotient finite where φ(q) and φ(k) do not meet.
        rotated: a position that rotates turns φ(q) and φ(k) in the numerator alone, instead of q
            and k.
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        features: Callable[[Tensor], Tensor] = elu_plus_one,
        eps: float = 1e-6,
        rotated: bool = False,
    ) -> None:
        super().__init__(causal=causal)
        self.features, self.eps, self.takes_turns = features, eps, rotated

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: Float[Tensor, "B H M V+1"] | None = None,
        *,
        keep: Keep | None = None,
        turns: tuple[Turn, Turn] | None = None,
    ) -> tuple[Outputs, Float[Tensor, "B H M V+1"] | None]:
        if turns is not None:
            form = {"causal": self.causal, "eps": self.eps}
            return feature_maps.turned(self.features, q, k, v, state, turns, keep=keep, **form)
        unseen = None if keep is None else ~keep[:, None, :, None]
        feature = ELU if self.features is elu_plus_one else None
        if unseen is not None:
            v = v.masked_fill(unseen, 0)
            k = k.masked_fill(unseen, 0 if feature is None else -torch.inf)  # elu(−∞) + 1 = 0
        if feature is None:
            q, k = self.features(q), self.features(k)
            k = k if unseen is None else k.masked_fill(unseen, 0)
        if self.causal:
            return scan.outer(q, k, v, state, feature=feature, normalise=self.eps)
        return scan.total(q, k, v, feature=feature, normalise=self.eps), None
