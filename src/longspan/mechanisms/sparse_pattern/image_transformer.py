"""Image Transformer's local attention (Parmar et al., 2018)."""

from functools import partial

import torch
from torch import Tensor

from longspan.card import Card
from longspan.engines import dense, grid
from longspan.engines.edges import Groups
from longspan.engines.pattern import History
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

State = History | None


@mechanism(
    Card(
        id="image-transformer",
        name="Image Transformer",
        kind="attention",
        family="sparse-pattern",
        paper="Image Transformer",
        cite="Parmar et al., ICML 2018",
        link="https://arxiv.org/abs/1802.05751",
        what="Blocks of an image's pixels attend to themselves and to a margin of pixels around.",
        modes={"bidirectional", "causal", "step"},
        time="L*C*D + L*C*V",
        memory="C*D + C*V",
        tiny={"block": 6, "memory": 4},
        exact={"block": 1000000},
    )
)
class ImageTransformer(Attention):
    """o_i = softmax(q_i K_Mᵀ / √D) V_M, M the memory block of i's query block (Sec. 3.3).

    1D, with two numbers: blocks of l_q tokens, and before each l_m more. 2D, with two pairs: blocks
    of h_q rows and w_q columns, with h_m rows above and w_m columns on either side. Tokens come in
    the order of generation, blocks in raster order and the tokens of each likewise
    (`engines.grid.BlockedRaster`); causally a key is seen if it comes no later in *that* order.
    The bidirectional form sees a margin on all sides, after and below too (tensor2tensor).

    Places count kept tokens. The state is the keys and values that a block to come may list,
    l_q + l_m or (h_q + h_m) rows. The model: `models.image`.

    Args:
        block: l_q, or (h_q, w_q). memory: l_m, or (h_m, w_m), by default as large as the block.
        columns: of the image, in 2D; pixels and their channels where these are tokens.

    Raises:
        LongspanError: a block and a memory of different kinds, or without cells; 2D without
            columns; other than as many keys as queries in the bidirectional form.
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        block: int | tuple[int, int] | list[int] = 256,
        memory: int | tuple[int, int] | list[int] | None = None,
        columns: int | None = None,
    ) -> None:
        super().__init__(causal=causal)
        memory = block if memory is None else memory
        flat = isinstance(block, int)
        if flat != isinstance(memory, int) or flat != (columns is None):
            raise LongspanError(
                f"image-transformer got block={block}, memory={memory}, columns={columns}: give "
                "two numbers for 1D, or two pairs (rows, columns) and columns for 2D."
            )
        self.block, self.memory = grid.pair(block, 1), grid.pair(memory, 0)
        # In 1D the sequence is an image of one column: blocks of rows, with rows above.
        self.columns, self.raster = columns, grid.BlockedRaster(columns or 1, self.block)
        if min(self.memory) < 0:
            raise LongspanError(f"a memory of {memory} is less than none: give 0 or more.")

    def forward(
        self, q: Queries, k: Keys, v: Values, state: State = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, State]:
        if self.causal:
            period = self.raster.band
            above = -(-self.memory[0] // self.block[0]) * period if self.columns else self.memory[0]
            reach = period - 1 + above
            return grid.stream(self._attend, q, k, v, state, keep=keep, reach=reach, period=period)
        return grid.together("image-transformer", self._attend, q, k, v, keep), None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, keys = q.shape[2], k.shape[2]
        if not length or length > keys:
            return torch.zeros_like(v[:, :, :length])
        raster, (high, wide) = self.raster, self.memory
        if self.columns is None:  # no larger than what there is
            raster, high = grid.BlockedRaster(1, (min(self.block[0], keys), 1)), min(high, keys)
        members = partial(raster.members, flange=(high, wide), keys=keys, below=not self.causal)
        first, last = (raster.blocks(step) for step in (keys - length, keys - 1))
        return dense.union(q, [(Groups(members, first, last + 1, causal=self.causal), k, v)])[0]
