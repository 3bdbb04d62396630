"""kNN-LM (Khandelwal et al., 2020)."""

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn.retrieval import Base, Found, Logits, Reader, by_value, interpolate
from longspan.registry import mechanism


@mechanism(
    Card(
        id="knn-lm",
        name="kNN-LM",
        kind="retrieval",
        family="retrieval",
        paper="Generalization through Memorization: Nearest Neighbor Language Models",
        cite="Khandelwal et al., ICLR 2020",
        link="https://arxiv.org/abs/1911.00172",
        what="Mixes a trained model's next-token distribution with that of the tokens which "
        "followed the most similar contexts of a datastore.",
        modes={"causal", "step"},
        time="L*S*D",
        memory="S*D",
        tiny={"share": 0.4, "temperature": 2.0},
        exact={"share": 0.0},
    )
)
class KNNLM(Reader):
    """Neighbours vote for the token that followed them (Eqs. 1 and 2), with d = −score = ‖k − q‖².

        p_kNN(y) ∝ Σ_{i: v_i = y} exp(−d_i / T)
        p(y)     = λ p_kNN(y) + (1 − λ) p_LM(y)

    Keys and queries are the inputs of the last feed-forward layer (Sec. 4); the datastore is
    `longspan.retrieval.Datastore`, which also says what was found.

    Args:
        share: λ, 0.25 in domain and up to 0.65 out of it. temperature: T.
        neighbours: k, of those found; by default all.

    Raises:
        LongspanError: a share outside of 0 … 1, a temperature that is not positive, k below 0.
    """

    def __init__(
        self, *, share: float = 0.25, temperature: float = 1.0, neighbours: int | None = None
    ) -> None:
        super().__init__()
        if not 0 <= share <= 1 or temperature <= 0 or (neighbours or 0) < 0:
            raise LongspanError(
                f"knn-lm got share={share}, temperature={temperature}, neighbours={neighbours}: "
                "expected a share of 0 to 1, a positive temperature, and 0 or more neighbours."
            )
        self.share, self.temperature, self.neighbours = share, temperature, neighbours

    def forward(self, base: Base, found: Found) -> Logits:
        scores, values = found.nearest(self.neighbours)
        votes = by_value(scores / self.temperature, values, base.logits.shape[-1])
        return interpolate(base.logits, votes, self.share)
