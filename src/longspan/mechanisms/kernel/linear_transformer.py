"""Linear Transformer (Katharopoulos et al., 2020)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from longspan.card import Card
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
            return self._turned(q, k, v, state, keep, turns)
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

    def _turned(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor | None,
        keep: Keep | None,
        turns: tuple[Turn, Turn],
    ) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            if keep is not None:
                k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
            phi_q, phi_k = self.features(q.to(wide)), self.features(k.to(wide))
            if keep is not None:
                phi_k = phi_k.masked_fill(~keep[:, None, :, None], 0)
            turned = turns[0](phi_q), turns[1](phi_k), v.to(wide)
            plain = phi_q, phi_k, torch.ones_like(phi_k[..., :1])
            carried = None
            if self.causal:
                before = (None, None) if state is None else state.split([v.shape[3], 1], -1)
                above, s = scan.outer(*turned, before[0])
                below, z = scan.outer(*plain, before[1])
                carried = torch.cat([s, z], -1)
            else:
                above, below = scan.total(*turned), scan.total(*plain)
            return (above / (below + self.eps)).to(q.dtype), carried
