"""Learned positions on a grid, a table for each axis (Child et al., 2019)."""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Int
from torch import Tensor, nn

from longspan.errors import LongspanError
from longspan.nn import Position
from longspan.shapes import Inputs


class AxisPosition(Position):
    """y_t = x_t + Σ_a W_a[coordinate a of t] (Sec. 5.2), tokens filling the grid row by row.

    An image of 32 × 32 with 3 channels has axes (32, 32, 3); text has (rows, stride).

    Args:
        std: of the tables at the start.

    Raises:
        LongspanError: no axes, or one below 1; a position beyond the grid.
    """

    acts = frozenset({"embed"})

    def __init__(self, axes: Sequence[int], *, width: int, std: float = 0.02) -> None:
        super().__init__()
        if min(axes, default=0) < 1:
            raise LongspanError(f"axes={list(axes)}: expected the sizes of a grid, 1 or more each.")
        self.axes = tuple(axes)
        self.tables = nn.ParameterList(torch.randn(size, width) * std for size in axes)

    def embed(self, x: Inputs, pos: Int[Tensor, "#B L"]) -> Inputs:
        most = prod(self.axes)
        if pos.numel() and not torch.compiler.is_compiling() and int(pos.max()) >= most:
            raise LongspanError(
                f"the grid {self.axes} has {most} places and got position {int(pos.max())}: "
                "give larger axes, or shorten the input."
            )
        for axis, table in enumerate(self.tables):
            step = prod(self.axes[axis + 1 :])
            x = x + nn.functional.embedding(pos // step % self.axes[axis], table).to(x.dtype)
        return x
