"""Learned absolute positions (Gehring et al., 2017)."""

from copy import deepcopy
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn import Position
from longspan.nn.positions import Into, acts_into, at_least_float32, consecutive
from longspan.registry import mechanism
from longspan.shapes import Inputs


@mechanism(
    Card(
        id="learned-position",
        name="Learned absolute position encoding",
        kind="position",
        family="position",
        paper="Convolutional Sequence to Sequence Learning",
        cite="Gehring et al., ICML 2017",
        link="https://arxiv.org/abs/1705.03122",
        what="Adds to each token a trained vector that belongs to its position.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*E",
        memory="L*E",
        tiny={"width": 24, "length": 64},
        exact={"width": 24, "length": 64, "std": 0.0},
    )
)
class LearnedPosition(Position):
    """y_i = x_i + p_i with a trained table p (Sec. 3.1).

    Weight decay usually skips the table.

    Args:
        width: E. length: positions 0 … length − 1 are known.
        std: of the normal initialisation (fairseq: E^(−1/2)).
        offset: rows before that of position 0 (BART and RoBERTa: 2, their padding id + 1).
        into: `embeddings`, or `queries-and-keys`: in every layer a table of its own, added to what
            queries and keys, but not values, are projected from.

    Raises:
        LongspanError: a position outside 0 … length − 1; an unknown `into`.
    """

    def __init__(
        self,
        *,
        width: int,
        length: int,
        std: float = 0.02,
        offset: int = 0,
        into: Into = "embeddings",
    ) -> None:
        super().__init__()
        self.acts = acts_into(into)
        self.width, self.length, self.std, self.offset = width, length, std, offset
        self.table = nn.Parameter(torch.empty(offset + length, width))
        nn.init.normal_(self.table, std=std)

    def embed(self, x: Inputs, pos: Int[Tensor, "#B L"] | int = 0) -> Inputs:
        """x + table[pos]; an int is the position of the first token."""
        if isinstance(pos, int):
            self._check(pos, pos + x.shape[1] - 1)
            pos = consecutive(pos, x)
        elif pos.numel() and not torch.compiler.is_compiling():
            self._check(*(int(end) for end in torch.aminmax(pos)))
        return x + F.embedding(pos + self.offset, self.table).to(x.dtype)

    def infuse(self, x: Inputs, pos: Int[Tensor, "#B L"] | int = 0) -> Inputs:
        return self.embed(x, pos)

    def _check(self, first: int, last: int) -> None:
        if first < 0:
            raise LongspanError(f"positions start at 0 and learned-position got {first}.")
        if last >= self.length:
            raise LongspanError(
                f"learned-position was built for {self.length} positions and got position {last}: "
                f"build it with length={last + 1}, resize({last + 1}) it, or shorten the input."
            )

    @torch.no_grad()
    def resize(
        self, length: int, how: Literal["truncate", "tile", "interpolate"] = "tile"
    ) -> "LearnedPosition":
        """A new module for `length` positions; the `offset` rows are kept as they are.

        Args:
            how: `truncate` keeps the first rows, `tile` repeats the table, `interpolate` draws
                rows from lines between neighbours, with the first and the last row in place.

        Raises:
            LongspanError: an unknown way, a length below 1, truncation to a greater length.
        """
        if length < 1:
            raise LongspanError(f"cannot resize to {length} positions: expected at least 1.")
        special, rows = self.table[: self.offset], self.table[self.offset :]
        if how == "truncate":
            if length > self.length:
                raise LongspanError(
                    f"{self.length} positions cannot be truncated to {length}: "
                    "use how='tile' or how='interpolate'."
                )
            rows = rows[:length]
        elif how == "tile":
            rows = rows[torch.arange(length, device=rows.device) % self.length]
        elif how == "interpolate":
            line = rows.to(at_least_float32(rows)).T[None]  # 1 E L
            line = F.interpolate(line, size=length, mode="linear", align_corners=True)
            rows = line[0].T.to(rows.dtype)
        else:
            raise LongspanError(f"no resizing '{how}'; expected truncate, tile or interpolate.")
        resized = deepcopy(self)
        resized.length = length
        resized.table = nn.Parameter(torch.cat([special, rows]), self.table.requires_grad)
        return resized
