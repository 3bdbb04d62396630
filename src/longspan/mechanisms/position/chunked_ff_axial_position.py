"""Axial position embeddings of the Reformer (Kitaev et al., 2020)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn.added import Added
from longspan.registry import mechanism
from longspan.shapes import Inputs


@mechanism(
    Card(
        id="chunked-ff-axial-position",
        name="Axial position embeddings (Reformer)",
        kind="position",
        family="position",
        paper="Reformer: The Efficient Transformer",
        cite="Kitaev et al., ICLR 2020",
        link="https://arxiv.org/abs/2001.04451",
        what="Gives a position a vector for each of its coordinates in a grid, so that long "
        "sequences need short tables.",
        modes={"bidirectional", "causal", "step"},
        time="L*E",
        memory="L*E",
        tiny={"width": 24, "axes": (4, 16)},
        exact={"width": 24, "axes": (4, 16), "std": 0.0},
    )
)
class AxialPosition(Added):
    """y_j = x_j + [E_1[j div n_2]; E_2[j mod n_2]], row by row, for any number of axes.

    Of L = Π n_a positions with E = Σ d_a channels, Σ n_a d_a numbers are learned. The paper's other
    half, feed-forwards and the loss a chunk of tokens at a time, is `longspan.nn.chunked`.

    Args:
        axes: n_a, the first varying slowest; by default a square of at least `length` places.
        widths: d_a, by default equal parts. form: `concat`, or `sum`, where every d_a is E.
        std: of the normal initialisation, best that of the token embeddings.
        dropout: of whole lines of the grid: a row of the batch loses all positions that share a
            coordinate on `dropped`, an axis.

    Raises:
        LongspanError: a grid of no place, or of other widths than E; a position outside of it.
    """

    def __init__(
        self,
        *,
        width: int,
        axes: Sequence[int] | None = None,
        length: int | None = None,
        widths: Sequence[int] | None = None,
        form: Literal["concat", "sum"] = "concat",
        std: float = 0.02,
        dropout: float = 0.0,
        dropped: int = -1,
    ) -> None:
        super().__init__()
        if axes is None:
            rows = math.ceil(math.sqrt(length or 0))
            axes = (rows, -(-(length or 0) // max(rows, 1)))
        if min(axes, default=0) < 1:
            raise LongspanError(f"a grid of {tuple(axes)}: give axes, 1 or more each, or a length.")
        if form not in ("concat", "sum"):
            raise LongspanError(f"no form '{form}'; expected concat or sum.")
        count = len(axes)
        if widths is None:
            parts = [width // count + (a < width % count) for a in range(count)]
            widths = parts if form == "concat" else [width] * count
        fits = sum(widths) == width if form == "concat" else set(widths) == {width}
        if len(widths) != count or not fits or min(widths) < 1:
            raise LongspanError(
                f"widths {list(widths)} of {count} axes do not {form} to {width}: give one for "
                f"each axis, {'whose sum is' if form == 'concat' else 'each'} {width}."
            )
        if not -count <= dropped < count:
            raise LongspanError(f"no axis {dropped} in a grid of {count} to drop lines of.")
        self.axes, self.length = tuple(axes), math.prod(axes)
        self.form, self.dropout, self.dropped = form, dropout, dropped
        self.tables = nn.ParameterList(
            torch.randn(n, d) * std for n, d in zip(axes, widths, strict=True)
        )

    def vectors(self, x: Inputs, pos: Int[Tensor, "#B L"]) -> Float[Tensor, "_ L E"]:
        at = torch.unravel_index(pos, self.axes)
        parts = [F.embedding(c, table) for c, table in zip(at, self.tables, strict=True)]
        y = torch.cat(parts, -1) if self.form == "concat" else torch.stack(parts).sum(0)
        if self.training and self.dropout:
            lines = F.dropout(y.new_ones(len(x), self.axes[self.dropped]), self.dropout)
            y = y * lines.gather(1, at[self.dropped].expand(len(x), -1))[..., None]
        return y
