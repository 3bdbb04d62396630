"""Universal Transformer (Dehghani et al., 2018)."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn import Block, FeedForward, MultiHead, norm
from longspan.nn.depth import Active, Depth, Step, step_of
from longspan.nn.positions import at_least_float32, positions_from, sinusoid
from longspan.registry import build, mechanism
from longspan.shapes import Context, Inputs, Keep, Marks

# How the paper halts: p from the state before its step, earlier states fading (App.).
HALTING = {"id": "act", "reads": "before", "output": "running"}


class Separable(nn.Module):
    """A convolution of each channel, then a linear map of all; causal ones carry their past."""

    def __init__(self, width: int, out: int, *, taps: int, causal: bool) -> None:
        super().__init__()
        self.each = nn.Conv1d(width, width, taps, groups=width, bias=False)
        self.mix = nn.Linear(width, out)
        self.taps, self.causal = taps, causal

    def forward(
        self, x: Inputs, past: Float[Tensor, "B P E"] | None
    ) -> tuple[Float[Tensor, "B L F"], Float[Tensor, "B P E"] | None]:
        before = self.taps - 1 if self.causal else self.taps // 2
        if past is None:
            past = x.new_zeros(len(x), before, x.shape[2])
        whole = F.pad(torch.cat([past, x], 1), (0, 0, 0, self.taps - 1 - before))
        y = self.mix(self.each(whole.mT).mT)
        return y, whole[:, whole.shape[1] - before :] if self.causal else None


class Transition(nn.Module):
    """y = LN(x + S_2(relu(S_1(x)))) of separable convolutions, in place of the feed-forward."""

    def __init__(
        self, width: int, *, inner: int, taps: Sequence[int], causal: bool, dropout: float
    ) -> None:
        super().__init__()
        self.up = Separable(width, inner, taps=taps[0], causal=causal)
        self.down = Separable(inner, width, taps=taps[1], causal=causal)
        self.norm, self.dropout = norm("layer", width), nn.Dropout(dropout)

    def forward(self, x: Inputs, state: Any, keep: Active | None) -> tuple[Inputs, Any]:
        def kept(t: Tensor) -> Tensor:
            return t if keep is None else t.masked_fill(~keep[..., None], 0)

        first, second = state or (None, None)
        hidden, first = self.up(kept(x), first)
        y, second = self.down(kept(F.relu(hidden)), second)
        return self.norm(x + self.dropout(y)), None if first is None else (first, second)


class Depths(NamedTuple):
    """What each step carries, for each of its blocks, and how many tokens each row has seen."""

    steps: tuple[Any, ...]
    seen: Int[Tensor, "B"]


class Recurrence(nn.Module):
    """H^t = blocks(H^{t−1} + P^t), t = 1 … T, a block among the layers of a model.

    P^t_i = PE(i) + PE(t) at every step (Eqs. 6 and 7); as in the released code, i and t count
    from 0.

    Args:
        steps, steps_eval: T in training and in evaluation; with halting the most.
        halting: decides how many of them each position goes through; None for all.
        transitions: one a block, where blocks have no feed-forward.
        coordinates: PE(i) at each step, the first, or none.
        time: PE(t), a learned vector a step, or none.

    Attributes:
        taken: how many steps each position of the last call took, B L, 0 for padding.

    Raises:
        LongspanError: no steps; a state of another number of steps.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        width: int,
        steps: int,
        steps_eval: int | None = None,
        halting: Depth | None = None,
        transitions: Sequence[Transition] = (),
        coordinates: Literal["each", "first", "none"] = "each",
        time: Literal["sinusoidal", "learned", "none"] = "sinusoidal",
    ) -> None:
        super().__init__()
        steps_eval = steps if steps_eval is None else steps_eval
        if min(steps, steps_eval) < 1:
            raise LongspanError(
                f"a Universal Transformer of {steps} steps in training and {steps_eval} in "
                "evaluation was asked for: give at least 1."
            )
        self.blocks, self.transitions = nn.ModuleList(blocks), nn.ModuleList(transitions)
        self.halting, self.steps, self.steps_eval = halting, steps, steps_eval
        self.coordinates, self.time = coordinates, time
        self.times = None
        if time == "learned":
            self.times = nn.Parameter(torch.empty(max(steps, steps_eval), width))
            nn.init.normal_(self.times, std=0.02)
        self.taken: Tensor | None = None

    def forward(
        self,
        x: Inputs,
        state: Depths | None = None,
        *,
        keep: Active | None = None,
        marks: Marks | None = None,
        encoded: Context | None = None,
        encoded_keep: Keep | None = None,
    ) -> tuple[Inputs, Depths | None]:
        count = self.steps if self.training else self.steps_eval
        if state is not None and len(state.steps) != count:
            raise LongspanError(
                f"the state holds {len(state.steps)} steps and the model now takes {count}: it "
                "goes on only in the mode, training or evaluation, in which it began."
            )
        kept = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        seen = x.new_zeros(len(x), dtype=torch.long) if state is None else state.seen
        pos = positions_from(kept, seen)

        def step_at(n: int) -> Step:
            def step(x: Inputs, state: Any, active: Active | None) -> tuple[Inputs, Any]:
                y, carried = self._enter(x, pos, n), []
                for i, block in enumerate(self.blocks):
                    assert isinstance(block, Block)
                    own, convolved = (None, None) if state is None else state[i]
                    part = step_of(
                        block, keep=keep, marks=marks, encoded=encoded, encoded_keep=encoded_keep
                    )
                    y, own = part(y, own, active)
                    if self.transitions:
                        y, convolved = self.transitions[i](y, convolved, keep)
                    carried.append((own, convolved))
                if active is not None:
                    y = torch.where(active[..., None], y, x)
                return y, None if carried[0][0] is None else tuple(carried)

            return step

        steps = [step_at(n) for n in range(count)]
        if self.halting is not None:
            went = self.halting(steps, x, None if state is None else state.steps, keep=keep)
            x, carried, self.taken = went.y, went.states, went.taken
        else:
            carried = []
            for n, step in enumerate(steps):
                x, own = step(x, None if state is None else state.steps[n], None)
                carried.append(own)
            self.taken = count * kept.long()
        return x, None if carried[0] is None else Depths(tuple(carried), seen + kept.sum(1))

    def _enter(self, x: Inputs, pos: Int[Tensor, "B L"], n: int) -> Inputs:
        width, wide = x.shape[2], at_least_float32(x)
        if self.coordinates == "each" or (self.coordinates == "first" and n == 0):
            x = x + sinusoid(pos, width, dtype=wide).to(x.dtype)
        if self.times is not None:
            return x + self.times[n]
        if self.time == "sinusoidal":
            at = torch.full((1,), n, device=x.device)
            return x + sinusoid(at, width, dtype=wide).to(x.dtype)
        return x


@mechanism(
    Card(
        id="universal-transformer",
        name="Universal Transformer (with ACT)",
        kind="architecture",
        family="adaptive-depth",
        paper="Universal Transformers",
        cite="Dehghani et al., ICLR 2019",
        link="https://arxiv.org/abs/1807.03819",
        what="Runs one block over and over on all positions, each of which halts when it has been "
        "through enough steps.",
        modes={"bidirectional", "causal", "step"},
        time="L*L*E + L*E*E",
        memory="L*E",
    )
)
def universal_transformer(
    *,
    width: int,
    heads: int,
    steps: int = 6,
    steps_eval: int | None = None,
    inner: int | None = None,
    causal: bool = False,
    cross: bool = False,
    halting: dict[str, Any] | None = None,
    transition: Literal["dense", "separable"] = "dense",
    taps: Sequence[int] = (3, 31),
    coordinates: Literal["each", "first", "none"] = "each",
    time: Literal["sinusoidal", "learned", "none"] = "sinusoidal",
    dropout: float = 0.0,
) -> Recurrence:
    """A^t = LN(H^{t−1} + P^t + MHA(H^{t−1} + P^t)),  H^t = LN(A^t + Transition(A^t))   (Eqs. 4, 5)

    with one set of weights for all steps. `longspan.models.UniversalForCausalLM` and its siblings
    are whole models.

    Args:
        cross: a cross-attention between the two, as in the decoder.
        halting: options of ACT as the paper has it, `{}` for the defaults, or of another driver
            that `id` names; None for `steps` steps.
        transition: a feed-forward, or two separable convolutions of `taps` tokens.
    """

    def attention(causal: bool) -> MultiHead:
        softmax = build("multi-head-attention", causal=causal)
        return MultiHead(softmax, width=width, heads=heads)

    dense = transition == "dense"
    inner = inner or 4 * width
    feed_forward = FeedForward(width, inner=inner, activation="relu", dropout=dropout)
    block = Block(
        attention(causal),
        feed_forward if dense else None,
        width=width,
        order="post",
        dropout=dropout,
        cross=attention(False) if cross else None,
    )
    convolution = Transition(width, inner=inner, taps=taps, causal=causal, dropout=dropout)
    return Recurrence(
        [block],
        width=width,
        steps=steps,
        steps_eval=steps_eval,
        halting=driver(halting, width=width),
        transitions=() if dense else [convolution],
        coordinates=coordinates,
        time=time,
    )


def driver(halting: dict[str, Any] | None, *, width: int) -> Depth | None:
    """The driver that `halting` describes, as `universal_transformer` takes it."""
    if halting is None:
        return None
    options = dict(halting) if "id" in halting else HALTING | halting
    return build(options.pop("id"), width=width, **options)
