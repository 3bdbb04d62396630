"""LSH attention without the paper's view of the future."""

import math
from collections.abc import Sequence

from longspan.card import Card
from longspan.engines import bucket
from longspan.errors import LongspanError
from longspan.nn.hashed import HashedAttention
from longspan.registry import mechanism


@mechanism(
    Card(
        id="reformer-lsh-causal",
        name="Strictly causal LSH attention",
        kind="attention",
        family="sparse-content",
        paper="Reformer: The Efficient Transformer",
        cite="Kitaev et al., ICLR 2020; strict form: longspan",
        link="https://arxiv.org/abs/2001.04451",
        what="LSH attention in which each query sees the previous entries of its own bucket, so "
        "that no later token changes whom it meets.",
        modes={"causal", "step"},
        time="L*C*D + L*C*V",
        memory="S*D + S*V",
        tiny={"window": 8, "buckets": 4, "rounds": 2},
    )
)
class ReformerLSHCausal(HashedAttention):
    """Each query sees itself and the previous `window` tokens of its bucket, in every round.

    Hash, shared unit keys, self score −1e5 and the joining of rounds are those of reformer-lsh.
    Whom a query meets depends on earlier tokens alone, so whole, chunked and step by step agree.
    A pair that meets in several rounds counts as often, unless `unique`. The state is every key,
    value and bucket.

    Args:
        window: entries of its bucket that a query looks back on.
        buckets: even, or even factors; 2·length / window is a good number.
        rounds: hashes; may be changed on the built module.
        seed: of the directions, drawn per head and round. redraw: draws anew at each training
            call, from torch's global generator.

    Raises:
        LongspanError: a causal=False, sizes below 1, odd buckets, keys that are not the queries.
    """

    name = "reformer-lsh-causal"
    one_form = (True, "build reformer-lsh instead")

    def __init__(
        self,
        *,
        causal: bool = True,
        window: int = 64,
        buckets: int | Sequence[int] = 64,
        rounds: int = 4,
        unique: bool = False,
        seed: int = 0,
        redraw: bool = False,
    ) -> None:
        if window < 1 or rounds < 1:
            raise LongspanError(
                f"reformer-lsh-causal got window={window}, rounds={rounds}: expected 1 or more."
            )
        super().__init__(
            causal=causal, buckets=buckets, rounds=rounds, unique=unique, seed=seed, redraw=redraw
        )
        self.window = window
        # Buckets start at multiples of a block: short ones waste less, long ones compute better.
        self.block = min(16, max(4, 1 << max(window.bit_length() - 2, 0)))

    def layout(self, table: bucket.Hashed) -> bucket.Sorted:
        count = math.prod(self.factors) + 1  # and one for padding
        order = bucket.aligned_order(table.buckets, count, self.block)
        return self.sorted(table, order, before=self.window, sliding=True)

    def reach(self) -> dict[str, int]:
        return {"before": self.window}
