"""FlashAttention and its block-sparse form (Dao et al., 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from longspan.card import Card
from longspan.engines import dense, pattern, tiles
from longspan.engines.pattern import Pattern, PerHead, Window
from longspan.engines.pattern.values import Intervals
from longspan.errors import LongspanError
from longspan.nn import Bias
from longspan.nn.tiled import TiledAttention
from longspan.registry import mechanism
from longspan.shapes import Keep


def tile_sizes(width: int, memory: int = 2**16) -> tuple[int, int]:
    """(B_r, B_c) = (min(⌈M/4d⌉, d), ⌈M/4d⌉) for `memory` M numbers on chip (Alg. 1, line 1)."""
    cols = -(-memory // (4 * width))
    return min(cols, width), cols


def backend(
    queries: int, keys: int, *, causal: bool, blocks: bool, bias: bool, dropout: float
) -> Literal["fused", "tiled"]:
    """`fused` where torch's kernels compute the same, `tiled` for what they lack.

    They have no bias but a whole matrix of it, and no dropout that can be drawn again tile by
    tile; a block mask counts queries from the last key, which fits no cross form.
    """
    apart = blocks and not causal and queries != keys
    return "tiled" if bias or dropout or apart else "fused"


@dataclass(frozen=True)
class Butterfly(Pattern):
    """Each sees those whose number differs from its own in at most one binary digit."""

    def sees(self, i: Tensor, j: Tensor, keys: int) -> Tensor:
        apart = i ^ j
        return (apart & (apart - 1)) == 0

    def meets(self, i: Intervals, j: Intervals, keys: int) -> tuple[Tensor, Tensor]:
        single = (i[0] == i[1]) & (j[0] == j[1])
        seen = self.sees(i[0], j[0], keys)
        return seen | ~single, seen & single

    def reach(self, i: Intervals, keys: int) -> Intervals:
        if not bool((i[0] == i[1]).all()):
            return torch.zeros_like(i[0])[:, None], torch.full_like(i[0], keys - 1)[:, None]
        digits = torch.tensor([0] + [1 << b for b in range(keys.bit_length())])
        found = i[0][:, None] ^ digits
        return found, found


def butterfly(near: int = 1) -> Pattern:
    """The default pattern among blocks (Sec. 3.3): a butterfly and `near` neighbours each side."""
    return Butterfly() | Window(near, near)


@mechanism(
    Card(
        id="flashattention",
        name="FlashAttention (and block-sparse FlashAttention)",
        kind="attention",
        family="dense",
        paper="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
        cite="Dao et al., NeurIPS 2022",
        link="https://arxiv.org/abs/2205.14135",
        what="Softmax attention tile by tile in fast memory, keeping one number a query for the "
        "backward pass; blocks that are masked cost nothing.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*S*D + L*S*V",
        memory="S*D + S*V",
        tiny={"backend": "tiled", "tile": [64, 64]},
        exact={},
    )
)
class FlashAttention(TiledAttention):
    """O = softmax(τ Q Kᵀ) V by tiles, running maximum and sum rescaled (Alg. 1).

    Backward (Alg. 4), from Q, K, V, O and the logsumexp: P_ij = exp(s_ij − lse_i),
    dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O)). Rows of queries are the outer loop here, so that each is
    written once. The state is every key and value so far.

    With `blocks` (Sec. 3.3), positions count kept tokens, from the first key; in the cross form
    those of queries from the first query.

    Args:
        backend: `fused` takes torch's kernels, `tiled` the tiles written in plain PyTorch, `auto`
            the first where it means the same (`backend` in this file is the rule).
        tile: queries and keys of a tile, by default `tile_sizes`; with `blocks` one block.
        blocks: which blocks of `block` tokens meet: "butterfly", a pattern among blocks, or a
            boolean matrix (queries × keys), one for all heads or one each.
        dropout: of the weights, in training; `generator` draws it.

    Raises:
        LongspanError: an unknown backend or pattern, sizes below 1, a dropout outside 0 ≤ p < 1;
            `fused` for what it lacks; more tokens than a matrix of blocks has room for.
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        backend: Literal["auto", "fused", "tiled"] = "auto",
        tile: Sequence[int] | None = None,
        blocks: str | Pattern | PerHead | Tensor | None = None,
        block: int = 128,
        dropout: float = 0.0,
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(causal=causal, dropout=dropout, scale=scale, generator=generator)
        if backend not in ("auto", "fused", "tiled"):
            raise LongspanError(f"no backend '{backend}'; expected auto, fused or tiled.")
        if min(block, *(tile or (1,))) < 1 or not 0 <= dropout < 1:
            raise LongspanError(
                f"flashattention got tile={tile}, block={block}, dropout={dropout}: a tile or "
                "block holds at least 1 token, and 0 ≤ dropout < 1."
            )
        self.backend, self.tile, self.block = backend, tile, block
        self.room: tuple[int, ...] = ()
        self.sparse = blocks is not None
        self.sees = self._pattern(blocks)

    def _pattern(self, blocks: str | Pattern | PerHead | Tensor | None) -> Pattern | PerHead:
        order = pattern.causal if self.causal else pattern.everything
        if blocks is None:
            return order
        if isinstance(blocks, Tensor):
            if blocks.dim() not in (2, 3) or blocks.dtype != torch.bool or not blocks.numel():
                raise LongspanError(
                    f"blocks is a {blocks.dtype} tensor of shape {tuple(blocks.shape)}: expected "
                    "booleans, query blocks × key blocks, with an axis of heads before or without."
                )
            self.room = tuple(n * self.block for n in blocks.shape[-2:])
            blocks = pattern.tables(blocks[None] if blocks.dim() == 2 else blocks)
        elif isinstance(blocks, str):
            if blocks != "butterfly":
                raise LongspanError(
                    f"no block pattern '{blocks}'; expected 'butterfly', a pattern or a matrix."
                )
            blocks = butterfly()
        choices = blocks.choices if isinstance(blocks, PerHead) else (blocks,)
        found = [one.blocks(self.block) for one in choices]
        return pattern.per_head([one & order for one in found] if self.causal else found)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Keep | None, bias: Bias | None, dropout: float
    ) -> Tensor:
        queries, keys = q.shape[2], k.shape[2]
        if self.room and (keys > self.room[1] or max(queries, self.causal * keys) > self.room[0]):
            raise LongspanError(
                f"flashattention got {queries} queries and {keys} keys, and its blocks cover "
                f"{self.room[0]} and {self.room[1]}: give a larger matrix, or a pattern."
            )
        way = backend(
            queries,
            keys,
            causal=self.causal,
            blocks=self.sparse,
            bias=bias is not None,
            dropout=dropout,
        )
        if self.backend == "fused" and way == "tiled":
            raise LongspanError(
                "torch's kernels have no bias computed by tile, no dropout that can be drawn "
                "again and no block mask across two sequences: build with backend='auto'."
            )
        if way == "tiled" or self.backend == "tiled":
            return self._tiled(q, k, v, keep, bias, dropout)
        if not self.sparse:
            return dense.attend(q, k, v, causal=self.causal, keep=keep, scale=self.scale)
        size = (self.block, self.block)
        return pattern.attend(q, k, v, self.sees, keep=keep, block=size, scale=self.scale)

    def _tiled(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Keep | None, bias: Bias | None, dropout: float
    ) -> Tensor:
        own = self.causal or q.shape[2] == k.shape[2]
        rows, cols = self.tile or (
            (self.block, self.block) if self.sparse else tile_sizes(q.shape[3])
        )
        run = partial(
            tiles.attend,
            shape=self.sees,
            bias=bias,
            dropout=dropout,
            generator=self.generator,
            scale=self.scale,
            rows=rows,
            cols=cols,
        )
        if not self.sparse or keep is None:
            seen = None if keep is None else keep[:, None, None]
            return run(q, k, v, offset=None if own or not self.sparse else 0, seen=seen)[0]
        outs = [v.new_zeros(0, *q.shape[1:3], v.shape[3])]
        for b, kept in enumerate(keep):  # blocks count a row's own tokens
            mine = kept[k.shape[2] - q.shape[2] :] if own else kept.new_ones(q.shape[2])
            o, _ = run(
                q[b, None, :, mine],
                k[b, None, :, kept],
                v[b, None, :, kept],
                offset=None if own else 0,
            )
            at = mine.nonzero()[:, 0]
            outs.append(o.new_zeros(1, *q.shape[1:3], v.shape[3]).index_copy(2, at, o))
        return torch.cat(outs)
