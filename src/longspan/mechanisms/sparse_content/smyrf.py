"""SMYRF (Daras et al., 2020)."""

import torch

from longspan.card import Card
from longspan.engines import bucket, dense
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


@mechanism(
    Card(
        id="smyrf",
        name="SMYRF",
        kind="attention",
        family="sparse-content",
        paper="SMYRF: Efficient Attention using Asymmetric Clustering",
        cite="Daras et al., NeurIPS 2020",
        link="https://arxiv.org/abs/2010.05315",
        what="Hashes queries and keys so that pairs of large inner product fall together, sorts "
        "both and cuts them into equal clusters that attend within.",
        modes={"bidirectional", "cross"},
        time="L*C*D + L*C*V",
        memory="C",
        tiny={"cluster": 16, "rounds": 2},
        exact={"cluster": 1000000, "rounds": 1},
    )
)
class Smyrf(Attention):
    """Attention within balanced clusters of an asymmetric hash, over several rounds (Sec. 3).

    With M_Q, M_K the largest norms of a head's queries and keys,

        F(q) = [q ; 0 ; √(M_Q² + M_K² − ‖q‖²)],  G(k) = [k ; √(M_Q² + M_K² − ‖k‖²) ; 0]   (Eq. 4)

    lie at ‖F(q) − G(k)‖² = 2 (M_Q² + M_K² − q·k). In each round both are sorted by a·x + b, with a
    random direction a, and the C-th parts of the two lists form clusters; the rounds' outputs are
    joined by their logsumexps, so that a pair that meets twice counts twice. It has no parameters:
    put it in the place of a trained attention. Scores are scaled by D^(−1/2); the released code's
    are not.

    Where there are as many queries as keys, masked ones are clustered as absent and give 0.

    Args:
        cluster: queries a cluster; keys are cut into as many clusters.
        rounds: hashes; may be changed on the built module.
        transform: "xbox+" as above; "xbox" (Bachrach et al., 2014), whose queries are only scaled;
            "l2lsh" (Shrivastava & Li, 2014), with three powers of the norm beside each key.
        seed: of the hashes. redraw: draws anew at each training call from torch's generator.

    Raises:
        LongspanError: sizes below 1, an unknown transform.
    """

    one_form = (False, "use reformer-lsh-causal")

    def __init__(
        self,
        *,
        causal: bool = False,
        cluster: int = 64,
        rounds: int = 4,
        transform: str = "xbox+",
        seed: int = 0,
        redraw: bool = False,
    ) -> None:
        super().__init__(causal=causal)
        if cluster < 1 or rounds < 1 or transform not in ("xbox+", "xbox", "l2lsh"):
            raise LongspanError(
                f"smyrf got cluster={cluster}, rounds={rounds}, transform='{transform}': expected "
                "at least 1, and xbox+, xbox or l2lsh."
            )
        self.cluster, self.rounds, self.transform = cluster, rounds, transform
        self.seed, self.redraw = seed, redraw

    def forward(
        self, q: Queries, k: Keys, v: Values, state: None = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, None]:
        if keep is not None:
            k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
        layouts = [bucket.Cells(a, b) for a, b in self.clusters(q, k, keep=keep)]
        return dense.union(q, [(layout, k, v) for layout in layouts])[0], None

    @torch.no_grad()
    def clusters(
        self, q: Queries, k: Keys, *, keep: Keep | None = None
    ) -> list[tuple[bucket.Index, bucket.Index]]:
        """Whom each cluster of each round holds: queries B H C a and keys B H C b, L or S: none."""
        generator = None
        if not (self.redraw and self.training):
            generator = torch.Generator().manual_seed(self.seed)
        # The hash's offset b moves both lists alike.
        sizes = {"size": self.cluster, "rounds": self.rounds}
        return bucket.clusters(q, k, keep, generator, **sizes, transform=self.transform)
