"""Routing attention without the paper's view of the future."""

import torch
import torch.nn.functional as F

from longspan.card import Card
from longspan.engines import bucket, dense
from longspan.errors import LongspanError
from longspan.nn import kmeans
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

State = kmeans.Routed | None


@mechanism(
    Card(
        id="routing-transformer-causal",
        name="Strictly causal routing attention",
        kind="attention",
        family="sparse-content",
        paper="Efficient Content-Based Sparse Attention with Routing Transformers",
        cite="Roy et al., TACL 2021; strict form: longspan",
        link="https://arxiv.org/abs/2003.05997",
        what="Each token joins its nearest centroid and sees the previous members of it, so that "
        "no later token changes whom it meets; other heads see their neighbourhood.",
        modes={"causal", "step"},
        time="L*M*D + L*C*D + L*C*V",
        memory="S*D + S*V",
        tiny={"heads": 3, "head_width": 8, "clusters": 4, "window": 8, "local": 1, "reach": 8},
        exact={"heads": 3, "head_width": 8, "local": 3, "reach": 1000000},
    )
)
class RoutingTransformerCausal(kmeans.RoutedAttention):
    """Each query sees itself and the previous `window` tokens whose nearest centroid is its own.

    Centroids, their training, keys that are queries and local heads are those of
    routing-transformer. Whom a query meets depends on earlier tokens alone, so whole, chunked and
    step by step agree while the centroids rest. In training they move between calls only. The
    state is every key and value, and the keys' centroids.

    Args: those of routing-transformer; window: members of its cluster that a query looks back on.

    Raises:
        LongspanError: a causal=False, sizes below 1, inputs of other heads or width, keys before
            the queries.
    """

    name = "routing-transformer-causal"

    def __init__(
        self,
        *,
        heads: int,
        head_width: int,
        causal: bool = True,
        clusters: int = 64,
        window: int = 128,
        local: int | None = None,
        reach: int = 128,
        decay: float = 0.999,
        sums: bool = False,
        commitment: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not causal:
            raise LongspanError(f"{self.name} is causal only: build routing-transformer instead.")
        super().__init__(
            heads=heads,
            head_width=head_width,
            causal=causal,
            clusters=clusters,
            window=window,
            local=local,
            reach=reach,
            decay=decay,
            sums=sums,
            commitment=commitment,
            seed=seed,
        )
        self.window: int = window
        self.block = min(32, max(4, 1 << max(window.bit_length() - 2, 0)))

    def forward(
        self, q: Queries, k: Keys, v: Values, state: State = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, kmeans.Routed]:
        self.check(q, k)
        length, near = q.shape[2], self.local
        seen = q.new_ones(q.shape[0], length, dtype=torch.bool) if keep is None else keep
        q, k = (t.masked_fill(~seen[:, None, :, None], 0) for t in (q, k))
        x = kmeans.on_sphere(q[:, near:])
        means = self.means([x], [seen])
        codes = kmeans.nearest(x, means)
        routes = self.committed(x, means).to(q.dtype)
        table = kmeans.Routed.grow(state, torch.cat([k[:, :near], routes], 1), v, seen, codes)
        local = self.nearby(q, table.k, table.v, table.keep)
        hashed = bucket.Hashed(
            table.k[:, near:],
            table.v[:, near:],
            table.keep,
            table.codes.masked_fill(~table.keep[:, None, None], means.shape[1]),
        )
        if state is not None and length == 1:
            scaled = routes * routes.shape[-1] ** -0.5
            routed = bucket.step(scaled, hashed, own=0.0, before=self.window)
            return torch.cat([local, routed], 1), table
        layout = bucket.Sorted(
            bucket.aligned_order(hashed.buckets, means.shape[1] + 1, self.block),
            hashed.buckets,
            before=self.window,
            sliding=True,
            causal=True,
            same=True,
            keep=table.keep,
        )
        routes = F.pad(routes, (0, 0, table.k.shape[2] - length, 0))
        routed, _ = dense.union(routes, [(layout, hashed.k, hashed.v)])
        return torch.cat([local, routed[:, :, -length:]], 1), table
