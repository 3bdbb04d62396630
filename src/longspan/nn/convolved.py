"""Convolved queries and keys around any attention."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from longspan.errors import LongspanError
from longspan.nn.heads import MultiHead
from longspan.nn.protocols import Mixer
from longspan.shapes import Context, Inputs, Keep, Marks


class ConvolvedState(NamedTuple):
    """The heads' own state, and the last taps − 1 inputs."""

    heads: Any
    inputs: Float[Tensor, "B P E"]


class _Last(nn.Module):
    """A projection of the token itself, the last E of what a window holds."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[..., -self.linear.in_features :])


class _Filled(nn.Module):
    """The output with zeros to the width of a window: a MultiHead gives as wide as it takes."""

    def __init__(self, linear: nn.Linear, taps: int) -> None:
        super().__init__()
        self.linear, self.taps = linear, taps

    def forward(self, o: Tensor) -> Tensor:
        return F.pad(self.linear(o), (0, (self.taps - 1) * self.linear.out_features))


class Convolved(Mixer):
    """A MultiHead whose queries and keys are causal convolutions of x (Li et al., 2019, Sec. 4.1):

        q_i = Σ_t W_q,t x_{i − k + 1 + t} + b_q,   k_i likewise,   v_i = W_v x_i + b_v.

    Left padding of k − 1 zeros, stride 1; k = 1 is the MultiHead itself. Masked tokens are inputs
    of 0; time passes.

    Args:
        heads: its projections of queries and keys are replaced by fresh ones.
        taps: k.

    Raises:
        LongspanError: no tap; a context.
    """

    def __init__(self, heads: MultiHead, *, taps: int = 3) -> None:
        super().__init__()
        if taps < 1:
            raise LongspanError(f"a convolution of {taps} taps was asked for: give at least 1.")
        self.heads, self.taps = heads, taps
        origins = {"q": "q", "k": "k", "v": "v", **heads.attention.extra}
        for name, linear in heads.project.items():
            assert isinstance(linear, nn.Linear)
            if origins[name] == "v":
                heads.project[name] = _Last(linear)
            elif taps > 1:
                wide = nn.Linear(taps * heads.width, linear.out_features, linear.bias is not None)
                nn.init.xavier_uniform_(wide.weight)
                if wide.bias is not None:
                    nn.init.zeros_(wide.bias)
                heads.project[name] = wide
        assert isinstance(heads.output, nn.Linear)
        heads.output = _Filled(heads.output, taps)  # pyright: ignore[reportAttributeAccessIssue]

    def forward(
        self,
        x: Inputs,
        state: ConvolvedState | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, ConvolvedState | None]:
        if context is not None:
            raise LongspanError(
                "convolved queries and keys are of one sequence: leave the context out, or use "
                "MultiHead."
            )
        x = x if keep is None else x.masked_fill(~keep[..., None], 0)
        if state is None:
            x = F.pad(x, (0, 0, self.taps - 1, 0))
        else:
            x = torch.cat([state.inputs.to(x.dtype), x], 1)
        windows = x.unfold(1, self.taps, 1).transpose(2, 3).flatten(2)
        y, carried = self.heads(windows, state and state.heads, keep=keep, marks=marks)
        y = y[..., : x.shape[2]]
        if carried is None:
            return y, None
        return y, ConvolvedState(carried, x[:, x.shape[1] - self.taps + 1 :])
