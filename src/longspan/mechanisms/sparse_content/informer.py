"""ProbSparse attention (Informer; Zhou et al., 2021)."""

import torch
from jaxtyping import Float
from torch import Tensor

from longspan.card import Card
from longspan.engines import bucket
from longspan.errors import LongspanError
from longspan.nn.spiking import SpikingAttention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Marks, Outputs, Queries, Values


@mechanism(
    Card(
        id="informer",
        name="ProbSparse attention (Informer)",
        kind="attention",
        family="sparse-content",
        paper="Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
        cite="Zhou et al., AAAI 2021",
        link="https://arxiv.org/abs/2012.07436",
        what="Only the few queries whose scores look least uniform attend; the others take the "
        "mean of all values.",
        modes={"bidirectional", "causal", "cross"},
        time="L*M*D + S*M*D",
        memory="M",
        causality="selection",
        tiny={"factor": 2},
        exact={"factor": 1000000},
        skips={
            "no_peeking": "which queries attend is ranked among all of them, over later keys too "
            "(released code)",
        },
    )
)
class Informer(SpikingAttention):
    """Full attention for u = factor · ⌈ln L⌉ queries, a plain mean of values for the rest (Sec. 3).

    Queries are ranked by how far their scores s are from uniform, on U = factor · ⌈ln S⌉ keys,

        M(q_i) = max_j s_ij − 1/S Σ_j s_ij                                      (Eq. 4)

    drawn with replacement for each query, or `shared` by all; the sum is over the sample and, as
    in the released code, divided by S. Those not chosen ("lazy") give mean(V), or causally the sum
    of v_1 … v_i as released, or their mean with `mean`. M stands for u and U in the cost. The rank
    is among all queries, so the causal form too sees the future through whom it selects. Counts
    are of kept tokens; where S = L a mask is taken to be the queries' too.

    Args:
        factor: c. shared: one sample for all queries. exact: M over all keys, in O(L·S).
        mean: the causal lazy rows average. seed: of the samples in evaluation.

    Raises:
        LongspanError: a factor below 0, causal keys before the queries.
    """

    name = "informer"

    def forward(
        self, q: Queries, k: Keys, v: Values, state: None = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, None]:
        length, keys = q.shape[2], k.shape[2]
        if self.causal and length != keys:
            raise LongspanError(
                f"informer's causal form got {length} queries for {keys} keys: give as many."
            )
        if not q.numel() or not keys:
            return q.new_zeros(*q.shape[:3], v.shape[3]), None
        kept = k.new_ones(k.shape[0], keys, dtype=torch.bool) if keep is None else keep
        k, v = (t.masked_fill(~kept[:, None, :, None], 0) for t in (k, v))
        own = kept if length == keys else kept.new_ones(q.shape[0], length)
        sums = v.to(torch.promote_types(v.dtype, torch.float32))
        if self.causal:
            lazy = sums.cumsum(2)
            if self.mean:
                lazy = lazy / kept.cumsum(1).clamp(min=1)[:, None, :, None]
        else:
            lazy = sums.sum(2, keepdim=True) / kept.sum(1).clamp(min=1).view(-1, 1, 1, 1)
            lazy = lazy.expand(-1, -1, length, -1)
        lazy = lazy.to(q.dtype)
        budget = bucket.budget(own.sum(1), self.factor)
        chosen = bucket.foremost(self.measure(q, k, own, kept), budget, own)  # B H u
        return bucket.awoken(lazy, q, k, v, chosen, kept, causal=self.causal), None

    @torch.no_grad()
    def measure(self, q: Queries, k: Keys, own: Marks, keep: Keep) -> Float[Tensor, "B H L"]:
        """M(q_i), without the scores' scale, which moves no rank; `own` masks the queries."""
        budget, count = (bucket.budget(t.sum(1), self.factor) for t in (own, keep))
        if bool(((budget == own.sum(1)) | (budget == 0)).all()):
            return q.new_zeros(q.shape[:3])  # all or none are chosen
        if self.exact:
            return bucket.spikes(q, k, keep)
        most = self.factor * 24
        return bucket.sampled_spikes(
            q, k, own, keep, count, most, self.sample_once, self.generator()
        )
