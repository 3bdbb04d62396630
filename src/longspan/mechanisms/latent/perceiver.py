"""Perceiver (Jaegle et al., 2021a)."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn.reading import Latents, Reading, Source
from longspan.registry import mechanism
from longspan.shapes import Keep


@mechanism(
    Card(
        id="perceiver",
        name="Perceiver",
        kind="architecture",
        family="latent",
        paper="Perceiver: General Perception with Iterative Attention",
        cite="Jaegle et al., ICML 2021",
        link="https://arxiv.org/abs/2103.03206",
        what="A few learned latents read the input again and again, and attend to themselves in "
        "between.",
        modes={"bidirectional", "cross"},
        time="S*M*E + M*M*E + M*E*E",
        memory="M*E",
    )
)
class Perceiver(nn.Module):
    """Z ← Block_b(Cross_c(Z, X)), T times over the same X, Z learned at first (Sec. 3.1).

    Costs of depth do not know the size of X. X has its positions among its channels
    (`nn.reading.Places`), and their order does not matter. The classifier: `models.perceiver`.

    Args:
        width: D of the latents. source_width: C of the array, positions included.
        latents: N. layers: of self-attention in a block.
        crosses, blocks: which weights each iteration uses; [0, 1, 1, …] and [0, 0, 0, …] share as
            the paper does, whose first reading has its own; range(T) shares nothing.
        inner: of queries, keys and values in a reading, by default D.

    Raises:
        LongspanError: patterns of unequal length, or that pass over a number.
    """

    def __init__(
        self,
        *,
        width: int = 1024,
        source_width: int,
        latents: int = 512,
        layers: int = 6,
        crosses: Sequence[int] = (0, 1, 1, 1, 1, 1, 1, 1),
        blocks: Sequence[int] = (0, 0, 0, 0, 0, 0, 0, 0),
        cross_heads: int = 1,
        heads: int = 8,
        inner: int | None = None,
        widening: int = 1,
    ) -> None:
        super().__init__()
        self.crosses, self.blocks = tuple(crosses), tuple(blocks)
        whole = all(set(p) == set(range(len(set(p)))) for p in (self.crosses, self.blocks))
        if not self.crosses or len(self.crosses) != len(self.blocks) or not whole:
            raise LongspanError(
                f"perceiver got crosses={list(crosses)}, blocks={list(blocks)}: expected two "
                "patterns of the same length that number their weights 0, 1, 2, …."
            )
        self.start = Latents(latents, width)
        self.read = nn.ModuleList(
            Reading(
                width=width,
                heads=cross_heads,
                source_width=source_width,
                inner=inner,
                widening=widening,
            )
            for _ in set(self.crosses)
        )
        self.think = nn.ModuleList(
            nn.Sequential(
                *(Reading(width=width, heads=heads, widening=widening) for _ in range(layers))
            )
            for _ in set(self.blocks)
        )

    def forward(self, source: Source, *, keep: Keep | None = None) -> Float[Tensor, "B N E"]:
        """The latents, having read."""
        z = self.start(len(source))
        for cross, block in zip(self.crosses, self.blocks, strict=True):
            z = self.think[block](self.read[cross](z, source, keep=keep))
        return z
