"""HiPPO-RNN (Gu et al., 2020)."""

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import conv
from longspan.errors import LongspanError
from longspan.nn.within import Within
from longspan.registry import mechanism
from longspan.shapes import Inputs, Keep

Measure = Literal["legs", "legt", "lmu", "lagt"]
Method = Literal["euler", "backward", "bilinear", "zoh"]


class HippoState(NamedTuple):
    """h, the coefficients of every channel's history, and the tokens seen."""

    hidden: Float[Tensor, "B E"]
    memory: Float[Tensor, "B F N"]
    seen: Int[Tensor, "B"]


@mechanism(
    Card(
        id="hippo",
        name="HiPPO (LegS, LegT, LagT)",
        kind="memory",
        family="state-space",
        paper="HiPPO: Recurrent Memory with Optimal Polynomial Projections",
        cite="Gu et al., NeurIPS 2020",
        link="https://arxiv.org/abs/2008.07669",
        what="A gated RNN that keeps the best polynomial approximation of its own past.",
        modes={"causal", "step"},
        time="L*E*E + L*E*M",
        memory="E + M",
        tiny={"width": 24, "state": 6, "channels": 2},
    )
)
class Hippo(Within):
    """h_t = (1 − g) h_{t−1} + g tanh(W z), g = σ(G z), z = [h_{t−1}, c_{t−1}, x_t]  (Sec. 3.2)

    with f_t = L_f h_t and c_t = A_t c_{t−1} + B_t f_t: c are the N coefficients of f's history
    under `measure`, A and B fixed. legs takes A/k, B/k at the k-th token (k = 1 first); the others
    a step of 1 over a window of `theta` tokens. y = h. A masked token changes nothing. It is an
    RNN: a loop over tokens. The state is h, c and k.

    Args:
        state: N. channels: F, signals read from h.
        method: of sampling; a number is the generalised bilinear transform's.

    Raises:
        LongspanError: a measure or method that does not exist, sizes below 1, a context or marks.
    """

    causal = True

    def __init__(
        self,
        *,
        width: int,
        state: int = 64,
        channels: int = 1,
        measure: Measure = "legs",
        method: Method | float = "bilinear",
        theta: float = 128.0,
    ) -> None:
        super().__init__()
        for name, value, known in (("measure", measure, Measure), ("method", method, Method)):
            if isinstance(value, str) and value not in get_args(known):
                raise LongspanError(f"no {name} '{value}'; expected {', '.join(get_args(known))}.")
        if min(state, channels) < 1 or theta <= 0:
            raise LongspanError(
                f"hippo got state={state}, channels={channels}, theta={theta}: "
                "all must be positive."
            )
        self.channels, self.size, self.method = channels, state, method
        self.scaled = measure == "legs"
        a, b = conv.measure(measure, state, theta=1.0 if measure == "lagt" else theta)
        if not self.scaled:
            a, b = conv.sample(a, b, 1 / theta if measure == "lagt" else 1.0, method)
        self.system = a, b  # in double: float32 is too coarse to invert large ones
        self.cell = nn.Linear(2 * width + channels * state, 2 * width)
        self.read = nn.Linear(width, channels)

    def mix(
        self, x: Inputs, state: HippoState | None, keep: Keep | None
    ) -> tuple[Inputs, HippoState]:
        wide = torch.promote_types(x.dtype, torch.float32)
        seen = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        h, c, k = state or (
            x.new_zeros(x.shape[0], x.shape[2], dtype=wide),
            x.new_zeros(x.shape[0], self.channels, self.size, dtype=wide),
            x.new_zeros(x.shape[0], dtype=torch.long),
        )
        with torch.autocast(x.device.type, enabled=False):
            return _eager(self, x.to(wide), HippoState(h.to(wide), c.to(wide), k), seen, x.dtype)

    def update(self, c: Tensor, f: Tensor, k: Tensor) -> Tensor:
        """c_t from c_{t−1} (B F N), f (B F) and the token's number k (B)."""
        a, b = (t.to(c) for t in self.system)
        if self.scaled and self.method != "zoh":
            return conv.legs_update(a, b, c, f, k, self.method)
        if self.scaled:
            a, b = conv.sample(a.expand(len(k), -1, -1), b.expand(len(k), -1), 1 / k.to(c), "zoh")
            b = b[:, None]
        return c @ a.mT + f[..., None] * b


def _run(
    module: Hippo, x: Tensor, state: HippoState, seen: Tensor, dtype: torch.dtype
) -> tuple[Tensor, HippoState]:
    """A token at a time."""
    h, c, k = state
    cell, read = ([t.to(x) for t in (m.weight, m.bias)] for m in (module.cell, module.read))
    outs = []
    for token, mask in zip(x.unbind(1), seen.unbind(1), strict=True):
        z = F.linear(torch.cat([h, c.flatten(1), token], -1), *cell)
        new, gate = z.chunk(2, -1)
        ahead = h + gate.sigmoid() * (new.tanh() - h)
        after = module.update(c, F.linear(ahead, *read), k + 1)
        h = torch.where(mask[:, None], ahead, h)
        c = torch.where(mask[:, None, None], after, c)
        k = k + mask
        outs.append(h)
    y = torch.stack(outs, 1) if outs else x
    return y.to(dtype), HippoState(h, c, k)


_eager: Any = torch.compiler.disable(_run)  # which would unroll the loop
