"""Lightweight and dynamic convolutions (Wu et al., 2019)."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import conv
from longspan.errors import LongspanError
from longspan.nn import Mixer
from longspan.registry import mechanism
from longspan.shapes import Context, Inputs, Keep, Marks


class ConvState(NamedTuple):
    """The last K − 1 inputs of the convolution, and which of them were tokens."""

    inputs: Float[Tensor, "B P E"]
    seen: Bool[Tensor, "B P"]


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
class LightweightDynamicConv(Mixer):
    """y = W_o conv(u), u = GLU(W_i x), with K taps per head, normalised (Sec. 3 and 4):

        conv(u)_ic = Σ_j softmax_j(W_h) u_{i + j − ⌈(K+1)/2⌉, c}                     (light)

    and W_h = W_h^Q u_i from the convolution's own input (dynamic). Heads own adjacent channels.
    Causally the last tap is the token itself; centred, an even K reaches one further to the left.
    A masked token is an input of 0; time passes. The state is the last K − 1 inputs.

    Args:
        window: K; the paper's layers grow from 3 over 7 and 15 to 31.
        normalise: softmax over the taps.
        renormalise: softmax over those taps only that meet a token; otherwise taps beyond the
            borders keep their share, as in the paper.
        drop_connect: dropout on the normalised taps.
        bias: a learned constant per channel, added to the convolution.

    Raises:
        LongspanError: a form that does not exist, a width that heads do not divide, a window of
            no tap, renormalising what is not normalised, a context, marks, a state where there
            is none to carry.
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

    def forward(
        self,
        x: Inputs,
        state: ConvState | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, ConvState | None]:
        if context is not None or marks is not None:
            raise LongspanError(
                "a convolution mixes one sequence, all of its tokens alike, and got a context or "
                "marks: leave them out, or use an attention (longspan.find(mode='cross'))."
            )
        if state is not None and not self.causal:
            raise LongspanError("got a state, but only the causal form has one: causal=True.")
        seen = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        u = F.glu(self.input(x.masked_fill(~seen[..., None], 0)), dim=-1)
        u = u if keep is None else u.masked_fill(~keep[..., None], 0)
        taps = self.taps if self.predict is None else self.predict(u)
        before = self.window - 1 if self.causal else self.window // 2
        if state is None:
            u, seen = (F.pad(u, (0, 0, before, 0)), F.pad(seen, (before, 0)))
        else:
            u = torch.cat([state.inputs.to(u.dtype), u], 1)
            seen = torch.cat([state.seen, seen], 1)
        if after := self.window - 1 - before:
            u, seen = F.pad(u, (0, 0, 0, after)), F.pad(seen, (0, after))
        assert taps is not None
        y = conv.short(u, self._weights(taps, seen))
        y = self.output(y if self.bias is None else y + self.bias)
        y = y if keep is None else y.masked_fill(~keep[..., None], 0)
        start = x.shape[1]
        return y, ConvState(u[:, start:], seen[:, start:]) if self.causal else None

    def _weights(self, taps: Tensor, seen: Tensor) -> Tensor:
        """H K or B L H K from what was learned or predicted."""
        scores = taps.unflatten(-1, (-1, self.window)) if self.predict is not None else taps
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.renormalise:
            outside = ~seen.unfold(1, self.window, 1)[:, :, None]  # B L 1 K
            least = torch.finfo(scores.dtype).min
            weights = scores.masked_fill(outside, least).softmax(-1).masked_fill(outside, 0)
        else:
            weights = scores.softmax(-1) if self.normalise else scores
        return F.dropout(weights, self.drop_connect, self.training)
