"""Feedback Transformer (Fan et al., 2020)."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines.append import Growing
from longspan.errors import LongspanError
from longspan.nn import FeedForward, Mixer, blockwise
from longspan.nn.auxiliary import report
from longspan.registry import mechanism
from longspan.shapes import Context, Inputs, Keep, Marks

Vector = Float[Tensor, "B E"]
Source = Literal["mix", "last"] | int


class Memory(NamedTuple):
    """Keys and values of the last M steps, newest last, and how many steps a row has seen."""

    pairs: Float[Tensor, "B M P"]
    seen: Int[Tensor, "B"]


class FeedbackLayer(nn.Module):
    """x ← x + Attn(norm(x); k, v), x ← x + FFN(norm(x)), with scores (q·k_j + q·p_{t−j}) / √D."""

    def __init__(
        self, inner: FeedForward, *, width: int, heads: int, memory: int, span: int | None
    ) -> None:
        super().__init__()
        self.heads, self.span, self.feed_forward = heads, span, inner
        self.norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.place = nn.Parameter(torch.randn(memory, width // heads) * 0.02)
        self.reach = None if span is None else nn.Parameter(torch.full((heads,), 0.5))
        self.dropout = nn.Dropout(inner.dropout.p)

    def forward(self, x: Vector, pairs: Float[Tensor, "B S F"], seen: Tensor | None) -> Vector:
        """`pairs` holds keys and values of the S steps before, `seen` (B S) which there are."""
        q = self.query(self.norm(x)).unflatten(1, (self.heads, -1))
        k, v = (t.unflatten(2, (self.heads, -1)) for t in pairs.chunk(2, -1))
        steps = pairs.shape[1]
        scores = einsum(q, k, "B H D, B S H D -> B H S")
        scores = scores + einsum(q, self.place[:steps].flip(0), "B H D, S D -> B H S")
        scores = scores / q.shape[2] ** 0.5
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None], -torch.inf)
        weights = torch.ops.aten._safe_softmax(scores, -1)
        if self.reach is not None and self.span is not None:
            far = torch.arange(steps, 0, -1, device=x.device)
            reach = self.reach.clamp(0, 1)[:, None] * len(self.place)
            weights = weights * ((self.span + reach - far) / self.span).clamp(0, 1)
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-8)
        o = einsum(weights, v, "B H S, B S H D -> B H D").flatten(1)
        x = x + self.dropout(self.output(o))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


@mechanism(
    Card(
        id="feedback-transformer",
        name="Feedback Transformer",
        kind="architecture",
        family="recurrent-memory",
        paper="Addressing Some Limitations of Transformers with Feedback Memory",
        cite="Fan et al., 2020",
        link="https://arxiv.org/abs/2002.09402",
        what="All layers attend to one memory, a mix of every layer's states at past steps.",
        modes={"causal", "step"},
        time="L*M*E + L*E*E",
        memory="M*E",
    )
)
class Feedback(Mixer):
    """All layers for one step, then m_t = Σ_l softmax(w)_l x_t^l, then the next step (Eq. 4 to 6).

    The present step is not among the keys. One pass is sequential in time by nature; keys and
    values are appended in place. The carried memory takes no gradient. The last norm is the
    caller's.

    Args:
        memory: M, the last steps that are seen.
        source: `mix` of all layers, the `last` one, or the number of one, 0 for the embedding.
        shared: one projection of keys and values for all layers.
        start: `empty`, or `zeros`: M zero vectors that take part at first (the official code).
        span: of a learned soft span a head, the ramp's length R (Sukhbaatar et al., 2019); None for
            none. span_loss: weight of the mean span, as the loss `feedback_span`.

    Raises:
        LongspanError: no memory, heads that do not divide the width, or a source that is no layer.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        layers: int = 4,
        memory: int = 512,
        source: Source = "mix",
        shared: bool = True,
        start: Literal["empty", "zeros"] = "empty",
        span: int | None = None,
        span_loss: float = 0.0,
        inner: int | None = None,
        activation: Literal["relu", "gelu", "silu"] = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        named = source in ("mix", "last")
        if memory < 1 or width % heads or not (named or source in range(layers + 1)):
            raise LongspanError(
                f"a Feedback Transformer got memory={memory}, width={width}, heads={heads}, source="
                f"{source!r}: expected 1 or more, a width that the heads divide, and 'mix', 'last' "
                f"or a layer of 0 … {layers}."
            )
        self.memory, self.source, self.shared, self.start = memory, source, shared, start
        self.span, self.span_loss = span, span_loss
        self.layers = nn.ModuleList(
            FeedbackLayer(
                FeedForward(width, inner=inner, activation=activation, dropout=dropout),
                width=width,
                heads=heads,
                memory=memory,
                span=span,
            )
            for _ in range(layers)
        )
        self.mix = nn.Parameter(torch.zeros(layers + 1)) if source == "mix" else None
        copies = 1 if shared else layers
        # Shared projections need a shared norm before them.
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(copies))
        self.project = nn.ModuleList(nn.Linear(width, 2 * width, False) for _ in range(copies))

    def forward(
        self,
        x: Inputs,
        state: Memory | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, Memory]:
        x, keep = blockwise.alone(self, x, keep, context, marks)
        memory, wide = self.memory, 2 * x.shape[2] * len(self.project)
        if state is None:
            none = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
            state = Memory(x.new_zeros(x.shape[0], memory, wide), none)
        count, filled = keep.sum(1), state.seen.clamp(max=memory)
        # One visit holds each row's kept tokens, in order: all rows step together.
        cut = blockwise.plan(torch.zeros_like(count), keep, max(x.shape[1], 1))
        there = torch.arange(memory, device=x.device) >= memory - filled[:, None]
        start, masked = state.pairs, not bool(there.all())
        if self.start == "zeros":
            zero = self.pairs(x.new_zeros(1, x.shape[2]))
            start, masked = torch.where(there[..., None], start, zero), False
        (tokens,) = cut.split(x) or (x[:, :0],)
        growing, outs = Growing(start, tokens.shape[1]), []
        for t, token in enumerate(tokens.unbind(1)):
            seen = there[:, t:] if masked and t < memory else None
            if seen is not None:
                seen = F.pad(seen, (0, t), value=True)
            y, pair = self.step(token, growing.read(t, t + memory), seen)
            growing.append(pair)
            outs.append(y)
        if self.training and self.span_loss and self.span is not None:
            spans = [layer.reach.clamp(0, 1).mean() for layer in self.layers]  # pyright: ignore
            report(self, "feedback_span", self.span_loss * torch.stack(spans).mean())
        y = cut.join([torch.stack(outs, 1)] if outs else [], x)
        last = count[:, None] + torch.arange(memory, device=x.device)
        return y, Memory(blockwise.rows(growing.buffer, last), state.seen + count)

    def step(
        self, x: Vector, pairs: Float[Tensor, "B S P"], seen: Tensor | None
    ) -> tuple[Vector, Float[Tensor, "B P"]]:
        """One step: the top layer's output, and the keys and values of its memory vector."""
        states = [x]
        each = pairs.chunk(len(self.project), -1)
        for n, layer in enumerate(self.layers):
            states.append(layer(states[-1], each[0 if self.shared else n], seen))
        return states[-1], self.pairs(self.mixed(states))

    def mixed(self, states: list[Tensor]) -> Vector:
        """m_t of the states of all layers, the embedding first."""
        if self.mix is not None:
            return torch.einsum("nbe,n->be", torch.stack(states), self.mix.softmax(0))
        return states[-1 if self.source == "last" else int(self.source)]

    def pairs(self, m: Vector) -> Float[Tensor, "B P"]:
        """Keys and values of memory vectors, of every layer where not shared."""
        parts = zip(self.norms, self.project, strict=True)
        return torch.cat([project(norm(m)) for norm, project in parts], -1)
