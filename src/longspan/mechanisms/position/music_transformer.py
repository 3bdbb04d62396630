"""Music Transformer (Huang et al., 2018)."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import dense, distance, tiles
from longspan.engines.average.tokens import reordered
from longspan.engines.pattern import History
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.nn.distances import vectors
from longspan.nn.positions import at_least_float32, one_sequence
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


@mechanism(
    Card(
        id="music-transformer",
        name="Music Transformer (relative attention by skewing, global and local)",
        kind="attention",
        family="position",
        paper="Music Transformer: Generating Music with Long-Term Structure",
        cite="Huang et al., ICLR 2019",
        link="https://arxiv.org/abs/1809.04281",
        what="Compares each query also with a trained vector of its distance to the key, without "
        "ever holding one for each pair.",
        modes={"bidirectional", "causal", "step"},
        time="L*S*D + L*S*V",
        memory="S*D + S*V",
        tiny={"heads": 3, "head_width": 8, "length": 20},
        exact={"heads": 3, "head_width": 8, "length": 20, "std": 0.0},
    )
)
class RelativeAttention(Attention):
    """softmax((Q Kᵀ + S_rel) / √D) V, S_rel[i, j] = q_i · E[j − i]  (Eq. 3).

    S_rel is skewed from Q Eᵀ, a few queries at a time, in O(S) memory a query. Distances of
    `length` or more count as length − 1. The state is every key and value so far; of the local
    form, those of the last two blocks.

    The paper keeps sinusoids at the input: `position="sinusoidal-position"` of a model.

    Args:
        heads: H. head_width: D.
        length: rows of E for a query and keys before it; bidirectionally as many less one for
            keys after it.
        block: N of the local form: a block of queries sees itself, causally, and the whole block
            before it (Sec. 3.5). Blocks count kept tokens. None for the global form.
        shared: one E for all heads.
        relations: rows of further tables, one for each relation of pairs, as of pitch or time
            (Sec. 4.1); `forward` is then given the row of each pair in `related`.
        std: of the normal initialisation, by default D^(−1/2).

    Raises:
        LongspanError: a length or block below 1; a local form that is not causal or has relations;
            relations that are not those built for; bidirectionally other than as many keys as
            queries.
    """

    def __init__(
        self,
        *,
        heads: int,
        head_width: int,
        length: int,
        causal: bool = False,
        block: int | None = None,
        shared: bool = False,
        relations: Sequence[int] = (),
        std: float | None = None,
    ) -> None:
        super().__init__(causal=causal)
        if min(length, *(1 if block is None else block,), *relations) < 1:
            raise LongspanError(
                f"music-transformer got length={length}, block={block}, relations={relations}: "
                "expected at least 1 of each."
            )
        if block is not None and (not causal or relations):
            raise LongspanError(
                "the local form of music-transformer is causal and knows distances only: build it "
                "with causal=True and no relations, or without block."
            )
        self.length, self.block = length, block
        deviation = head_width**-0.5 if std is None else std
        self.table, *related = (
            vectors(rows, head_width, heads=heads, shared=shared, std=deviation)
            for rows in (length if causal else 2 * length - 1, *relations)
        )
        self.related = nn.ParameterList(related)

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: History | None = None,
        *,
        keep: Keep | None = None,
        related: Sequence[Int[Tensor, "B L _"]] = (),
    ) -> tuple[Outputs, History | None]:
        if not self.causal:
            one_sequence(type(self).__name__, q, k)
        k, v, keep, past = tiles.carry(k, v, state, keep, causal=self.causal)
        length, keys = q.shape[2], k.shape[2]
        if [tuple(t.shape) for t in related] != [(len(q), length, keys)] * len(self.related):
            raise LongspanError(
                f"music-transformer has {len(self.related)} relations and got those of shapes "
                f"{[tuple(t.shape) for t in related]}: expected {(len(q), length, keys)} of each, "
                "a row of its table for every query and key so far."
            )
        if self.block is not None and past is not None:
            return self._local(q, past, self.block)
        wide = at_least_float32(q)
        scale = q.shape[3] ** -0.5

        def bias(q: Tensor, _: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
            q = q.to(wide) * scale
            s = distance.scores(q, self.table.to(wide), pos_q, pos_k, before=self.length - 1)
            for table, index in zip(self.related, related, strict=True):
                own = index[:, pos_q - keys + length, : len(pos_k)]
                s = s + distance.by_index(q, table.to(wide), own)
            return s

        return dense.tiled(q, k, v, causal=self.causal, keep=keep, bias=bias)[0], past

    def _local(self, q: Tensor, past: History, block: int) -> tuple[Tensor, History]:
        k, v, keep = past
        length, keys = q.shape[2], k.shape[2]
        before = self.length - 1
        count = keep.sum(1)
        if bool(keep.all()):
            o = distance.local(q, k, v, self.table, block=block, keep=keep, before=before)
        else:
            # Kept tokens first, so that blocks count them alone.
            order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
            q = nn.functional.pad(q, (0, 0, keys - length, 0))
            q, k, v = (reordered(t, order) for t in (q, k, v))
            keep = keep.gather(1, order)
            o = distance.local(q, k, v, self.table, block=block, keep=keep, before=before)
            o = reordered(o, order.argsort(1)[:, keys - length :])
        # Whole blocks that no later query sees are left out.
        drop = (count - block).clamp(min=0) // block * block
        left = int((count - drop).max()) if len(count) else 0
        at = drop[:, None] + torch.arange(left, device=q.device)
        k, v = (reordered(t, at.clamp(max=keys - 1)) for t in (k, v))
        return o, History(k, v, at < count[:, None])
