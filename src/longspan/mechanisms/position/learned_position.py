"""Learned absolute positions (Gehring et al., 2017)."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.nn.added import Added, Into, Resizing, resized
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
class LearnedPosition(Added):
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
        super().__init__(into)
        self.width, self.length, self.std, self.offset = width, length, std, offset
        self.table = nn.Parameter(torch.empty(offset + length, width))
        nn.init.normal_(self.table, std=std)

    def vectors(self, x: Inputs, pos: Int[Tensor, "#B L"]) -> Float[Tensor, "#B L E"]:
        return F.embedding(pos + self.offset, self.table)

    @torch.no_grad()
    def resize(self, length: int, how: Resizing = "tile") -> "LearnedPosition":
        """A new module for `length` positions (`resized`); the `offset` rows are kept as they are.

        Raises:
            LongspanError: an unknown way, a length below 1, truncation to a greater length.
        """
        special, rows = self.table[: self.offset], self.table[self.offset :]
        other = deepcopy(self)
        other.length = length
        table = torch.cat([special, resized(rows, length, how)])
        other.table = nn.Parameter(table, self.table.requires_grad)
        return other
