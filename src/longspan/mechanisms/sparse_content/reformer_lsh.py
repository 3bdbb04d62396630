"""LSH attention (Reformer; Kitaev et al., 2020)."""

from collections.abc import Sequence

from longspan.card import Card
from longspan.engines import bucket
from longspan.errors import LongspanError
from longspan.nn.hashed import HashedAttention
from longspan.registry import mechanism


@mechanism(
    Card(
        id="reformer-lsh",
        name="LSH attention (Reformer)",
        kind="attention",
        family="sparse-content",
        paper="Reformer: The Efficient Transformer",
        cite="Kitaev et al., ICLR 2020",
        link="https://arxiv.org/abs/2001.04451",
        what="Hashes queries so that similar ones fall together, sorts by hash, and attends within "
        "chunks of the sorted list.",
        modes={"bidirectional", "causal", "step"},
        time="L*C*D + L*C*V",
        memory="S*D + S*V",
        causality="selection",
        tiny={"chunk": 8, "buckets": 4, "rounds": 2},
        skips={
            "no_peeking": "chunk borders lie where later tokens push them (Sec. 2); "
            "reformer-lsh-causal does not peek",
            "streaming_equals_whole": "a step cannot know the chunk borders that later tokens set; "
            "it meets all cached tokens of its buckets",
        },
    )
)
class ReformerLSH(HashedAttention):
    """Attention within chunks of tokens sorted by hash, in the paper's chunked form (Sec. 2).

    Queries and keys are shared, k_j = q_j / ‖q_j‖, and nothing else scales the scores. With the
    hash h(x) = argmax [xR ; −xR] of every round, tokens are sorted by (bucket, position) and cut in
    chunks; chunk c attends to the chunks c − before … c + after under

        o_i = Σ_r exp(z_i^r − logsumexp_r z_i^r) o_i^r                       (Eq. 6, App. A)

    with −1e5 where i meets itself. Later tokens move the chunk borders, so even the causal form
    sees the future through whom it selects. A step meets the cached tokens of its buckets and the
    last chunk. The state is every key, value and bucket.

    Args:
        chunk: m, tokens a chunk; the paper takes 2·length / buckets.
        buckets: b, even; or its even factors, each hashed apart (Sec. 4, many buckets).
        rounds: hashes; may be changed on the built module, at evaluation too.
        before, after: chunks looked at on either side; by default 1 and, causally, 0, else 1.
        same: only keys of the same bucket. unique: a pair that meets in several rounds counts once.
        seed: of the directions, drawn per head and round. redraw: draws anew at each training
            call, from torch's global generator.

    Raises:
        LongspanError: sizes below 1, odd buckets, keys that are not the queries.
    """

    name = "reformer-lsh"

    def __init__(
        self,
        *,
        causal: bool = False,
        chunk: int = 64,
        buckets: int | Sequence[int] = 64,
        rounds: int = 4,
        before: int = 1,
        after: int | None = None,
        same: bool = False,
        unique: bool = False,
        seed: int = 0,
        redraw: bool = False,
    ) -> None:
        after = (0 if causal else 1) if after is None else after
        if chunk < 1 or rounds < 1 or before < 0 or after < 0:
            raise LongspanError(
                f"reformer-lsh got chunk={chunk}, rounds={rounds}, before={before}, after={after}: "
                "chunk and rounds must be at least 1, before and after at least 0."
            )
        super().__init__(
            causal=causal, buckets=buckets, rounds=rounds, unique=unique, seed=seed, redraw=redraw
        )
        self.chunk, self.before, self.after, self.same = chunk, before, after, same

    def layout(self, table: bucket.Hashed) -> bucket.Sorted:
        order = bucket.packed_order(table.buckets, table.keep, self.chunk)
        before, after = self.before * self.chunk, self.after * self.chunk
        return self.sorted(table, order, before=before, after=after, same=self.same)

    def reach(self) -> dict[str, int]:
        return {"recent": self.chunk}
