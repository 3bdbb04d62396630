"""Routing Transformer (Roy et al., 2021)."""

import torch
from torch import Tensor

from longspan.card import Card
from longspan.engines import bucket, dense
from longspan.nn import kmeans
from longspan.registry import mechanism
from longspan.shapes import Keep

# Of the divisor count + 1e−2 in the released code.
EPS = 1e-2


@mechanism(
    Card(
        id="routing-transformer",
        name="Routing Transformer",
        kind="attention",
        family="sparse-content",
        paper="Efficient Content-Based Sparse Attention with Routing Transformers",
        cite="Roy et al., TACL 2021",
        link="https://arxiv.org/abs/2003.05997",
        what="Learned centroids each gather the tokens nearest to them, which attend among "
        "themselves; other heads see their neighbourhood.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*M*D + L*C*D + L*C*V",
        memory="S*D + S*V",
        causality="selection",
        tiny={"heads": 3, "head_width": 8, "clusters": 4, "window": 16, "local": 1, "reach": 8},
        exact={"heads": 3, "head_width": 8, "local": 3, "reach": 1000000},
        skips={
            "no_peeking": "a centroid takes its nearest tokens of the whole sequence, so later "
            "ones oust earlier ones (Sec. 4.1); routing-transformer-causal does not peek",
            "streaming_equals_whole": "a step cannot know whom later tokens oust: it meets all "
            "cached tokens of its nearest centroid",
        },
    )
)
class RoutingTransformer(kmeans.RoutedAttention):
    """Attention within clusters of k-means, of equal size, beside local heads (Sec. 4.1).

    In a routed head q and k are layer-normalised without gain and bias, so that the nearest
    centroid has the largest inner product. Each centroid takes the `window` queries and the
    `window` keys nearest to it, in order of position, and they attend within it,

        X_i = Σ_{j ∈ S_μ(i), j ≤ i} A_ij v_j / (count_i + 1e−2)

    averaged over the clusters that took i (released code); taken by none, i gives 0. Causally, a
    routed head's keys are its queries: its k is ignored. Local heads see `reach` tokens on either
    side, or to the left: a sliding window in place of the paper's blocks. A step meets all cached
    tokens of its nearest centroid. The state is every key and value, and the keys' centroids.

    Where there are as many queries as keys, masked ones join no cluster.

    Args:
        clusters: k of each head; about √L. window: w, tokens a cluster; by default L / k.
        local: how many heads, the first, are local; by default half. reach: of theirs.
        decay: λ of the centroids' moving average. sums: it takes sums, as in the paper's equation,
            not means brought back to the sphere. seed: of the centroids before training.
        commitment: β, weight of the loss ‖x − μ‖² whose gradient reaches q and k in training.

    Raises:
        LongspanError: sizes below 1, inputs of other heads or width, causal keys before queries.
    """

    name = "routing-transformer"

    def across(
        self, x: Tensor, y: Tensor, v: Tensor, means: Tensor, own: Keep | None, keep: Keep | None
    ) -> Tensor:
        queries = bucket.members(x, means, self.share(x, own), own)
        keys = bucket.members(y, means, self.share(y, keep), keep)
        x, y = x.to(v.dtype), y.to(v.dtype)
        return bucket.attend_cells(x, y, v, queries, keys, causal=False, eps=EPS)

    def along(self, x: Tensor, table: kmeans.Routed, means: Tensor) -> Tensor:
        k, v = table.k[:, self.local :], table.v[:, self.local :]
        length, keys = x.shape[2], k.shape[2]
        if keys > length == 1:
            met = (table.codes == table.codes[..., -1:]) & table.keep[:, None, None]
            return dense.explicit(x.to(v.dtype), k, v, seen=met)[0] / (1 + EPS)
        if keys > length:
            x = torch.cat([k[:, :, : keys - length].to(x.dtype), x], 2)
        members = bucket.members(x, means, self.share(x, table.keep), table.keep)
        x = x.to(v.dtype)
        o = bucket.attend_cells(x, x, v, members, members, causal=True, eps=EPS)
        return o[:, :, keys - length :]
