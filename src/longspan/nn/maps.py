"""Attention over the places of feature maps."""

from jaxtyping import Float
from torch import Tensor, nn

from longspan.errors import LongspanError
from longspan.nn.heads import MultiHead
from longspan.nn.protocols import Attention


class MapAttention(nn.Module):
    """x + attention over the H × W places of feature maps x, B C H W, with projections.

    Args:
        width: C. keys, values: their channels in all heads, by default C / 2.

    Raises:
        LongspanError: channels that do not divide into the heads.
    """

    def __init__(
        self,
        attention: Attention,
        *,
        width: int,
        heads: int = 1,
        keys: int | None = None,
        values: int | None = None,
    ) -> None:
        super().__init__()
        keys, values = keys or width // 2, values or width // 2
        if keys % heads or values % heads:
            raise LongspanError(
                f"{keys} key and {values} value channels do not divide into {heads} heads: "
                "choose multiples."
            )
        self.mixer = MultiHead(
            attention,
            width=width,
            heads=heads,
            head_width=keys // heads,
            value_width=values // heads,
        )

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        y, _ = self.mixer(x.flatten(2).mT)
        return x + y.mT.view_as(x)
