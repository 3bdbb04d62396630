"""Exact attention by tiles, without its kernel: what is carried, and what is dropped."""

from abc import abstractmethod

import torch
from torch import Tensor

from longspan.engines import pattern, tiles
from longspan.nn.protocols import Attention, Bias
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


class TiledAttention(Attention):
    """softmax(q kᵀ · scale + bias) v. The state is every key and value so far.

    Args:
        dropout: of the weights, in training; `generator` draws it, by default torch's global one.
    """

    takes_bias = True

    def __init__(
        self,
        *,
        causal: bool,
        dropout: float = 0.0,
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(causal=causal)
        self.dropout, self.scale, self.generator = dropout, scale, generator

    @abstractmethod
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Keep | None, bias: Bias | None, dropout: float
    ) -> Tensor:
        """The outputs, of every key and value so far; those that may not be seen are 0."""

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: pattern.History | None = None,
        *,
        keep: Keep | None = None,
        bias: Bias | None = None,
    ) -> tuple[Outputs, pattern.History | None]:
        k, v, keep, state = tiles.carry(k, v, state, keep, causal=self.causal)
        return self.attend(q, k, v, keep, bias, self.dropout if self.training else 0.0), state
