"""What attention of the queries whose scores stand out is built with."""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from longspan.errors import LongspanError
from longspan.nn.protocols import Attention


class Running(NamedTuple):
    """Every key, value and measure; the sum of the values; how many queries attended."""

    k: Float[Tensor, "B H S D"]
    v: Float[Tensor, "B H S V"]
    keep: Bool[Tensor, "B S"]
    measures: Float[Tensor, "B H S"]
    total: Float[Tensor, "B H V"]
    awake: Int[Tensor, "B H"]


class SpikingAttention(Attention):
    """Full attention for queries that a measure on sampled keys picks, a sum for the rest.

    Args:
        causal: by default where it has that form alone.
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
        causal: bool | None = None,
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
