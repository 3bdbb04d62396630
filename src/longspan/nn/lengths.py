"""The protocol of what shortens a sequence and lengthens what was made of it."""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from longspan.shapes import Inputs, Keep

Shorter = Float[Tensor, "B N E"]
ShorterKeep = Bool[Tensor, "B N"]


class Length(nn.Module, ABC):
    """x → x', shorter, and y', made of x', → y, as long as x.

    Rows hold their kept tokens first (`engines.pool.align`), and so do the shortened ones. Causally
    y at i follows from x up to i alone, and the state, all zeros before anything was seen,
    continues both directions; each row may stand at another place of its group.

    Attributes:
        factor: how many tokens become one; with factor 1 it changes nothing.
    """

    def __init__(self, *, factor: int, causal: bool) -> None:
        super().__init__()
        self.factor, self.causal = factor, causal

    @abstractmethod
    def shorten(
        self, x: Inputs, state: Any = None, *, keep: Keep | None = None
    ) -> tuple[Shorter, ShorterKeep | None, Any]:
        """(x', its mask, what `lengthen` needs); causally N counts new groups."""

    @abstractmethod
    def lengthen(self, y: Shorter, x: Inputs, plan: Any) -> tuple[Inputs, Any]:
        """(y: B L E, the state), from y', the x that was shortened, and its plan."""
