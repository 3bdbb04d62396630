"""RWKV-4's channel mixing (Peng et al., 2023), the feed-forward that sees one token back."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import average
from longspan.nn import Mixer
from longspan.registry import mechanism
from longspan.shapes import Context, Inputs, Keep, Marks


@mechanism(
    Card(
        id="rwkv-channel-mix",
        name="RWKV-4 channel mixing",
        kind="mixer",
        family="kernel",
        paper="RWKV: Reinventing RNNs for the Transformer Era",
        cite="Peng et al., 2023",
        link="https://arxiv.org/abs/2305.13048",
        what="A gated feed-forward on a blend of each token with the one before.",
        modes={"causal", "step"},
        time="L*E*E",
        memory="E",
        tiny={"width": 24},
    )
)
class RwkvChannelMix(Mixer):
    """y = σ(W_r z^r) ∘ W_v relu(W_k z^k)², z^μ_t = μ ∘ x_t + (1 − μ) ∘ x_{t−1} (Eqs. 14, 15, 18).

    The state is the last input; a masked token is one of 0.

    Args:
        inner: the hidden width, by default 4 E.
        layer, layers: l of N, from which μ is initialised.

    Raises:
        LongspanError: a context or marks.
    """

    def __init__(
        self, *, width: int, inner: int | None = None, layer: int = 0, layers: int = 1
    ) -> None:
        super().__init__()
        self.causal = True
        inner = inner or 4 * width
        place = (torch.arange(width) / width) ** (1 - layer / layers)
        self.mix = nn.ParameterDict({"r": place, "k": place.clone()})
        sizes = {"r": (width, width), "k": (width, inner), "v": (inner, width)}
        self.project = nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in sizes.items()})
        for weight in self.project.parameters():
            nn.init.orthogonal_(weight)

    def forward(
        self,
        x: Inputs,
        state: Float[Tensor, "B E"] | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, Float[Tensor, "B E"]]:
        average.refuse_others("rwkv-channel-mix", context, marks)
        x = x if keep is None else x.masked_fill(~keep[..., None], 0)
        shifted, last = average.shifted(x, state)
        r, k = (self.project[n](torch.lerp(shifted, x, self.mix[n])) for n in "rk")
        y = torch.sigmoid(r) * self.project["v"](F.relu(k).square())
        return y if keep is None else y.masked_fill(~keep[..., None], 0), last
