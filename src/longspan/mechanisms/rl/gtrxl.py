"""GTrXL's gates (Parisotto et al., 2019)."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn.residual import Residual, Stream
from longspan.registry import mechanism

Gate = Literal["none", "input", "output", "highway", "sigtanh", "gru"]
# Linear maps of each gate, by the paper's letters.
_MAPS: dict[Gate, tuple[str, ...]] = {
    "none": (),
    "input": ("w",),
    "output": ("w",),
    "highway": ("w",),
    "sigtanh": ("w", "u"),
    "gru": ("w_r", "u_r", "w_z", "u_z", "w_g", "u_g"),
}


@mechanism(
    Card(
        id="gtrxl",
        name="GTrXL gates",
        kind="residual",
        family="rl",
        paper="Stabilizing Transformers for Reinforcement Learning",
        cite="Parisotto et al., ICML 2020",
        link="https://arxiv.org/abs/1910.06764",
        what="Gates what a branch adds to the stream, and starts near letting the stream pass.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*E*E",
        memory="L*E",
        tiny={"width": 24},
        exact={"width": 24, "gate": "none", "relu": False},
    )
)
class GTrXL(Residual):
    """x' = g(x, relu(y)) for a stream x and what a branch gave of LN(x), y (Sec. 3.2):

        input     σ(W x) ∘ x + y                    output    x + σ(W x − b) ∘ y
        highway   σ(W x + b) ∘ x + (1 − σ(W x + b)) ∘ y
        sigtanh   x + σ(W y − b) ∘ tanh(U y)
        gru       (1 − z) ∘ x + z ∘ tanh(W_g y + U_g (r ∘ x)),
                  r = σ(W_r y + U_r x),  z = σ(W_z y + U_z x − b)

    and `none`, x + y (TrXL-I). With `norm_order="pre"` a model has the paper's order; as b grows,
    all but `input` and `none` let x pass alone. `longspan.models.policy` has the paper's agent.

    Args:
        bias: b at the start, learned; the paper's GRU has 2. The input gate has none.
        relu: of y, as in the paper; the first Transformer-XL has none.

    Raises:
        LongspanError: an unknown gate.
    """

    def __init__(
        self, *, width: int, gate: Gate = "gru", bias: float = 2.0, relu: bool = True
    ) -> None:
        super().__init__()
        if gate not in get_args(Gate):
            raise LongspanError(f"no gate '{gate}'; expected {', '.join(get_args(Gate))}.")
        self.gate, self.relu = gate, relu
        self.maps = nn.ModuleDict(
            {letter: nn.Linear(width, width, bias=False) for letter in _MAPS[gate]}
        )
        biased = gate not in ("none", "input")
        self.bias = nn.Parameter(torch.full((width,), bias)) if biased else None

    def combine(self, x: Stream, y: Stream) -> Stream:
        y = F.relu(y) if self.relu else y
        if self.bias is None:
            return (x * self._map("w", x).sigmoid() if self.maps else x) + y
        if self.gate == "output":
            return x + (self._map("w", x) - self.bias).sigmoid() * y
        if self.gate == "highway":
            s = (self._map("w", x) + self.bias).sigmoid()
            return s * x + (1 - s) * y
        if self.gate == "sigtanh":
            return x + (self._map("w", y) - self.bias).sigmoid() * self._map("u", y).tanh()
        r = (self._map("w_r", y) + self._map("u_r", x)).sigmoid()
        z = (self._map("w_z", y) + self._map("u_z", x) - self.bias).sigmoid()
        h = (self._map("w_g", y) + self._map("u_g", r * x)).tanh()
        return (1 - z) * x + z * h

    def _map(self, letter: str, t: Tensor) -> Tensor:
        return self.maps[letter](t)
