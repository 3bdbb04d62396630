"""Relative position representations (Shaw et al., 2018)."""

from jaxtyping import Float, Int
from torch import Tensor

from longspan.card import Card
from longspan.engines import distance
from longspan.errors import LongspanError
from longspan.nn import Position
from longspan.nn.distances import vectors
from longspan.nn.positions import at_least_float32
from longspan.nn.protocols import Act
from longspan.registry import mechanism
from longspan.shapes import Keys, Outputs, Queries


@mechanism(
    Card(
        id="shaw-relative-position",
        name="Relative position representations (Shaw)",
        kind="position",
        family="position",
        paper="Self-Attention with Relative Position Representations",
        cite="Shaw et al., NAACL 2018",
        link="https://arxiv.org/abs/1803.02155",
        what="Adds to keys and values trained vectors that belong to their distance from the "
        "query, up to a greatest distance.",
        modes={"bidirectional", "causal", "step"},
        time="L*S*D",
        memory="L*S",
        tiny={"heads": 3, "head_width": 8, "reach": 5, "std": 0.3},
        exact={"heads": 3, "head_width": 8, "std": 0.0},
    )
)
class ShawRelativePosition(Position):
    """e_ij = q_i·(k_j + a^K_{j−i}) / √D,   z_i = Σ_j α_ij (v_j + a^V_{j−i})  (Eqs. 3 and 4).

    a_d = w_clip(d, −k, k). Products with the 2 k + 1 rows are formed once and moved into place,
    and weights are summed by distance before they meet a^V (Sec. 3.3), whatever the length. The
    attention's scale must be 1/√D, the default. Positions must be consecutive and ascending, as
    an attention hands them.

    Args:
        heads: H. head_width: D, of keys and values alike.
        reach: k (the paper: 16, its big model 8); distances beyond it count as it.
        keys, values: whether a^K and a^V are there; the paper finds little use in a^V (Table 3).
        shared: one table for all heads of a layer, as in the paper's big model.
        causal: tables of the k + 1 distances up to the query.
        std: of the normal initialisation; the paper gives none.

    Raises:
        LongspanError: a negative reach; neither keys nor values.
    """

    def __init__(
        self,
        *,
        heads: int,
        head_width: int,
        reach: int = 16,
        keys: bool = True,
        values: bool = True,
        shared: bool = False,
        causal: bool = False,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        if reach < 0 or not (keys or values):
            raise LongspanError(
                f"shaw-relative-position got reach={reach}, keys={keys}, values={values}: "
                "expected a distance of at least 0 and one table or both."
            )
        self.reach, self.causal = reach, causal
        rows = reach + 1 if causal else 2 * reach + 1
        self.keys, self.values = (
            vectors(rows, head_width, heads=heads, shared=shared, std=std) if there else None
            for there in (keys, values)
        )
        acts: dict[Act, bool] = {"bias": keys, "spread": values}
        self.acts = frozenset(act for act, there in acts.items() if there)

    def bias(
        self, q: Queries, k: Keys, pos_q: Int[Tensor, "L"], pos_k: Int[Tensor, "S"]
    ) -> Float[Tensor, "B H L S"]:
        if self.keys is None:
            raise self._lacks("bias")
        wide = at_least_float32(q)
        q = q.to(wide) / q.shape[-1] ** 0.5
        return distance.scores(q, self.keys.to(wide), pos_q, pos_k, before=self.reach)

    def spread(
        self, weights: Float[Tensor, "B H L S"], pos_q: Int[Tensor, "L"], pos_k: Int[Tensor, "S"]
    ) -> Outputs:
        if self.values is None:
            raise self._lacks("spread")
        table = self.values.to(weights.dtype)
        return distance.spread(weights, table, pos_q, pos_k, before=self.reach)
