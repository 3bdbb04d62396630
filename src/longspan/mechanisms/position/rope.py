"""Rotary position embedding, RoPE (Su et al., 2021)."""

from jaxtyping import Float, Int
from torch import Tensor

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn import Position
from longspan.nn.positions import at_least_float32, frequencies, raster
from longspan.nn.rotation import Planes, check_planes, rotated, turn
from longspan.registry import mechanism


@mechanism(
    Card(
        id="rope",
        name="Rotary position embedding (RoPE)",
        kind="position",
        family="position",
        paper="RoFormer: Enhanced Transformer with Rotary Position Embedding",
        cite="Su et al., 2021",
        link="https://arxiv.org/abs/2104.09864",
        what="Turns queries and keys by angles that grow with position, so that their products "
        "tell how far apart they are.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*D",
        memory="L*D",
        exact={"channels": 0},
    )
)
class RotaryPosition(Position):
    """(R_i q)·(R_j k) = qᵀ R_{j−i} k: plane c is turned by the angle i θ_c, θ_c = base^(−2c/D).

    (Eqs. 14 to 16, whose c starts at 1.) Angles, cos and sin are computed in at least float32.
    Keys are cached as rotated. A linear attention that takes turns rotates its features
    φ(q), φ(k) in the numerator alone (Eq. 19), as does `linear-transformer` with rotated=True:

        o_i = Σ_j (R_i φ(q_i))·(R_j φ(k_j)) v_j / Σ_j φ(q_i)·φ(k_j)

    In cross-attention it means something only where both sequences share one position axis.

    Args:
        layout: of the planes: channels (2c, 2c + 1), `interleaved` (the paper, GPT-J), or
            (c, c + D/2), `half-split` (GPT-NeoX, Llama); `nn.rotation` converts weights.
        channels: only the first so many are rotated, by default all; 0 rotates nothing.
        scaling: positions are divided by it (linear interpolation, Chen et al., 2023).
        axial: the first half of the planes turns with the row, the second with the column, each
            with the frequencies of width D/2; pos then ends in (row, column).
        columns: width of the grid, so that the axial form takes flat row-major positions.

    Raises:
        LongspanError: an unknown layout, channels that do not pair up or exceed the width, flat
            positions for the axial form.
    """

    acts = frozenset({"rotate"})

    def __init__(
        self,
        *,
        layout: Planes = "interleaved",
        base: float = 10000.0,
        channels: int | None = None,
        scaling: float = 1.0,
        axial: bool = False,
        columns: int | None = None,
    ) -> None:
        super().__init__()
        check_planes(layout)
        if columns is not None and not axial:
            raise LongspanError("columns lay out a grid: build rope with axial=True.")
        self.layout: Planes = layout
        self.base, self.channels, self.scaling = base, channels, scaling
        self.axial, self.columns = axial, columns

    def rotate(
        self,
        x: Float[Tensor, "B H L D"],
        pos: Int[Tensor, "L"] | Int[Tensor, "#B L"] | Int[Tensor, "L 2"] | Int[Tensor, "#B L 2"],
    ) -> Float[Tensor, "B H L D"]:
        channels = rotated(x.shape[-1], self.channels, multiple=4 if self.axial else 2)
        return turn(x, self._angles(pos, channels, x), self.layout)

    def _angles(self, pos: Tensor, channels: int, x: Tensor) -> Tensor:
        """The angle of each plane: (L | B 1 L) channels/2."""
        axes = pos[..., None]
        if self.axial:
            axes = pos if self.columns is None else raster(pos, self.columns)
            if axes.shape[-2:] != (x.shape[2], 2):
                raise LongspanError(
                    f"the axial rope got positions of shape {tuple(pos.shape)} for {x.shape[2]} "
                    "tokens: expected L 2 or B L 2, or flat positions with columns= given."
                )
        theta = frequencies(
            channels // axes.shape[-1], base=self.base, dtype=at_least_float32(x), device=x.device
        )
        angles = (axes[..., None] / self.scaling * theta).flatten(-2)
        return angles if angles.dim() == 2 else angles[:, None]
