"""Positions added to queries and keys before their projections, for any attention."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from longspan.nn.blockwise import alone
from longspan.nn.heads import MultiHeadState
from longspan.nn.positions import positions_from, sinusoid
from longspan.nn.protocols import Attention, Mixer
from longspan.shapes import Context, Inputs, Keep, Marks


class Infused(Mixer):
    """y = attention((x + P) W_q, (x + P) W_k, x W_v) W_o, P sinusoidal (Press et al., Sec. 4).

    Positions count a row's kept tokens from the first it has seen; values and hence outputs carry
    none. For attentions with queries, keys and values of their own.
    """

    def __init__(self, attention: Attention, *, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.width, self.heads = attention, width, heads
        self.project = nn.ModuleDict({name: nn.Linear(width, width) for name in "qkv"})
        self.output = nn.Linear(width, width)

    def forward(
        self,
        x: Inputs,
        state: MultiHeadState | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, MultiHeadState | None]:
        x, seen = alone(self, x, keep, context, marks)
        before = torch.zeros_like(seen[:, 0:1].sum(1)) if state is None else state.seen
        wide = torch.promote_types(x.dtype, torch.float32)
        placed = x + sinusoid(positions_from(seen, before), self.width, dtype=wide).to(x.dtype)
        q, k, v = (self._heads(name, t) for name, t in zip("qkv", (placed, placed, x), strict=True))
        o, carried = self.attention(q, k, v, state and state.attention, keep=keep)
        y = self.output(rearrange(o, "B H L V -> B L (H V)")).masked_fill(~seen[..., None], 0)
        return y, None if carried is None else MultiHeadState(carried, before + seen.sum(1))

    def _heads(self, name: str, t: Tensor) -> Any:
        return rearrange(self.project[name](t), "B L (H D) -> B H L D", H=self.heads)
