"""SRU++ (Lei, 2021)."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import dense, elementwise, segment
from longspan.errors import LongspanError
from longspan.nn import Mixer, blockwise
from longspan.registry import mechanism
from longspan.shapes import Context, Inputs, Keep, Marks


class Recurrence(nn.Module):
    """SRU: c_t = f_t c_{t−1} + (1 − f_t) U^c_t,  h_t = r_t c_t + (1 − r_t) s_t.

    f_t = σ(U^f_t + v_f c_{t−1} + b_f), r_t likewise; s is what is passed by. With v 0 throughout
    (`linear`) c runs in parallel.

    Args:
        dropout: of c, one mask for all of time.
    """

    def __init__(self, width: int, *, linear: bool, dropout: float, highway: float) -> None:
        super().__init__()
        self.forget_weight = self.reset_weight = None
        if not linear:
            self.forget_weight = nn.Parameter(torch.empty(width).uniform_(-1, 1))
            self.reset_weight = nn.Parameter(torch.empty(width).uniform_(-1, 1))
        self.forget_bias = nn.Parameter(torch.zeros(width))
        self.reset_bias = nn.Parameter(torch.full((width,), highway))
        self.dropout = dropout

    def forward(
        self,
        u: tuple[Tensor, Tensor, Tensor],
        passed: Inputs,
        start: Float[Tensor, "B E"],
        keep: Keep,
    ) -> tuple[Inputs, Float[Tensor, "B E"]]:
        """(h, the last c); `u` holds candidates, forget and reset gates before their σ."""
        candidate, forget, reset = u
        forget = (forget + self.forget_bias).masked_fill(~keep[..., None], torch.inf)
        c = elementwise.gated(candidate, forget, self.forget_weight, start)
        before = torch.cat([start[:, None].to(c), c], 1)
        reset = reset + self.reset_bias
        if self.reset_weight is not None:
            reset = reset + self.reset_weight * before[:, :-1]
        r = reset.sigmoid()
        mask = F.dropout(torch.ones_like(c[:, :1]), self.dropout, self.training)
        return r * (c * mask) + (1 - r) * passed, before[:, -1]


class Carried(NamedTuple):
    """The last c, and Q of the last tokens."""

    c: Float[Tensor, "B E"]
    queue: segment.Queue


@mechanism(
    Card(
        id="sru-plus-plus",
        name="SRU++",
        kind="mixer",
        family="recurrent-memory",
        paper="When Attention Meets Fast Recurrence: Training Language Models with Reduced Compute",
        cite="Lei, EMNLP 2021",
        link="https://arxiv.org/abs/2102.12459",
        what="An element-wise recurrence whose inputs are made by attention in a small width.",
        modes={"bidirectional", "causal", "step"},
        time="L*S*E + L*E*E",
        memory="S*E",
        tiny={"width": 24, "heads": 3, "inner": 12, "memory": 4096, "alpha": 0.5},
    )
)
class SruPlusPlus(Mixer):
    """U = LN(Q + α Attention(Q, Q W_k, Q W_v)) W_o with Q = x W_q, into an SRU (Sec. 3).

    Bidirectional: two recurrences of half the width, one backward in time, sharing the attention.
    The state is c and the detached Q of the last tokens.

    Args:
        inner: d', by default E / 4. heads: of attention within it.
        attends: False leaves attention out, U = LN(x W_q) W_o.
        memory: M, how many earlier tokens attention sees beside those of the call; None for all.
        alpha: what α starts from; 0 starts as an SRU.
        linear: v = 0: the recurrence is linear, and runs in parallel.
        order: a norm `pre` or `post` the layer, or `none`.
        dropout: of c. highway: b_r at first.

    Raises:
        LongspanError: widths that do not divide, or a negative memory.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int = 1,
        causal: bool = False,
        inner: int | None = None,
        attends: bool = True,
        memory: int | None = None,
        alpha: float = 0.0,
        linear: bool = False,
        order: Literal["pre", "post", "none"] = "none",
        dropout: float = 0.0,
        highway: float = -2.0,
    ) -> None:
        super().__init__()
        inner = inner or max(width // 4 // heads, 1) * heads
        if inner % heads or (not causal and width % 2) or (memory or 0) < 0:
            raise LongspanError(
                f"sru-plus-plus got inner={inner}, heads={heads}, width={width}, memory={memory}: "
                "expected an inner width that heads divide, an even width where bidirectional, "
                "and a memory of 0 or more."
            )
        self.width, self.heads, self.causal, self.memory = width, heads, causal, memory
        self.order, self.hidden = order, width if causal else width // 2
        self.q = nn.Linear(width, inner, bias=False)
        self.k = self.v = self.alpha = None
        if attends:
            self.k, self.v = (nn.Linear(inner, inner, bias=False) for _ in range(2))
            self.alpha = nn.Parameter(torch.tensor(alpha))
        self.inner_norm = nn.LayerNorm(inner)
        # Where c is narrower than x, a fourth part of U is passed by in its place.
        parts = 3 if causal else 8
        self.output = nn.Linear(inner, parts * self.hidden, bias=False)
        for linear_map in (m for m in (self.q, self.k, self.v, self.output) if m is not None):
            nn.init.xavier_uniform_(linear_map.weight)
        self.norm = nn.Identity() if order == "none" else nn.LayerNorm(width)
        self.recurrences = nn.ModuleList(
            Recurrence(self.hidden, linear=linear, dropout=dropout, highway=highway)
            for _ in range(1 if causal else 2)
        )

    def forward(
        self,
        x: Inputs,
        state: Carried | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, Carried | None]:
        mask = keep
        x, keep = blockwise.alone(self, x, keep, context, marks)
        given = self.norm(x) if self.order == "pre" else x
        q = self.q(given)
        queue = segment.empty(q) if state is None else state.queue
        seen = None if mask is None and state is None else torch.cat([queue.keep, keep], 1)
        u = self.output(self.inner_norm(self._attended(q, queue, seen)))
        start = u.new_zeros(len(u), self.hidden) if state is None else state.c
        if self.causal:
            y, c = self.recurrences[0](u.chunk(3, -1), given, start, keep)
        else:
            ahead, back = (part.chunk(4, -1) for part in u.chunk(2, -1))
            first, c = self.recurrences[0](ahead[:3], ahead[3], start, keep)
            turned = [part.flip(1) for part in back]
            second, _ = self.recurrences[1](tuple(turned[:3]), turned[3], start, keep.flip(1))
            y = torch.cat([first, second.flip(1)], -1)
        y = self.norm(y) if self.order == "post" else y
        y = y.masked_fill(~keep[..., None], 0)
        if not self.causal:
            return y, None
        limit = self.memory if self.memory is not None else queue.items.shape[1] + x.shape[1]
        capacity = 0 if self.alpha is None else limit
        return y, Carried(c, segment.push(queue, q, keep, capacity=capacity))

    def _attended(
        self, q: Float[Tensor, "B L _"], queue: segment.Queue, seen: Keep | None
    ) -> Float[Tensor, "B L _"]:
        if self.k is None or self.v is None or self.alpha is None:
            return q
        whole = torch.cat([queue.items, q], 1)
        # Keys and values are made of Q, not of x.
        parts = (
            rearrange(t, "B L (H D) -> B H L D", H=self.heads)
            for t in (q, self.k(whole), self.v(whole))
        )
        o = dense.attend(*parts, causal=self.causal, keep=seen)
        return q + self.alpha * rearrange(o, "B H L D -> B L (H D)")
