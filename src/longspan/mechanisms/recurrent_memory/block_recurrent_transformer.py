"""Block-Recurrent Transformer (Hutchins et al., 2022)."""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import dense
from longspan.errors import LongspanError
from longspan.nn import Mixer, blockwise
from longspan.nn.distances import DistanceBias
from longspan.nn.state import detach
from longspan.registry import mechanism
from longspan.shapes import Context, Inputs, Keep, Marks

Gating = Literal["fixed", "lstm", "full"]
Layout = Literal["dual", "single", "skip"]
Slots = Float[Tensor, "B M E"]


class Gate(nn.Module):
    """s' = s ∘ g + z ∘ (1 − g), g = σ(b) (`fixed`) or σ(W_g y + b_g) (`full`), or

        s' = s ∘ σ(W_f y + b_f + 1) + z ∘ σ(W_i y + b_i − 1)                    (`lstm`, Eq. 3 to 5)

    y is what z was projected from; z goes through tanh where the gate depends on it.
    """

    def __init__(self, kind: Gating, width: int, inputs: int) -> None:
        super().__init__()
        self.kind = kind
        self.weights = nn.ModuleList(
            nn.Linear(inputs, width) for _ in range({"fixed": 0, "full": 1, "lstm": 2}[kind])
        )
        for linear in self.weights:
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.bias, std=0.1)
        self.bias = nn.Parameter(torch.randn(width) * 0.1) if kind == "fixed" else None

    def forward(self, s: Slots, z: Slots, y: Float[Tensor, "B M _"]) -> Slots:
        if self.bias is not None:
            g = self.bias.sigmoid()
            return s * g + z * (1 - g)
        z, (first, *others) = z.tanh(), [linear(y) for linear in self.weights]
        if not others:
            g = first.sigmoid()
            return s * g + z * (1 - g)
        return s * (first + 1).sigmoid() + z * (others[0] - 1).sigmoid()


class Recurrent(NamedTuple):
    """The slots, as their difference from where they start, and the block with the one before."""

    slots: Slots
    frame: blockwise.Frame


@mechanism(
    Card(
        id="block-recurrent-transformer",
        name="Block-Recurrent Transformer",
        kind="memory",
        family="recurrent-memory",
        paper="Block-Recurrent Transformers",
        cite="Hutchins et al., NeurIPS 2022",
        link="https://arxiv.org/abs/2203.07852",
        what="A window-attention layer whose tokens also read a few state vectors, which are "
        "updated through a gate after each block.",
        modes={"causal", "step"},
        time="L*C*E + L*M*E + L*E*E",
        memory="M*E + C*E",
        tiny={"width": 24, "heads": 3, "window": 8, "states": 5, "distance": 8, "buckets": 6},
    )
)
class BlockRecurrent(Mixer):
    """Tokens read the window and the state before their block; the state reads the block (Fig. 2).

        y = [Attn(q_x; k_x, v_x, window) ; Attn(q2_x; k_s, v_s)] W_o                     vertical
        z = [Attn(q_s; k_s, v_s) ; Attn(q2_s; k_x, v_x of 2 blocks)],  s' = gate(s, z)   horizontal

    Keys and values of x and of s serve both directions; queries and keys have length 1, times a
    learned scale. s is normalised and given a learned identity before it is read. Both directions
    read the state from before the block, so that no token meets one made of itself. Gradients pass
    from block to block within a call and stop at its end.

    Args:
        window: W, the length of a block, and of the window. states: S; 0 for none, which leaves
            window attention.
        gate, layout: of the state: `skip` projects and gates, `single` gates a feed-forward of the
            attention, `dual` gates a projection, then a feed-forward.
        writes: False for a layer that only reads a state (given by `visit`).
        buckets, distance: of T5's bias on self-attention between tokens.
        inner: of the state's feed-forward.

    Raises:
        LongspanError: an unknown gate or layout, or sizes that do not fit.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        window: int = 512,
        states: int = 512,
        gate: Gating = "fixed",
        layout: Layout = "skip",
        writes: bool = True,
        buckets: int = 32,
        distance: int = 128,
        inner: int | None = None,
    ) -> None:
        super().__init__()
        if gate not in get_args(Gating) or layout not in get_args(Layout):
            raise LongspanError(
                f"block-recurrent-transformer got gate={gate!r}, layout={layout!r}: expected one "
                f"of {', '.join(get_args(Gating))} and one of {', '.join(get_args(Layout))}."
            )
        if window < 1 or states < 0 or width % heads:
            raise LongspanError(
                f"block-recurrent-transformer got window={window}, states={states}, width={width}, "
                f"heads={heads}: expected 1 or more, 0 or more, and a width that heads divide."
            )
        self.width, self.heads, self.window, self.states = width, heads, window, states
        self.layout, self.writes, self.distance = layout, writes and states > 0, distance
        names = ["q", "k", "v"] + ["q_cross"] * (states > 0)
        self.project = nn.ModuleDict({n: nn.Linear(width, width, bias=False) for n in names})
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.near = DistanceBias(heads, buckets=buckets, distance=distance)
        self.output = nn.Linear(width * (1 + (states > 0)), width, bias=False)
        if states:
            self.of_slots = nn.ModuleDict(
                {
                    n: nn.Linear(width, width, bias=False)
                    for n in ["k", "v"] + ["q", "q_cross"] * self.writes
                }
            )
            self.identity = nn.Parameter(torch.randn(states, width) / width**0.5)
            self.slots_norm = nn.LayerNorm(width)
        if self.writes:
            self.start = nn.Parameter(torch.randn(states, width) * 0.1)
            self.slots_scale = nn.Parameter(torch.ones(heads, 1, 1))
            self._build_update(gate, inner or 4 * width)

    def _build_update(self, gate: Gating, inner: int) -> None:
        width, layout = self.width, self.layout
        if layout != "single":
            self.slots_output = nn.Linear(2 * width, width)
            self.gate = Gate(gate, width, 2 * width)
        if layout != "skip":
            inputs = width if layout == "dual" else 2 * width
            self.up, self.down = nn.Linear(inputs, inner), nn.Linear(inner, width)
            self.last_gate = Gate(gate, width, inner)
            self.inner_norm = nn.LayerNorm(width) if layout == "dual" else nn.Identity()

    @torch.compiler.disable  # the visits of a call depend on its mask
    def forward(
        self,
        x: Inputs,
        state: Recurrent | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, Recurrent]:
        x, keep = blockwise.alone(self, x, keep, context, marks)
        slots, frame = self.begin(x) if state is None else state
        cut, outs = blockwise.plan(frame.seen, keep, self.window), []
        for new, visit in zip(cut.split(x), cut.visits, strict=True):
            y, slots, frame = blockwise.recomputed(
                self.visit, new, slots, frame, visit, among=len(cut.visits)
            )
            outs.append(y)
        return cut.join(outs, x), Recurrent(*detach((slots, frame)))

    def begin(self, x: Inputs) -> Recurrent:
        """The state of rows that have seen nothing."""
        slots = x.new_zeros(x.shape[0], self.states, self.width)
        window = self.window
        frame = blockwise.fresh(x, block=window, memory=window, width=2 * self.width)
        return Recurrent(slots, frame)

    def visit(
        self,
        x: Inputs,
        slots: Slots,
        frame: blockwise.Frame,
        visit: blockwise.Visit,
        read: Slots | None = None,
    ) -> tuple[Inputs, Slots, blockwise.Frame]:
        """One block's tokens: (y, the slots after them, the frame after them).

        Args:
            read: the state itself, of another layer, for one that only reads.
        """
        q = self._heads(self.project["q"](x), unit=True)
        pair = torch.cat([self.project["k"](x), self.project["v"](x)], -1)
        frame = blockwise.put(frame, pair, visit)
        whole = torch.cat([frame.before, frame.now], 1)
        k, v = (self._heads(t, unit=n == 0) for n, t in enumerate(whole.chunk(2, -1)))
        far, there = blockwise.distances(frame, visit), blockwise.filled(frame)
        seen = (far >= 0) & (far < self.window) & there[:, None]
        near = self.near(far.clamp(min=0))
        reads = [dense.explicit(q * self.scale, k, v, seen=seen[:, None], bias=near, scale=1.0)[0]]
        if self.states:
            s = slots + self.start if read is None else read
            h = self.slots_norm(s) + self.identity
            k_s, v_s = (self._heads(self.of_slots[n](h), unit=n == "k") for n in ("k", "v"))
            q = self._heads(self.project["q_cross"](x), unit=True) * self.scale
            reads.append(dense.explicit(q, k_s, v_s, scale=1.0)[0])
            if self.writes and bool(visit.full.any()):
                z = self._update(s, h, (k_s, v_s), (k, v), there) - self.start
                slots = torch.where(visit.full[:, None, None], z, slots)
        return self.output(self._joined(reads)), slots, blockwise.turn(frame, visit)

    def _update(
        self,
        s: Slots,
        h: Slots,
        own: tuple[Tensor, Tensor],
        tokens: tuple[Tensor, Tensor],
        there: Bool[Tensor, "B _"],
    ) -> Slots:
        q, q_cross = (
            self._heads(self.of_slots[n](h), unit=True) * self.slots_scale for n in ("q", "q_cross")
        )
        seen = there[:, None, None]
        y = self._joined(
            [
                dense.explicit(q, *own, scale=1.0)[0],
                dense.explicit(q_cross, *tokens, seen=seen, scale=1.0)[0],
            ]
        )
        if self.layout != "single":
            s = self.gate(s, self.slots_output(y), y)
        if self.layout == "skip":
            return s
        hidden = F.relu(self.up(self.inner_norm(s) if self.layout == "dual" else y))
        z = self.down(hidden)
        return self.last_gate(s, z.tanh() if self.layout == "single" else z, hidden)

    def _heads(self, t: Tensor, *, unit: bool) -> Tensor:
        t = rearrange(t, "B L (H D) -> B H L D", H=self.heads)
        return F.normalize(t, dim=-1, eps=1e-6) if unit else t

    def _joined(self, reads: list[Tensor]) -> Tensor:
        return torch.cat([rearrange(o, "B H L D -> B L (H D)") for o in reads], -1)
