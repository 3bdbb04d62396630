"""Sinusoidal position encoding (Vaswani et al., 2017)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn.added import Added, Into
from longspan.nn.positions import Layout, Spacing, at_least_float32, raster, sinusoid
from longspan.registry import mechanism
from longspan.shapes import Inputs


@mechanism(
    Card(
        id="sinusoidal-position",
        name="Sinusoidal position encoding",
        kind="position",
        family="position",
        paper="Attention Is All You Need",
        cite="Vaswani et al., NeurIPS 2017",
        link="https://arxiv.org/abs/1706.03762",
        what="Adds to each token sines and cosines of its position, from fast to slow waves.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*E",
        memory="L*E",
    )
)
class SinusoidalPosition(Added):
    """y_i = x_i + PE(i), PE(i)_2c = sin(i ω_c), PE(i)_{2c+1} = cos(i ω_c), ω_c = base^(−2c/E).

    (Sec. 3.5.) No parameters, any length; angles are computed in at least float32.

    Args:
        layout: `interleaved` as above, or `concatenated`: all sines, then all cosines.
        spacing: `paper` as above, or `inclusive`: ω_c = base^(−c/(E/2 − 1)) (tensor2tensor,
            fairseq).
        offset: added to every position (fairseq starts at 2, its padding id + 1).
        axial: half the channels for the row, half for the column; pos then ends in (row, column).
        columns: width of the grid, so that the axial form takes flat row-major positions.
        into: `embeddings`, or `queries-and-keys`: added in every layer to what queries and keys,
            but not values, are projected from.

    Raises:
        LongspanError: an unknown layout, spacing or `into`, axial with an odd width or flat
            positions.
    """

    def __init__(
        self,
        *,
        layout: Layout = "interleaved",
        spacing: Spacing = "paper",
        base: float = 10000.0,
        offset: int = 0,
        axial: bool = False,
        columns: int | None = None,
        into: Into = "embeddings",
    ) -> None:
        super().__init__(into)
        if columns is not None and not axial:
            raise LongspanError(
                "columns lay out a grid: build sinusoidal-position with axial=True."
            )
        self.layout: Layout = layout
        self.spacing: Spacing = spacing
        self.base, self.offset, self.axial, self.columns = base, offset, axial, columns
        # What sinusoid refuses, it refuses here and not at the first batch.
        self.table(torch.zeros(1, dtype=torch.long), 2)

    def vectors(
        self, x: Inputs, pos: Int[Tensor, "#B L"] | Int[Tensor, "#B L 2"]
    ) -> Float[Tensor, "#B L E"]:
        width, dtype = x.shape[-1], at_least_float32(x)
        if not self.axial:
            return self.table(pos, width, dtype)
        if self.columns is not None:
            pos = raster(pos, self.columns)
        if width % 2 or pos.dim() != 3:
            raise LongspanError(
                f"the axial form got width {width} and positions of shape {tuple(pos.shape)}: "
                "expected an even width and B L 2, or flat positions with columns= given."
            )
        return self.table(pos, width // 2, dtype).flatten(-2)

    def table(
        self, pos: Int[Tensor, "*shape"], width: int, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "*shape {width}"]:
        """PE itself, as for Universal Transformer's second sinusoid over the steps of depth."""
        return sinusoid(
            pos + self.offset,
            width,
            layout=self.layout,
            spacing=self.spacing,
            base=self.base,
            dtype=dtype,
        )
