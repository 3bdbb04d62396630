"""Efficient Attention (Shen et al., 2021)."""

import math
from typing import Any, Literal, get_args

import torch

from longspan.card import Card
from longspan.engines import features, lowrank, scan
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.nn.maps import MapAttention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

Normalisation = Literal["softmax", "scaling"]


@mechanism(
    Card(
        id="efficient-attention",
        name="Efficient Attention",
        kind="attention",
        family="kernel",
        paper="Efficient Attention: Attention with Linear Complexities",
        cite="Shen et al., WACV 2021",
        link="https://arxiv.org/abs/1812.01243",
        what="Each feature of the keys is one attention map over all positions, and each query "
        "mixes these maps.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*D*V + S*D*V",
        memory="D*V",
    )
)
class EfficientAttention(Attention):
    """o = ρ_q(q) (ρ_k(k)ᵀ v): ρ_q a softmax over features, ρ_k one over positions (Eqs. 4 to 6).

    With `scaling`, ρ(y) = y / √n and o = q kᵀ v / n, for n keys (Eq. 5). Causally (not in the
    paper) the softmax over positions, or n, runs over the positions so far. The state is each
    feature's average, its denominator and its largest exponent; with `scaling` the sum k vᵀ and n.

    Raises:
        LongspanError: an unknown normalisation.
    """

    def __init__(self, *, causal: bool = False, normalisation: Normalisation = "softmax") -> None:
        super().__init__(causal=causal)
        if normalisation not in get_args(Normalisation):
            raise LongspanError(
                f"efficient-attention has no normalisation '{normalisation}'; expected "
                f"{', '.join(get_args(Normalisation))}."
            )
        self.normalisation = normalisation

    def forward(
        self, q: Queries, k: Keys, v: Values, state: Any = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, Any]:
        softmax = self.normalisation == "softmax"
        if keep is not None:
            unseen = ~keep[:, None, :, None]
            k = k.masked_fill(unseen, -math.inf if softmax else 0)
            v = v.masked_fill(unseen, 0)
        if not softmax:
            return features.averaged(q, k, v, state, causal=self.causal, keep=keep)
        wide = torch.promote_types(q.dtype, torch.float32)
        q = q.softmax(-1, dtype=wide).to(q.dtype)
        if self.causal:
            return lowrank.read(q, k, v, state)
        # A column without any key to see gives 0.
        k = torch.ops.aten._safe_softmax(k.mT, -1, dtype=wide).to(k.dtype).mT
        return scan.total(q, k, v), None


class EfficientAttention2d(MapAttention):
    """x + reproject(attention over the H × W places) of feature maps, B C H W (Sec. 3.4).

    Args:
        width: C. keys, values: their channels in all heads, by default C / 2 as in Sec. 4.1.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int = 1,
        keys: int | None = None,
        values: int | None = None,
        normalisation: Normalisation = "softmax",
    ) -> None:
        attention = EfficientAttention(normalisation=normalisation)
        super().__init__(attention, width=width, heads=heads, keys=keys, values=values)
