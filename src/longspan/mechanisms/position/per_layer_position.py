"""Positions learned for each layer (Al-Rfou et al., 2018)."""

from typing import Literal

from jaxtyping import Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn import Position
from longspan.registry import build, mechanism
from longspan.shapes import Inputs


@mechanism(
    Card(
        id="per-layer-position",
        name="Per-layer positions and deep character LM (Al-Rfou)",
        kind="position",
        family="position",
        paper="Character-Level Language Modeling with Deeper Self-Attention",
        cite="Al-Rfou et al., AAAI 2019",
        link="https://arxiv.org/abs/1808.04444",
        what="Adds to the input of every layer, not only of the first, vectors that belong to the "
        "positions and to the layer.",
        modes={"bidirectional", "causal", "step"},
        time="L*E",
        memory="L*E",
        tiny={"width": 24, "length": 64, "layers": 2},
        exact={"width": 24, "length": 64, "layers": 2, "std": 0.0},
    )
)
class PerLayerPosition(Position):
    """x^n ← x^n + P^n before layer n, with tables of each layer's own (Sec. 3.4).

    What is added flows on in the residual stream. The paper's training, with losses at the layers
    between, is `longspan.training.supervision`.

    Args:
        width: E. layers: N.
        length: positions 0 … length − 1 are known where tables are learned.
        table: `learned`, or `sinusoidal`: the same waves before every layer, at any length.
        std: of the normal initialisation of learned tables.

    Raises:
        LongspanError: fewer than one layer, or a layer beyond the last; a position outside of
            learned tables.
    """

    acts = frozenset({"enter"})

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        length: int = 512,
        table: Literal["learned", "sinusoidal"] = "learned",
        std: float = 0.02,
    ) -> None:
        super().__init__()
        if layers < 1 or table not in ("learned", "sinusoidal"):
            raise LongspanError(
                f"per-layer-position got layers={layers}, table='{table}': expected at least 1 "
                "layer, and learned or sinusoidal."
            )
        self.layers = layers
        if table == "sinusoidal":
            tables: list[Position] = [build("sinusoidal-position")] * layers
        else:
            learned = {"width": width, "length": length, "std": std}
            tables = [build("learned-position", **learned) for _ in range(layers)]
        self.tables = nn.ModuleList(tables)

    def enter(self, x: Inputs, pos: Int[Tensor, "#B L"], layer: int) -> Inputs:
        """x + P^layer[pos], layers counting from 0."""
        if not 0 <= layer < self.layers:
            raise LongspanError(
                f"per-layer-position was built for {self.layers} layers and got layer {layer}: "
                f"build it with layers={layer + 1}."
            )
        return self.tables[layer].embed(x, pos)  # pyright: ignore[reportCallIssue]
