"""Attention by features of queries and keys along random directions."""

from abc import abstractmethod

from torch import Tensor

from longspan.engines import features as feature
from longspan.nn.protocols import Attention
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


class FeatureAttention(Attention):
    """o_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j). The state is the running `features.Sums`.

    Args:
        directions: rows along which features are taken; None for features of q and k themselves.
        size: features a token. eps: the least distance of a denominator from 0.
    """

    def __init__(
        self,
        *,
        causal: bool,
        directions: feature.Directions | None,
        size: int,
        eps: float,
    ) -> None:
        super().__init__(causal=causal)
        self.directions, self.size, self.eps = directions, size, eps

    @abstractmethod
    def features(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """φ(x), and the logarithm of its unit."""

    def weights(self, q: Queries, k: Keys, *, keep: Keep | None = None) -> Tensor:
        """The matrix (B H L S) that the values are multiplied by, for inspection: quadratic."""
        return feature.matrix(self, q, k, keep)

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: feature.Sums | None = None,
        *,
        keep: Keep | None = None,
    ) -> tuple[Outputs, feature.Sums | None]:
        rows = None if self.directions is None else self.directions()

        def phi(x: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return self.features(x, rows)

        form = {"causal": self.causal, "size": self.size, "eps": self.eps}
        return feature.attend(phi, q, k, v, state, keep=keep, **form)
