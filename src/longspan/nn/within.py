"""Mixers of one sequence that carry nothing."""

from abc import abstractmethod
from typing import ClassVar

from longspan.errors import LongspanError
from longspan.nn.protocols import Mixer
from longspan.shapes import Context, Inputs, Keep, Marks


class Within(Mixer):
    """x → y within one sequence, without a state.

    Raises:
        LongspanError: a context or marks.

    Attributes:
        refusal: what the error says.
    """

    refusal: ClassVar[str]

    @abstractmethod
    def mix(self, x: Inputs, keep: Keep | None) -> Inputs:
        """y, 0 where masked; masked positions of x may hold anything."""

    def forward(
        self,
        x: Inputs,
        state: None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, None]:
        if context is not None or marks is not None:
            raise LongspanError(self.refusal)
        return self.mix(x, keep), None
