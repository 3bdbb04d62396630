"""Mixers of one sequence whose tokens are all alike."""

from abc import abstractmethod
from typing import Any

from longspan.errors import LongspanError
from longspan.nn.protocols import Mixer
from longspan.shapes import Context, Inputs, Keep, Marks


class Within(Mixer):
    """x, state → y, state within one sequence.

    Raises:
        LongspanError: a context or marks; a state where it is not causal.

    Attributes:
        causal: it carries a state.
    """

    causal: bool = False

    @abstractmethod
    def mix(self, x: Inputs, state: Any, keep: Keep | None) -> tuple[Inputs, Any]:
        """(y, state); x is 0 where masked, and y is made so."""

    def forward(
        self,
        x: Inputs,
        state: Any = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, Any]:
        name = type(self).__name__
        if context is not None or marks is not None:
            raise LongspanError(
                f"{name} mixes one sequence, all of its tokens alike, and got a context or marks: "
                "leave them out, or use an attention in a MultiHead (longspan.find(mode='cross'))."
            )
        if state is not None and not self.causal:
            raise LongspanError(
                f"{name} got a state, but only a causal form has one: build it causal=True."
            )
        if keep is None:
            return self.mix(x, state, None)
        hidden = ~keep[..., None]
        y, state = self.mix(x.masked_fill(hidden, 0), state, keep)
        return y.masked_fill(hidden, 0), state
