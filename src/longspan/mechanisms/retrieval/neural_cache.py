"""Continuous neural cache (Grave et al., 2016)."""

import torch

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn.retrieval import Base, Found, Logits, Reader, by_value, interpolate
from longspan.registry import mechanism


@mechanism(
    Card(
        id="neural-cache",
        name="Continuous neural cache",
        kind="inference",
        family="retrieval",
        paper="Improving Neural Language Models with a Continuous Cache",
        cite="Grave et al., ICLR 2017",
        link="https://arxiv.org/abs/1612.04426",
        what="Raises the probability of the words that followed similar states among the last few "
        "thousand.",
        modes={"causal", "step"},
        time="L*M*E",
        memory="M*E",
        tiny={"sharpness": 0.3, "share": 0.4},
        exact={"sharpness": 0.3, "share": 0.0},
    )
)
class NeuralCache(Reader):
    """The last M pairs (h_i, x_{i+1}) vote by θ h_t·h_i, joined in one of two ways (Sec. 3).

        p_cache(w) ∝ Σ_i 1[w = x_{i+1}] exp(θ h_t·h_i)
        linear:  p(w) = (1 − λ) p_vocab(w) + λ p_cache(w)
        global:  p(w) ∝ exp(h_t·o_w) + Σ_i 1[w = x_{i+1}] exp(θ h_t·h_i + α)

    h is what enters the output matrix, after the final norm; `nn.retrieval.recall` keeps the ring
    of M and scores it. θ must be tuned anew for every model: the norms of h differ.

    Args:
        sharpness: θ. share: λ. offset: α, in place of λ; −∞ is the model alone.

    Raises:
        LongspanError: not exactly one of share and offset; a share outside of 0 … 1.
    """

    def __init__(
        self, *, sharpness: float, share: float | None = None, offset: float | None = None
    ) -> None:
        super().__init__()
        if (share is None) == (offset is None) or not 0 <= (share or 0) <= 1:
            raise LongspanError(
                f"neural-cache got share={share}, offset={offset}: give a share of 0 to 1 for "
                "linear interpolation, or an offset for global normalisation."
            )
        self.sharpness, self.share, self.offset = sharpness, share, offset

    def forward(self, base: Base, found: Found) -> Logits:
        size = base.logits.shape[-1]
        votes = by_value(self.sharpness * found.scores + (self.offset or 0), found.values, size)
        if self.share is not None:
            return interpolate(base.logits, votes, self.share)
        return torch.logaddexp(base.logits.to(votes.dtype), votes).log_softmax(-1)
