"""Positions that are added as vectors, and what their tables are resized by."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from longspan.errors import LongspanError
from longspan.nn.positions import at_least_float32
from longspan.nn.protocols import Act, Position
from longspan.shapes import Inputs

Into = Literal["embeddings", "queries-and-keys"]
Resizing = Literal["truncate", "tile", "interpolate"]
ACTS: dict[str, Act] = {"embeddings": "embed", "queries-and-keys": "infuse"}


class Added(Position, ABC):
    """y_i = x_i + p(i).

    Args:
        into: `embeddings`, or `queries-and-keys`: in every layer, into what queries and keys, but
            not values, are projected from.

    Attributes:
        length: positions 0 … length − 1 are known; None for all.

    Raises:
        LongspanError: added into anything else; a position that is not known.
    """

    length: int | None = None

    def __init__(self, into: Into = "embeddings") -> None:
        super().__init__()
        if into not in ACTS:
            raise LongspanError(f"into is '{into}'; expected {' or '.join(ACTS)}.")
        self.acts = frozenset({ACTS[into]})

    @abstractmethod
    def vectors(self, x: Inputs, pos: Tensor) -> Float[Tensor, "#B L E"]:
        """p(pos) for these inputs, in any dtype."""

    def embed(
        self, x: Inputs, pos: Int[Tensor, "#B L"] | Int[Tensor, "#B L 2"] | int = 0
    ) -> Inputs:
        """x + p(pos); an int is the position of the first token."""
        if isinstance(pos, int):
            self._check(pos, pos + x.shape[1] - 1)
            pos = torch.arange(pos, pos + x.shape[1], device=x.device)[None]
        elif self.length is not None and pos.numel() and not torch.compiler.is_compiling():
            self._check(*(int(end) for end in torch.aminmax(pos)))
        return x + self.vectors(x, pos).to(x.dtype)

    def infuse(
        self, x: Inputs, pos: Int[Tensor, "#B L"] | Int[Tensor, "#B L 2"] | int = 0
    ) -> Inputs:
        return self.embed(x, pos)

    def _check(self, first: int, last: int) -> None:
        if self.length is None:
            return
        if first < 0:
            raise LongspanError(f"positions start at 0 and {type(self).__name__} got {first}.")
        if last >= self.length:
            raise LongspanError(
                f"{type(self).__name__} was built for {self.length} positions and got position "
                f"{last}: build it with length={last + 1}, or shorten the input."
            )


def resized(
    rows: Float[Tensor, "_ E"], length: int, how: Resizing = "tile"
) -> Float[Tensor, "{length} E"]:
    """A table of as many rows, made of those of another.

    Args:
        how: `truncate` keeps the first rows, `tile` repeats the table, `interpolate` draws rows
            from lines between neighbours, with the first and the last row in place.

    Raises:
        LongspanError: an unknown way, a length below 1, truncation to a greater length.
    """
    if length < 1:
        raise LongspanError(f"cannot resize to {length} positions: expected at least 1.")
    if how == "tile":
        return rows[torch.arange(length, device=rows.device) % len(rows)]
    if how == "interpolate":
        line = rows.to(at_least_float32(rows)).T[None]  # 1 E L
        line = F.interpolate(line, size=length, mode="linear", align_corners=True)
        return line[0].T.to(rows.dtype)
    if how != "truncate":
        raise LongspanError(f"no resizing '{how}'; expected truncate, tile or interpolate.")
    if length > len(rows):
        raise LongspanError(
            f"{len(rows)} positions cannot be truncated to {length}: "
            "use how='tile' or how='interpolate'."
        )
    return rows[:length]
