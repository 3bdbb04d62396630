"""Routing attention without the paper's view of the future."""

import torch.nn.functional as F
from torch import Tensor

from longspan.card import Card
from longspan.engines import bucket, dense
from longspan.nn import kmeans
from longspan.registry import mechanism


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

    Args: those of routing-transformer; window: members of its cluster that a query looks back on,
        by default 128.

    Raises:
        LongspanError: a causal=False, sizes below 1, inputs of other heads or width, keys before
            the queries.
    """

    name = "routing-transformer-causal"
    one_form = (True, "build routing-transformer instead")
    usual = 128

    def along(self, x: Tensor, table: kmeans.Routed, means: Tensor) -> Tensor:
        assert self.window is not None
        length = x.shape[2]
        x = x.to(table.v.dtype)
        hashed = bucket.Hashed(
            table.k[:, self.local :],
            table.v[:, self.local :],
            table.keep,
            table.codes.masked_fill(~table.keep[:, None, None], means.shape[1]),
        )
        if table.k.shape[2] > length == 1:
            return bucket.step(x * x.shape[3] ** -0.5, hashed, own=0.0, before=self.window)
        block = min(32, max(4, 1 << max(self.window.bit_length() - 2, 0)))
        layout = bucket.Sorted(
            bucket.aligned_order(hashed.buckets, means.shape[1] + 1, block),
            hashed.buckets,
            before=self.window,
            sliding=True,
            causal=True,
            same=True,
            keep=table.keep,
        )
        x = F.pad(x, (0, 0, table.k.shape[2] - length, 0))
        o, _ = dense.union(x, [(layout, hashed.k, hashed.v)])
        return o[:, :, o.shape[2] - length :]
