"""Lightweight and dynamic convolutions (Wu et al., 2019)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import conv
from longspan.errors import LongspanError
from longspan.nn.short import Last, around, normalised
from longspan.nn.within import Within
from longspan.registry import mechanism
from longspan.shapes import Inputs, Keep


@mechanism(
    Card(
        id="lightweight-dynamic-conv",
        name="Lightweight and Dynamic Convolutions",
        kind="mixer",
        family="convolution",
        paper="Pay Less Attention with Lightweight and Dynamic Convolutions",
        cite="Wu et al., ICLR 2019",
        link="https://arxiv.org/abs/1901.10430",
        what="Each head averages a few neighbours by weights that depend on the token alone.",
        modes={"bidirectional", "causal", "step"},
        time="L*E*E + L*E*C",
        memory="E*C",
        tiny={"width": 24, "heads": 3, "window": 7},
    )
)
class LightweightDynamicConv(Within):
    """y = W_o conv(u), u = GLU(W_i x), with K taps per head, normalised (Sec. 3 and 4):

        conv(u)_ic = Σ_j softmax_j(W_h) u_{i + j − ⌈(K+1)/2⌉, c}                     (light)

    and W_h = W_h^Q u_i from the convolution's own input (dynamic). Heads own adjacent channels.
    Centred, an even K reaches one further left. A masked token is an input of 0; time passes.

    Args:
        window: K, in the paper 3, 7, 15 and 31 by layer; the state is the last K − 1 inputs.
        normalise: softmax over the taps. renormalise: over those taps only that meet a token;
            otherwise taps beyond the borders keep their share, as in the paper.
        bias: of each channel, learned. drop_connect: dropout on the normalised taps.

    Raises:
        LongspanError: options that do not exist or fit; a context, marks, an unwanted state.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int = 16,
        causal: bool = False,
        form: Literal["light", "dynamic"] = "dynamic",
        window: int = 31,
        normalise: bool = True,
        renormalise: bool = False,
        drop_connect: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if form not in ("light", "dynamic"):
            raise LongspanError(f"no form '{form}'; expected light or dynamic.")
        if width % heads or window < 1:
            raise LongspanError(
                f"got width={width}, heads={heads}, window={window}: heads must divide the width, "
                "and the window hold at least 1 token."
            )
        if renormalise and not normalise:
            raise LongspanError("renormalise=True needs normalise=True: there is no softmax else.")
        self.causal, self.heads, self.window = causal, heads, window
        self.normalise, self.renormalise, self.drop_connect = normalise, renormalise, drop_connect
        self.input, self.output = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.predict = self.taps = None
        if form == "dynamic":
            self.predict = nn.Linear(width, heads * window, bias=False)
            nn.init.xavier_uniform_(self.predict.weight)
        else:
            self.taps = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, window)))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def mix(self, x: Inputs, state: Last | None, keep: Keep | None) -> tuple[Inputs, Last | None]:
        u = F.glu(self.input(x), dim=-1)
        near, seen, state = around(u, keep, state, taps=self.window, causal=self.causal)
        taps = self.taps if self.predict is None else self.predict(u)
        assert taps is not None  # H K, or B L (H K)
        y = conv.short(near, self._weights(taps, seen))
        return self.output(y if self.bias is None else y + self.bias), state

    def _weights(self, taps: Tensor, seen: Tensor) -> Tensor:
        scores = taps if self.predict is None else taps.unflatten(-1, (-1, self.window))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.normalise:
            scores = normalised(scores, seen if self.renormalise else None)
        return F.dropout(scores, self.drop_connect, self.training)
