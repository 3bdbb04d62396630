"""BP-Transformer (Ye et al., 2019)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import edges as along
from longspan.errors import LongspanError
from longspan.nn import FeedForward, Mixer
from longspan.registry import mechanism
from longspan.shapes import Context, Inputs, Keep, Marks


class TreeState(NamedTuple):
    """Keys and values of all nodes of every layer, as they were completed; tokens of each row."""

    k: Float[Tensor, "B layers H S D"]
    v: Float[Tensor, "B layers H S D"]
    tokens: Int[Tensor, "B"]


class Nodes(NamedTuple):
    """Nodes of the trees of all rows, one tree after the other, and the tokens of each row."""

    x: Float[Tensor, "nodes E"]
    tokens: list[int]


class _Edges(nn.Module):
    """h ← LN(h + W_o A), A the attention along edges with a learned vector for each kind."""

    def __init__(self, width: int, heads: int, kinds: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        names = ("query", "key", "value", "output")
        self.query, self.key, self.value, self.output = (
            nn.Linear(width, width, bias=False) for _ in names
        )
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)
        self.kinds = nn.Parameter(torch.randn(kinds, width // heads) * 0.02)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.heads, -1)).transpose(0, 1)

    def forward(self, h: Tensor, k: Tensor, v: Tensor, edges: along.Graph) -> Tensor:
        o = along.along(self.split(self.query(h)), k, v, self.kinds, edges)
        y = self.output(o.transpose(0, 1).flatten(1))
        return self.norm(h + self.dropout(y))


class _Layer(nn.Module):
    def __init__(
        self, width: int, heads: int, kinds: int, inner: int | None, dropout: float, cross: bool
    ) -> None:
        super().__init__()
        self.own = _Edges(width, heads, kinds, dropout)
        self.source = _Edges(width, heads, kinds, dropout) if cross else None
        self.feed_forward = FeedForward(width, inner=inner, activation="relu", dropout=dropout)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)


@mechanism(
    Card(
        id="bp-transformer",
        name="BP-Transformer",
        kind="mixer",
        family="hierarchical",
        paper="BP-Transformer: Modelling Long-Range Context via Binary Partitioning",
        cite="Ye et al., 2019",
        link="https://arxiv.org/abs/1911.04070",
        what="Every token sees its neighbours and ever larger spans farther away, the nodes of a "
        "binary tree whose states are learned from their tokens.",
        modes={"bidirectional", "causal", "step"},
        time="L*E*E + L*C*E",
        memory="S*E",
        tiny={"width": 24, "heads": 3, "near": 2},
        skips={
            "costs_what_it_says": "a token sees O(k log(L / k)) nodes: a card's cost has no log",
        },
    )
)
class BPTransformer(Mixer):
    """N layers over the nodes of a binary tree (Sec. 3), tokens from x and spans from zeros:

        h ← LN(h + W_o A),  h ← LN(h + FFN(h)),  A_u = Σ_w softmax_w(q_u·(k_w + a_uw) / √D) v_w

    over the edges of `engines.edges.tree`, a by their kind. C = O(k log(L / k)) keys a token.
    Causally spans take part once they are full, so a token sees none that holds a later one, nor
    itself. The state is every node's key and value in every layer. Models: `models.tree`.

    Args:
        near: k. layers: N; information from spans takes two. clip: levels from there on share
            their kinds. cross: layers attend to a source tree too (`nodes`, `source`).

    Raises:
        LongspanError: a width that heads do not divide; no layer or no neighbour; a context,
            marks, or a state without causality.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int = 8,
        causal: bool = False,
        near: int = 4,
        layers: int = 2,
        inner: int | None = None,
        clip: int = 10,
        dropout: float = 0.0,
        cross: bool = False,
    ) -> None:
        super().__init__()
        if width % heads or near < 1 or layers < 1 or clip < 0:
            raise LongspanError(
                f"bp-transformer got width={width}, heads={heads}, near={near}, layers={layers}, "
                f"clip={clip}: heads must divide the width, near and layers be at least 1."
            )
        self.causal, self.near, self.clip, self.width = causal, near, clip, width
        kinds = along.edge_kinds(near, clip)
        self.layers = nn.ModuleList(
            _Layer(width, heads, kinds, inner, dropout, cross) for _ in range(layers)
        )

    def forward(
        self,
        x: Inputs,
        state: TreeState | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, TreeState | None]:
        if context is not None or marks is not None:
            raise LongspanError(
                "bp-transformer mixes one sequence, all of its tokens alike: leave context and "
                "marks out."
            )
        y, _, state = self.nodes(x, state, keep=keep)
        return y, state

    def nodes(
        self,
        x: Inputs,
        state: TreeState | None = None,
        *,
        keep: Keep | None = None,
        source: Nodes | None = None,
    ) -> tuple[Inputs, Nodes, TreeState | None]:
        """As `forward`, with all (new) nodes; with `cross` they attend to those of `source`."""
        if state is not None and not self.causal:
            raise LongspanError("got a state, but only the causal form has one: causal=True.")
        seen = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        past = [0] * len(x) if state is None else state.tokens.tolist()
        tokens = [p + n for p, n in zip(past, seen.sum(1).tolist(), strict=True)]
        graphs = [self.tree(n, p) for n, p in zip(tokens, past, strict=True)]
        edges = along.together(graphs)
        leaves = edges.leaves.to(x.device)
        h = x.new_zeros(len(edges.start) - 1, self.width).index_copy(0, leaves, x[seen])
        bridge = None if source is None else self._bridge(tokens, past, source)
        sizes = [len(g.start) - 1 for g in graphs]
        carried = []
        for n, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            k, v = (layer.own.split(project(h)) for project in (layer.own.key, layer.own.value))
            pairs = [self._joined(t, kind, n, past, sizes, state) for t, kind in ((k, 0), (v, 1))]
            carried.append(pairs)
            k, v = (
                torch.cat(rows, 1) if rows else t for rows, t in zip(pairs, (k, v), strict=True)
            )
            h = layer.own(h, k, v, edges)
            if layer.source is not None and bridge is not None and source is not None:
                k, v = (
                    layer.source.split(project(source.x))
                    for project in (layer.source.key, layer.source.value)
                )
                h = h.index_copy(0, leaves, layer.source(h[leaves], k, v, bridge))
            h = layer.norm(h + layer.dropout(layer.feed_forward(h)))
        y = torch.zeros_like(x).masked_scatter(seen[..., None], h[leaves])
        return y, Nodes(h, tokens), self._state(carried, tokens, x) if self.causal else None

    def tree(self, tokens: int, past: int = 0) -> along.Graph:
        """Who sees whom among so many tokens and their spans, of those after `past`."""
        return along.tree(tokens, self.near, self.clip, causal=self.causal, past=past)

    def _bridge(self, tokens: Sequence[int], past: Sequence[int], source: Nodes) -> along.Graph:
        rows = zip(tokens, source.tokens, past, strict=True)
        return along.together([along.across(n, m, self.near, self.clip, p) for n, m, p in rows])

    def _joined(
        self,
        new: Tensor,
        kind: int,
        layer: int,
        past: Sequence[int],
        sizes: Sequence[int],
        state: TreeState | None,
    ) -> list[Tensor]:
        """H S D of every row, with what the state holds before it."""
        rows = new.split(list(sizes), 1)
        if state is None:
            return list(rows)
        held = state[kind][:, layer]
        pairs = zip(held, past, rows, strict=True)
        return [torch.cat([old[:, : along.completed(p)], row], 1) for old, p, row in pairs]

    @staticmethod
    def _state(carried: list[list[list[Tensor]]], tokens: list[int], x: Tensor) -> TreeState:
        most = max((along.completed(n) for n in tokens), default=0)

        def stacked(kind: int) -> Tensor:
            layers = [[F.pad(r, (0, 0, 0, most - r.shape[1])) for r in c[kind]] for c in carried]
            if not tokens:
                return x.new_zeros(0, len(carried), 1, 0, 1)
            return torch.stack([torch.stack(rows) for rows in layers], 1)

        return TreeState(stacked(0), stacked(1), torch.tensor(tokens, device=x.device).long())
