"""What attention of the queries whose scores stand out is built with."""

from typing import ClassVar

import torch

from longspan.errors import LongspanError
from longspan.nn.protocols import Attention


class SpikingAttention(Attention):
    """Full attention for queries that a measure on sampled keys picks, a sum for the rest.

    Args:
        factor: c in the budget c · ⌈ln n⌉ of n tokens (`engines.bucket.budget`).
        shared: one sample of keys for all queries. exact: the measure is over all keys.
        mean: causally, the rest average past values. seed: of the samples in evaluation.

    Raises:
        LongspanError: a factor below 0.

    Attributes:
        name: what errors call it.
    """

    name: ClassVar[str]

    def __init__(
        self,
        *,
        causal: bool = False,
        factor: int = 5,
        shared: bool = False,
        exact: bool = False,
        mean: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(causal=causal)
        if factor < 0:
            raise LongspanError(f"{self.name} got factor={factor}: expected 0 or more.")
        self.factor, self.seed = factor, seed
        self.sample_once, self.exact, self.mean = shared, exact, mean

    def generator(self) -> torch.Generator | None:
        """Of the samples: torch's own in training, else one of the seed."""
        return None if self.training else torch.Generator().manual_seed(self.seed)
