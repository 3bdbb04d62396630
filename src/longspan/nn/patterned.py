"""Attention under a fixed pattern: what a paper's sparsity needs beside its value."""

from typing import Literal

from longspan.engines import pattern
from longspan.errors import LongspanError
from longspan.nn.protocols import Attention
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


def factorised(
    near: list[pattern.Pattern],
    far: list[pattern.Pattern],
    both: list[pattern.Pattern],
    *,
    use: Literal["merged", "heads", "interleaved"],
    layer: int,
    heads: int,
) -> pattern.PerHead:
    """What a layer's heads see of two sets: `both`, by parity of the head, or of the `layer`.

    Head h takes the pattern h mod their number of a list; by parity, of the first `heads` heads
    the even ones see the first of `near`, the odd ones those of `far`.
    """
    if use == "merged":
        return pattern.per_head(both)
    if use == "interleaved":
        return pattern.per_head(far if layer % 2 else near)
    return pattern.per_head([far[h % len(far)] if h % 2 else near[0] for h in range(heads)])


class PatternAttention(Attention):
    """softmax(q kᵀ / √D) v over the keys that a pattern shows.

    Positions count kept tokens. The state holds the keys and values that later queries may see.

    Args:
        sees: the pattern; causal where `causal` is.
        block: queries and keys of one block where blocks are gathered.
        reach: causally, no query sees a key that far behind it; None where any may be seen.
        period: the pattern is the same when all positions move by so many.

    Raises:
        LongspanError: other than as many keys as queries in the bidirectional form.
    """

    def __init__(
        self,
        sees: pattern.Pattern | pattern.PerHead,
        *,
        causal: bool = False,
        block: int | tuple[int, int] = 64,
        reach: int | None = None,
        period: int = 1,
    ) -> None:
        super().__init__(causal=causal)
        self.sees = sees
        self.block = (block, block) if isinstance(block, int) else block
        self.reach, self.period = reach, period

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: pattern.History | None = None,
        *,
        keep: Keep | None = None,
    ) -> tuple[Outputs, pattern.History | None]:
        if self.causal:
            return pattern.stream(
                q,
                k,
                v,
                self.sees,
                state,
                keep=keep,
                block=self.block,
                reach=self.reach,
                period=self.period,
            )
        if q.shape[2] != k.shape[2]:
            raise LongspanError(
                f"{type(self).__name__} attends within one sequence and got {q.shape[2]} queries "
                f"for {k.shape[2]} keys: it has no cross form."
            )
        return pattern.attend(q, k, v, self.sees, keep=keep, block=self.block), None
