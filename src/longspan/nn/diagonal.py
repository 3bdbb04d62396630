"""Attention to earlier tokens at listed distances."""

from abc import abstractmethod

from torch import Tensor

from longspan.engines import dense, grid
from longspan.engines.edges import Diagonal, Diagonals
from longspan.engines.pattern import History
from longspan.errors import LongspanError
from longspan.nn.protocols import Attention
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


class DiagonalAttention(Attention):
    """Causal softmax(q kᵀ / √D) v over the keys that stand at some distances behind the query.

    Places count kept tokens. The state is every key and value.

    Raises:
        LongspanError: more queries than keys.
    """

    def __init__(self) -> None:
        super().__init__(causal=True)

    @abstractmethod
    def diagonals(self, keys: int) -> list[Diagonal]:
        """Distances at which a cell sees, and from which cell on, for so many keys."""

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: History | None = None,
        *,
        keep: Keep | None = None,
    ) -> tuple[Outputs, History]:
        return grid.stream(self._attend, q, k, v, state, keep=keep)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] > k.shape[2]:
            raise LongspanError(
                f"{type(self).__name__} got {q.shape[2]} queries for {k.shape[2]} keys: it looks "
                "back along one sequence and has no cross form."
            )
        return dense.union(q, [(Diagonals(self.diagonals(k.shape[2])), k, v)])[0]
