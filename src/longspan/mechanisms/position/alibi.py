"""ALiBi, attention with linear biases (Press et al., 2022)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn import Position
from longspan.nn.positions import at_least_float32
from longspan.registry import mechanism
from longspan.shapes import Keys, Queries


@mechanism(
    Card(
        id="alibi",
        name="ALiBi (attention with linear biases)",
        kind="position",
        family="position",
        paper="Train Short, Test Long: Attention with Linear Biases Enables Input Length "
        "Extrapolation",
        cite="Press et al., ICLR 2022",
        link="https://arxiv.org/abs/2108.12409",
        what="Lowers each score in proportion to the distance, with one slope per head.",
        modes={"bidirectional", "causal", "step"},
        time="L*S",
        memory="L*S",
        tiny={"heads": 3},
        exact={"heads": 3, "slopes": (0.0, 0.0, 0.0)},
    )
)
class ALiBi(Position):
    """bias_ij = −m_h |i − j|, which under a causal mask is the paper's −m_h (i − j) (Sec. 3).

    Args:
        heads: H. learnable: m and m' are parameters.
        form: `symmetric` as above; `causal`: −m_h (i − j), and −∞ for keys after the query;
            `asymmetric`: −m_h (i − j) for the past and −m'_h (j − i) for the future.
        slopes: m, by default `published(heads)`.
        future: m' of the asymmetric form, by default m reversed: the first author's proposal in
            issue 5 of the repository; the paper is causal only.

    Raises:
        LongspanError: an unknown form, slopes that are not one per head, `future` in another form.
    """

    acts = frozenset({"bias"})

    def __init__(
        self,
        *,
        heads: int,
        form: Literal["causal", "symmetric", "asymmetric"] = "symmetric",
        slopes: Sequence[float] | None = None,
        future: Sequence[float] | None = None,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        if form not in ("causal", "symmetric", "asymmetric"):
            raise LongspanError(f"no form '{form}'; expected causal, symmetric or asymmetric.")
        if future is not None and form != "asymmetric":
            raise LongspanError(f"the {form} form has one slope a head: use form='asymmetric'.")
        past = tuple(published(heads) if slopes is None else slopes)
        ahead = past[::-1] if future is None else tuple(future)
        if len(past) != heads or len(ahead) != heads:
            raise LongspanError(
                f"alibi got {len(past)} slopes, {len(ahead)} ahead: expected {heads}, one per head."
            )
        self.form = form
        # Floats, not buffers: `model.to(torch.bfloat16)` would round the slopes.
        self.past = nn.Parameter(torch.tensor(past)) if learnable else past
        learns = learnable and form == "asymmetric"
        self.future = nn.Parameter(torch.tensor(ahead)) if learns else ahead

    def bias(
        self, q: Queries, k: Keys, pos_q: Int[Tensor, "L"], pos_k: Int[Tensor, "S"]
    ) -> Float[Tensor, "1 H L S"]:
        wide, distance = at_least_float32(q), pos_q[:, None] - pos_k  # L S
        of = self.past, self.future if self.form == "asymmetric" else self.past
        past, future = (torch.as_tensor(m, dtype=wide, device=q.device)[:, None, None] for m in of)
        bias = -(past * distance.clamp(min=0) + future * (-distance).clamp(min=0))[None]
        return bias.masked_fill(distance < 0, -math.inf) if self.form == "causal" else bias


def published(heads: int) -> list[float]:
    """2^(−8n/H), n = 1 … H, for a power of two; else those of the power below, then every other
    one of the power above (Sec. 3, footnote, and the official code).

    >>> published(8)[0]
    0.5
    """
    below = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * n / below) for n in range(1, below + 1)]
    return slopes + [2 ** (-4 * n / below) for n in range(1, 2 * (heads - below), 2)]
