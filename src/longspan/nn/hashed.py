"""Attention whose queries are its keys and meet by their hash."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from longspan.engines import bucket
from longspan.errors import LongspanError
from longspan.nn.protocols import Attention
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

# Self-attention only where nothing else is left.
OWN = -1e5


class HashedAttention(Attention):
    """o_i = Σ_j softmax_j(q_i·k_j) v_j over the keys k_j = q_j / ‖q_j‖ that a layout lets it meet.

    −1e5 is added where i meets itself. The state is every key, value and bucket.

    Args:
        buckets: even; or its even factors, each hashed apart. rounds: hashes.
        unique: a pair that meets in several rounds counts once.
        seed: of the directions, drawn per head and round. redraw: draws anew at each training
            call, from torch's global generator.

    Raises:
        LongspanError: odd buckets; keys that are not the queries; a state where directions are
            drawn anew.

    Attributes:
        name: what errors call it.
    """

    shared = True
    name: ClassVar[str]

    def __init__(
        self,
        *,
        causal: bool,
        buckets: int | Sequence[int],
        rounds: int,
        unique: bool,
        seed: int,
        redraw: bool = False,
    ) -> None:
        super().__init__(causal=causal)
        self.factors, self.rounds = bucket.factor(buckets), rounds
        self.unique, self.seed, self.redraw = unique, seed, redraw

    @abstractmethod
    def layout(self, table: bucket.Hashed) -> bucket.Sorted:
        """Whom each token meets."""

    @abstractmethod
    def reach(self) -> dict[str, int]:
        """What `bucket.step` is told of whom a single token meets."""

    def sorted(
        self,
        table: bucket.Hashed,
        order: bucket.Order,
        *,
        before: int,
        after: int = 0,
        same: bool = True,
        sliding: bool = False,
    ) -> bucket.Sorted:
        """The layout of an order in which tokens meet others than themselves within reach."""
        return bucket.Sorted(
            order,
            table.buckets,
            before=before,
            after=after,
            sliding=sliding,
            causal=self.causal,
            same=same,
            apart=True,
            unique=self.unique,
            keep=table.keep,
        )

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: bucket.Hashed | None = None,
        *,
        keep: Keep | None = None,
    ) -> tuple[Outputs, bucket.Hashed | None]:
        bucket.check_shared(self.name, q, k)
        if state is not None and self.redraw and self.training:
            raise LongspanError(
                f"{self.name} was built with redraw=True and, in training, got a state, whose keys "
                "have been hashed by other directions: give whole sequences, or redraw=False."
            )
        table = bucket.grow(state, q, v, keep, self.directions(q), self.factors)
        if state is not None and q.shape[2] == 1:
            return bucket.step(q, table, own=OWN, unique=self.unique, **self.reach()), table
        o = bucket.attend(q, table, self.layout(table), own=OWN)
        return o, table if self.causal else None

    def directions(self, q: Queries) -> Float[Tensor, "H R D F"]:
        """The hash directions for q's heads and width."""
        generator = None
        if not (self.redraw and self.training):
            generator = torch.Generator().manual_seed(self.seed)
        return bucket.rotations(
            q.shape[1], self.rounds, q.shape[3], self.factors, generator=generator
        )
