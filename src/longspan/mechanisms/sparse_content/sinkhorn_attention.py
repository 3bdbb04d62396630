"""Sparse Sinkhorn Attention (Tay et al., 2020)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import bucket, dense
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


@mechanism(
    Card(
        id="sinkhorn-attention",
        name="Sparse Sinkhorn Attention",
        kind="attention",
        family="sparse-content",
        paper="Sparse Sinkhorn Attention",
        cite="Tay et al., ICML 2020",
        link="https://arxiv.org/abs/2002.11296",
        what="A learned soft permutation brings to each block of queries one other block of keys, "
        "which it attends to beside its own.",
        modes={"bidirectional", "causal", "cross"},
        time="L*C*D + L*C*V + L*S*D + L*S*V",
        memory="C",
        tiny={"heads": 3, "head_width": 8, "length": 4096, "block": 8},
        exact={"heads": 3, "head_width": 8, "length": 64, "block": 64},
    )
)
class SinkhornAttention(Attention):
    """Each block of queries attends to a sorted block of keys and to its own (Sec. 3).

    A sorting net scores blocks i, j of N by R_ij from summaries s of their tokens, and

        P = Sinkhorn((R + ε) / τ),   K̃ = P B(K),   Ṽ = P B(V)                 (Sec. 3.1 and 3.2)

    with Gumbel noise ε in training only; block i attends in one softmax to [K̃_i ; K_i]. SortCut
    lets every query attend to the first `cut` sorted blocks instead (Sec. 3.4).

    Causally, s_i sums the tokens before block i, P holds j < i only, and a column is normalised
    over the rows up to its own. (The paper's masked normalisation sums whole columns, by which
    later blocks would change the weights of earlier ones.) Cost grows as L·S / block, from the
    blocks' mixing. Cross-attention with S ≠ L has no block of its own; at S = L a mask is taken to
    be the queries' too. Blocks are counted over kept tokens. Where blocks are mixed, only kept
    tokens are, and a place of the mixture is seen where they hold more than half of its weight.

    Args:
        block: b. length: the most tokens, for "mlp" alone.
        net: "mlp", R_i = W_2 relu(W_1 s_i), as in the paper; "bilinear", R_ij = s_i W s_j;
            "attention", the mean query against the mean key, without parameters.
        iterations: of Sinkhorn's normalisation. temperature: τ.
        cut: how many sorted blocks SortCut keeps; None attends blockwise.
        mixture: add dense attention's output (Sec. 3.5).

    Raises:
        LongspanError: sizes below 1, "mlp" without a length or beyond it, SortCut in causal form,
            causal keys before the queries.
    """

    def __init__(
        self,
        *,
        heads: int,
        head_width: int,
        causal: bool = False,
        length: int | None = None,
        block: int = 64,
        net: str = "mlp",
        iterations: int = 8,
        temperature: float = 0.75,
        cut: int | None = None,
        mixture: bool = False,
    ) -> None:
        super().__init__(causal=causal)
        if block < 1 or iterations < 0 or temperature <= 0 or (cut is not None and cut < 1):
            raise LongspanError(
                f"sinkhorn-attention got block={block}, iterations={iterations}, "
                f"temperature={temperature}, cut={cut}: expected at least 1, 0, above 0, 1."
            )
        if causal and cut is not None:
            raise LongspanError("sinkhorn-attention has no causal SortCut: leave cut out.")
        if net not in ("mlp", "bilinear", "attention") or (net == "mlp" and length is None):
            raise LongspanError(
                f"sinkhorn-attention got net='{net}' and length={length}: expected mlp with a "
                "length, bilinear or attention."
            )
        self.block, self.net, self.iterations = block, net, iterations
        self.temperature, self.cut, self.mixture = temperature, cut, mixture
        self.blocks = -(-(length or 0) // block)
        sizes = {"mlp": (head_width, self.blocks), "bilinear": (head_width,), "attention": ()}[net]
        self.weights = nn.ParameterList(
            nn.init.normal_(torch.empty(heads, head_width, size), std=head_width**-0.5)
            for size in sizes
        )

    def forward(
        self, q: Queries, k: Keys, v: Values, state: None = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, None]:
        length, keys = q.shape[2], k.shape[2]
        own = length == keys
        if self.causal and not own:
            raise LongspanError(
                f"sinkhorn-attention's causal form got {length} queries for {keys} keys: "
                "its blocks stand side by side, give as many."
            )
        if not q.numel() or not keys:
            return q.new_zeros(*q.shape[:3], v.shape[3]), None
        if keep is not None:
            k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
        plain = None
        if self.mixture:
            plain = dense.attend(q, k, v, causal=self.causal, keep=keep)
        if keep is None:
            o = self._attend(q, k, v, None, own)
        else:
            order, back, kept = bucket.leftmost(keep)
            k, v = bucket.turned(k, order), bucket.turned(v, order)
            if own:
                q = bucket.turned(q.masked_fill(~keep[:, None, :, None], 0), order)
            o = self._attend(q, k, v, kept, own)
            o = bucket.turned(o, back) if own else o
        return (o if plain is None else o + plain), None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Keep | None, own: bool) -> Tensor:
        """The same for rows whose kept tokens come first."""
        size, length = self.block, q.shape[2]
        ones = k.new_ones(k.shape[0], 1, k.shape[2], 1)
        present = ones if keep is None else ones * keep[:, None, :, None]
        present = bucket.blocks_of(present, size)[..., 0]  # B 1 N C
        queries, keys, values = (bucket.blocks_of(t, size) for t in (q, k, v))
        mix = self.permutation(queries, keys, present, own).to(k.dtype)
        mix = mix if self.cut is None else mix[:, :, : self.cut]

        def sort(t: Tensor) -> Tensor:
            return (mix @ t.flatten(3)).unflatten(3, t.shape[3:])

        weight = sort(present.expand(-1, k.shape[1], -1, -1)[..., None])
        share = weight.clamp(min=0.5)
        sorted_keys, sorted_values = sort(keys) / share, sort(values) / share
        seen = (weight > 0.5).mT  # B H N 1 C
        if self.cut is not None:
            flat = (t.flatten(2, 3).flatten(0, 1) for t in (sorted_keys, sorted_values))
            key, value = (t[:, None] for t in flat)
            layout = bucket.Tiles(seen.flatten(2).flatten(0, 1)[:, None, None])
            o, _ = dense.union(q.flatten(0, 1)[:, None], [(layout, key, value)])
            return o[:, 0].unflatten(0, q.shape[:2])
        if own:
            near = present[:, :, :, None].bool().expand(-1, k.shape[1], -1, -1, -1)
            if self.causal:
                near = near & torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
                seen = seen.expand(-1, -1, -1, size, -1)
            seen = torch.cat([seen, near], -1)
            sorted_keys = torch.cat([sorted_keys, keys], 3)
            sorted_values = torch.cat([sorted_values, values], 3)
        whole = bool(seen.all())
        layout = bucket.Tiles(None if whole else seen.flatten(0, 1))
        flat = [t.flatten(0, 1) for t in (queries, sorted_keys, sorted_values)]
        o, _ = dense.union(flat[0], [(layout, flat[1], flat[2])])
        return o.unflatten(0, q.shape[:2]).flatten(2, 3)[:, :, :length]

    def permutation(
        self,
        q: Float[Tensor, "B H N C D"],
        k: Float[Tensor, "B H M C D"],
        present: Float[Tensor, "B 1 M C"],
        own: bool,
    ) -> Float[Tensor, "B H N M"]:
        """P from blocks of queries and keys, at least float32; rows of absent blocks are 0."""
        wide = torch.promote_types(q.dtype, torch.float32)
        there = present[..., 0] > 0  # B 1 M
        allowed = there[:, :, None]
        if own:
            allowed = allowed & there[..., None]
        if self.causal:
            count = q.shape[2]
            earlier = torch.ones(count, count, dtype=torch.bool, device=q.device).tril(-1)
            allowed = allowed & earlier
        s, t = q.to(wide).sum(3), k.to(wide).sum(3)
        if self.causal:
            # Not cumsum − s, whose rounding would know the block's own tokens.
            s = F.pad(s.cumsum(2)[:, :, :-1], (0, 0, 1, 0))
        weights = [w.to(wide) for w in self.weights]
        if self.net == "mlp":
            if t.shape[2] > self.blocks:
                raise LongspanError(
                    f"sinkhorn-attention was built for {self.blocks} blocks and got {t.shape[2]}: "
                    f"build it with length={t.shape[2] * self.block}."
                )
            scores = (s @ weights[0]).relu() @ weights[1][..., : t.shape[2]]
        elif self.net == "bilinear":
            scores = s @ weights[0] @ t.mT
        else:
            tokens = present.sum(-1).clamp(min=1)[..., None]
            before = tokens.cumsum(2) - tokens if self.causal else tokens
            of_queries = before.clamp(min=1) if own else float(self.block)
            scores = (s / of_queries) @ (t / tokens).mT / q.shape[-1] ** 0.5
        if self.training:
            uniform = torch.rand_like(scores).clamp(min=torch.finfo(wide).tiny)
            scores = scores - (-uniform.log()).log()
        scores = scores / self.temperature
        allowed = allowed.expand_as(scores)
        return bucket.sinkhorn(scores, allowed, iterations=self.iterations, causal=self.causal)
