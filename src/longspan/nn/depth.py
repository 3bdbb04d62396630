"""How deep each position goes: drivers over steps, and steps that leave out what has halted."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longspan import registry
from longspan.engines.dense import additive
from longspan.nn.blocks import Block
from longspan.nn.heads import MultiHead, MultiHeadState
from longspan.shapes import Context, Inputs, Keep, Marks

Active = Bool[Tensor, "B L"]

# (x: B L E, state, active: B L, or None for all) → (y: B L E, state): one application of a block.
# Where not active, y is x; what others may attend to there is computed all the same.
Step = Callable[[Tensor, Any, Tensor | None], tuple[Tensor, Any]]


class Went(NamedTuple):
    """What a driver gives: the output, a state for each step, and the steps a position took.

    Padding takes none, and its y may be anything.
    """

    y: Inputs
    states: tuple[Any, ...]
    taken: Int[Tensor, "B L"]


class Depth(nn.Module, ABC):
    """(steps, x, states) → y, states: how many of the steps each position goes through.

    The steps are the blocks of a stack, in order (`step_of`), or one block over and over. A driver
    calls each at most once, with the positions that still run, by `onward`, so that a call that
    carries states feeds those of every step. What it decides at a position may depend on no later
    one where the steps are causal. In training it leaves what its halting costs with
    `auxiliary.report(self, "ponder", value)`.
    """

    @abstractmethod
    def forward(
        self,
        steps: Sequence[Step],
        x: Inputs,
        states: Sequence[Any] | None = None,
        *,
        keep: Keep | None = None,
    ) -> Went: ...


def onward(
    step: Step, x: Inputs, state: Any, active: Active, *, carries: bool
) -> tuple[Inputs, Any]:
    """One step for the active positions; not even run where nothing is active or carried.

    Args:
        carries: the steps have states, which positions that have halted feed too.
    """
    if bool(active.all()):
        return step(x, state, None)
    if not carries and not bool(active.any()):
        return x, state
    return step(x, state, active)


class Packed(NamedTuple):
    """Some positions of each row, in order, at the end of as many slots as the most has.

    Attributes:
        at: position of each slot. valid: whether the slot is one of those wanted.
    """

    at: Int[Tensor, "B N"]
    valid: Bool[Tensor, "B N"]

    @classmethod
    def of(cls, active: Active) -> "Packed":
        """The active positions of each row."""
        most = int(active.sum(1).max()) if active.numel() else 0
        at = active.to(torch.uint8).argsort(dim=1, stable=True)[:, active.shape[1] - most :]
        return cls(at, active.gather(1, at))

    def take(self, x: Inputs) -> Float[Tensor, "B N E"]:
        """The wanted positions of x; slots that are not valid hold others."""
        flat = x.flatten(0, 1).index_select(0, self._flat(x.shape[1]).flatten())
        return flat.view(*self.at.shape, x.shape[2])

    def put(self, rows: Float[Tensor, "M E"], x: Inputs) -> Inputs:
        """x with `rows` in place of the wanted positions, as `rows[valid]` lists them."""
        where = self._flat(x.shape[1])[self.valid]
        return x.flatten(0, 1).index_copy(0, where, rows.to(x.dtype)).view(x.shape)

    def _flat(self, length: int) -> Tensor:
        row = torch.arange(len(self.at), device=self.at.device)[:, None]
        return row * length + self.at


def step_of(
    block: Block,
    *,
    keep: Active | None = None,
    marks: Marks | None = None,
    encoded: Context | None = None,
    encoded_keep: Keep | None = None,
) -> Step:
    """A block as a step: positions that are not active are copied, and cost what others need.

    Feed-forwards and cross-attentions run for active positions only, softmax attention has only
    their queries; another mixer runs whole, since no other form of it is known.
    """

    def step(x: Inputs, state: Any, active: Active | None) -> tuple[Inputs, Any]:
        if active is None:
            return block(
                x, state, keep=keep, marks=marks, encoded=encoded, encoded_keep=encoded_keep
            )
        pre, packed = block.order == "pre", Packed.of(active)
        source, rows = block.mixer_norm(x) if pre else x, packed.take(x)
        if marks is None and _softmax(block.mixer):
            y, state = attend_among(block.mixer, source, packed, state, keep=keep)
        else:
            y, state = block.mixer(source, state, keep=keep, marks=marks)
            y = packed.take(y)
        rows = rows + block.dropout(y)
        rows = rows if pre else block.mixer_norm(rows)
        if block.cross is not None and block.cross_norm is not None:
            queries = block.cross_norm(rows) if pre else rows
            y, _ = block.cross(queries, context=encoded, keep=encoded_keep)
            rows = rows + block.dropout(y)
            rows = rows if pre else block.cross_norm(rows)
        some = rows[packed.valid]
        if block.feed_forward is not None and block.feed_forward_norm is not None:
            y = block.feed_forward(block.feed_forward_norm(some) if pre else some)
            some = some + block.dropout(y)
            some = some if pre else block.feed_forward_norm(some)
        return packed.put(some, x), state

    return step


def pointwise(module: nn.Module, *, first: bool | None = None) -> Step:
    """A module on single vectors as a step: it sees the active positions only, in one batch.

    Args:
        first: where given, every vector gets a last channel that is 1 in the first step and 0 in
            others (Graves, 2016, Sec. 2).
    """

    def step(x: Inputs, state: Any, active: Active | None) -> tuple[Inputs, Any]:
        every = x.new_ones(x.shape[:2], dtype=torch.bool) if active is None else active
        rows = x[every]
        given = rows
        if first is not None:
            given = torch.cat([rows, rows.new_full((len(rows), 1), float(first))], 1)
        return x.masked_scatter(every[..., None], module(given).to(x.dtype)), state

    return step


def _softmax(mixer: nn.Module) -> TypeGuard[MultiHead]:
    """Whether a mixer is softmax attention whose queries can be taken one by one."""
    dense: Any = registry.builder("multi-head-attention")
    return (
        isinstance(mixer, MultiHead)
        and isinstance(mixer.attention, dense)
        and mixer.attention.multiplier is None
        and mixer.attention.gate is None
        and (mixer.position is None or mixer.position.acts <= {"embed", "enter", "rotate"})
    )


def attend_among(
    mixer: MultiHead,
    x: Inputs,
    packed: Packed,
    state: MultiHeadState | None,
    *,
    keep: Keep | None = None,
) -> tuple[Float[Tensor, "B N E"], MultiHeadState | None]:
    """Self-attention with the queries of some positions and the keys and values of all.

    The state is that of the mixer itself. Slots that are not valid give anything.
    """
    if keep is not None:
        x = x.masked_fill(~keep[..., None], 0)
    q, k, v = (
        rearrange(mixer.project[name](of), "B L (H D) -> B H L D", D=width)
        for name, of, width in (
            ("q", packed.take(x), mixer.head_width),
            ("k", x, mixer.head_width),
            ("v", x, mixer.value_width),
        )
    )
    seen = x.new_zeros(len(x), dtype=torch.long) if state is None else state.seen
    if mixer.position is not None and "rotate" in mixer.position.acts:
        here = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        here = seen[:, None] + (here if keep is None else (keep.cumsum(1) - 1).clamp(min=0))
        q = mixer.position.rotate(q, here.gather(1, packed.at))
        k = mixer.position.rotate(k, here)
    past = 0 if state is None else state.attention.k.shape[2]
    before = past + x.shape[1] - packed.at.shape[1]

    # The last queries meet the last keys, none of them later than its own: what is left to hide
    # are the keys between a query's own place and the one that its slot is given.
    def order(q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        own = past + packed.at[:, pos_q - before]
        return additive((pos_k <= own[..., None])[:, None], torch.float32)

    bias = order if mixer.attention.causal else None
    o, carried = mixer.attention(q, k, v, state and state.attention, keep=keep, bias=bias)
    y = mixer.output(rearrange(o, "B H L V -> B L (H V)"))
    if carried is None:
        return y, None
    return y, MultiHeadState(carried, seen + (x.shape[1] if keep is None else keep.sum(1)))
