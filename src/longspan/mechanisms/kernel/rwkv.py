"""RWKV-4's time mixing (Peng et al., 2023)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import average
from longspan.nn import Mixer
from longspan.registry import mechanism
from longspan.shapes import Context, Inputs, Keep, Marks


class RwkvState(NamedTuple):
    """The last input, and the sums over all tokens, one head as wide as the model."""

    last: Float[Tensor, "B E"]
    sums: average.Sums


@mechanism(
    Card(
        id="rwkv",
        name="RWKV-4",
        kind="mixer",
        family="kernel",
        paper="RWKV: Reinventing RNNs for the Transformer Era",
        cite="Peng et al., 2023",
        link="https://arxiv.org/abs/2305.13048",
        what="Every channel averages its values, older ones fading at a learned rate, the present "
        "one with a bonus.",
        modes={"causal", "step"},
        time="L*E*E",
        memory="E",
        tiny={"width": 24},
    )
)
class Rwkv(Mixer):
    """y = W_o (σ(W_r z^r) ∘ wkv), where z^μ_t = μ ∘ x_t + (1 − μ) ∘ x_{t−1} (Eqs. 11 to 13, 17),

        wkv_t = (Σ_{i<t} e^{−(t−1−i)w + k_i} v_i + e^{u + k_t} v_t)
                / (Σ_{i<t} e^{−(t−1−i)w + k_i} + e^{u + k_t})                         (Eq. 16)

    with k = W_k z^k, v = W_v z^v and w = exp(log_decay). A masked token is an input of 0 that is no
    key, and time passes. The state is the last input and the sums with their peak.

    Args:
        layer, layers: l of N, from which the decays and μ are initialised (App. E).

    Raises:
        LongspanError: a context or marks.
    """

    def __init__(self, *, width: int, layer: int = 0, layers: int = 1) -> None:
        super().__init__()
        self.causal = True
        place = torch.arange(width) / width
        depth, rest = layer / max(layers - 1, 1), 1 - layer / layers
        spread = torch.arange(width) / max(width - 1, 1)
        self.log_decay = nn.Parameter(-5 + 8 * spread ** (0.7 + 1.3 * depth))
        zigzag = (torch.arange(width) + 1) % 3 - 1
        self.bonus = nn.Parameter(0.5 * zigzag + torch.tensor(0.3).log())
        self.mix = nn.ParameterDict(
            {"r": place ** (rest / 2), "k": place**rest, "v": place**rest + 0.3 * depth}
        )
        self.project = nn.ModuleDict({n: nn.Linear(width, width, bias=False) for n in "rkv"})
        self.output = nn.Linear(width, width, bias=False)
        for weight in (*self.project.parameters(), self.output.weight):
            nn.init.orthogonal_(weight)

    def forward(
        self,
        x: Inputs,
        state: RwkvState | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, RwkvState]:
        average.refuse_others("rwkv", context, marks)
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
        shifted, last = average.shifted(x, None if state is None else state.last)
        r, k, v = (self.project[n](torch.lerp(shifted, x, self.mix[n])) for n in "rkv")
        if keep is not None:
            k = k.masked_fill(~keep[..., None], -torch.inf)
        wide = torch.promote_types(x.dtype, torch.float32)
        wkv, sums = average.running(
            k[:, None],
            v[:, None],
            None if state is None else state.sums,
            decay=self.log_decay.to(wide).exp()[None],
            bonus=self.bonus[None],
        )
        y = self.output(torch.sigmoid(r) * wkv[:, 0])
        y = y if keep is None else y.masked_fill(~keep[..., None], 0)
        return y, RwkvState(last, sums)
