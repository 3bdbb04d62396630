"""Routing Transformer (Roy et al., 2021)."""

import torch
from torch import Tensor

from longspan.card import Card
from longspan.engines import bucket, dense
from longspan.nn import kmeans
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

# Of the divisor count + 1e−2 in the released code.
EPS = 1e-2

State = kmeans.Routed | None


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

    def forward(
        self, q: Queries, k: Keys, v: Values, state: State = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, State]:
        self.check(q, k)
        own = keep if q.shape[2] == k.shape[2] else None  # of the queries
        if keep is not None:
            k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
        if own is not None:
            q = q.masked_fill(~own[:, None, :, None], 0)
        near = self.local
        x = kmeans.on_sphere(q[:, near:])
        y = x if self.causal else kmeans.on_sphere(k[:, near:])
        sides = ([x], [own]) if self.causal else ([x, y], [own, keep])
        means = self.means(*sides)
        x = self.committed(x, means)
        y = x if self.causal else self.committed(y, means)
        length = q.shape[2]
        if not self.causal:
            routed = self._routed(x, y, v[:, near:], means, own, keep)
            return torch.cat([self.nearby(q, k, v, keep), routed], 1), None
        seen = q.new_ones(q.shape[0], length, dtype=torch.bool) if keep is None else keep
        keys = torch.cat([k[:, :near], x.to(q.dtype)], 1)
        table = kmeans.Routed.grow(state, keys, v, seen, kmeans.nearest(x, means))
        local = self.nearby(q, table.k, table.v, table.keep)
        if state is not None and length == 1:
            met = (table.codes == table.codes[..., -1:]) & table.keep[:, None, None]
            routed = dense.explicit(x.to(q.dtype), table.k[:, near:], table.v[:, near:], seen=met)
            return torch.cat([local, routed[0] / (1 + EPS)], 1), table
        if state is not None:
            x = torch.cat([state.k[:, near:].to(x.dtype), x], 2)
        routed = self._routed(x, x, table.v[:, near:], means, table.keep, table.keep)
        return torch.cat([local, routed[:, :, -length:]], 1), table

    def _routed(
        self,
        x: Tensor,
        y: Tensor,
        v: Tensor,
        means: Tensor,
        keep_x: Keep | None,
        keep_y: Keep | None,
    ) -> Tensor:
        """Clusters of queries x and keys y, which attend in v's dtype."""
        queries = bucket.members(x, means, self._size(x, keep_x), keep_x)
        keys = queries
        if not self.causal:
            keys = bucket.members(y, means, self._size(y, keep_y), keep_y)
        x, y = x.to(v.dtype), y.to(v.dtype)
        return bucket.attend_cells(x, y, v, queries, keys, causal=self.causal, eps=EPS)

    def _size(self, x: Tensor, keep: Keep | None) -> Tensor:
        """w of each row: as given, or its kept tokens over the clusters."""
        count = x.new_full(x.shape[:1], x.shape[2], dtype=torch.long)
        count = count if keep is None else keep.sum(1)
        if self.window is not None:
            return count.clamp(max=self.window)
        return -(-count // self.means.centroids.shape[1])
