"""Attention from one set of vectors to another, each of its own width."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from longspan.engines import dense
from longspan.errors import LongspanError
from longspan.shapes import Inputs, Keep


class CrossAttention(nn.Module):
    """q = x W_q, o_h = softmax(q_h K_hᵀ · scale) V_h, y = [o_1; …; o_H] W_o.

    A row that sees nothing gets o = 0.

    Args:
        width: of x and y. source_width: of what is attended to, by default the same.
        inner: of queries, keys and values together, by default `width`; value_width: of values.
        output: apply W_o; else y is the heads side by side.
        scale: by default (inner / heads)^(−1/2).

    Raises:
        LongspanError: widths that the heads do not divide.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        source_width: int | None = None,
        inner: int | None = None,
        value_width: int | None = None,
        output: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        inner, source_width = inner or width, source_width or width
        value_width = value_width or inner
        if inner % heads or value_width % heads:
            raise LongspanError(
                f"widths {inner} and {value_width} do not divide into {heads} heads: "
                "choose multiples."
            )
        self.heads, self.scale = heads, scale
        self.q = nn.Linear(width, inner)
        self.k, self.v = nn.Linear(source_width, inner), nn.Linear(source_width, value_width)
        self.output = nn.Linear(value_width, width) if output else nn.Identity()
        for linear in (self.q, self.k, self.v, self.output):
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: Inputs,
        source: Float[Tensor, "B S _"],
        *,
        keep: Keep | None = None,
    ) -> tuple[Float[Tensor, "B L _"], Float[Tensor, "B L _"]]:
        """(y, the projected queries); `keep` is of the source, which may hold NaN where masked."""
        if keep is not None:
            source = source.masked_fill(~keep[..., None], 0)
        projected = self.q(x)
        q, k, v = (
            rearrange(t, "B L (H D) -> B H L D", H=self.heads)
            for t in (projected, self.k(source), self.v(source))
        )
        o = dense.attend(q, k, v, keep=keep, scale=self.scale)
        return self.output(rearrange(o, "B H L D -> B L (H D)")), projected
