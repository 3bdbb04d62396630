"""SPALM (Yogatama et al., 2021)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn.retrieval import Base, Found, Logits, Reader
from longspan.registry import mechanism
from longspan.shapes import Inputs


class Read(NamedTuple):
    """z = (1 − g) m + g h, the gate g (1 where nothing was found), and the neighbours' weights."""

    z: Inputs
    gate: Float[Tensor, "B L 1"]
    weights: Float[Tensor, "B L K"]


@mechanism(
    Card(
        id="spalm",
        name="SPALM",
        kind="retrieval",
        family="retrieval",
        paper="Adaptive Semiparametric Language Models",
        cite="Yogatama et al., TACL 2021",
        link="https://arxiv.org/abs/2102.02557",
        what="Joins local context, a short-term memory and the tokens that followed similar "
        "contexts by a learned gate before the output layer.",
        modes={"causal", "step"},
        time="L*S*D",
        memory="S*D",
        tiny={"width": 24},
        exact={"width": 24, "gate": 1.0},
    )
)
class SPALM(Reader):
    """The embeddings y_i of the neighbours' tokens, gated against the hidden state h (Sec. 3.3).

        m = Σ_i softmax_i(y_i·h) y_i,   g = σ(w_gᵀ h),   z = (1 − g) m + g h,   p = softmax(W z)

    y_i are rows of the output embedding W, which is tied to the input's, so W learns through both.
    The search's scores are not used. A position that found nothing has z = h, a case that the
    paper does not meet. `models.spalm` is the whole model, on a Transformer-XL.

    Args:
        gate: a fixed g in place of the learned one; 1 is the backbone alone.

    Raises:
        LongspanError: a gate outside of 0 … 1; a base without hidden states or output embedding.
    """

    def __init__(self, *, width: int, gate: float | None = None) -> None:
        super().__init__()
        if gate is not None and not 0 <= gate <= 1:
            raise LongspanError(f"spalm got gate={gate}: expected 0 to 1, or None to learn it.")
        self.gate = gate
        self.score = nn.Linear(width, 1, bias=False) if gate is None else None

    def read(self, base: Base, found: Found) -> Read:
        """What the output layer is given, and how it came about."""
        hidden, weight = _needed(base)
        empty = found.values < 0
        y = F.embedding(found.values.clamp(min=0).long(), weight)  # B L K E
        none = empty.all(-1, keepdim=True)
        scores = (y @ hidden[..., None])[..., 0].masked_fill(empty & ~none, -math.inf)
        weights = scores.softmax(-1).masked_fill(none, 0)
        m = (weights[..., None, :] @ y)[..., 0, :]
        if self.score is None:
            gate = hidden.new_full((*hidden.shape[:2], 1), float(self.gate or 0))
        else:
            gate = torch.sigmoid(self.score(hidden))
        gate = gate.masked_fill(none, 1)
        return Read((1 - gate) * m + gate * hidden, gate, weights)

    def forward(self, base: Base, found: Found) -> Logits:
        logits = F.linear(self.read(base, found).z, _needed(base)[1])
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _needed(base: Base) -> tuple[Tensor, Tensor]:
    if base.hidden is None or base.weight is None:
        raise LongspanError(
            "spalm reads hidden states through the output embedding: give a Base with both."
        )
    return base.hidden, base.weight
