"""Work in blocks of C kept tokens, however pieces and padding cut them up.

A row's blocks are counted over its kept tokens from its first on, so at any call rows may stand at
different places of a block. `plan` cuts a call into visits, one block of each row at most in each;
a `Frame` carries the block begun and what stood before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan.engines import dense
from longspan.errors import LongspanError
from longspan.nn.positions import sinusoid
from longspan.nn.protocols import Mixer
from longspan.shapes import Context, Inputs, Keep, Marks

MANY = 16  # visits whose weights are all held for the backward pass


class Visit(NamedTuple):
    """Tokens of one block of each row; where all rows agree, `place` has one row."""

    index: Int[Tensor, "B c"]  # which tokens of the call
    place: Int[Tensor, "b c"]  # where in the block
    here: Bool[Tensor, "B c"]  # which of them there are
    full: Bool[Tensor, "B"]  # rows whose block they fill


@dataclass(frozen=True)
class Plan:
    """The visits of one call, and in which column of all of them each token is."""

    visits: list[Visit]
    at: Int[Tensor, "B L"]
    keep: Keep

    def split(self, x: Float[Tensor, "B L E"]) -> Sequence[Float[Tensor, "B _ E"]]:
        """The tokens of each visit; one gather and one split, lest backward cost visits × L."""
        if not self.visits:
            return ()
        sizes = [visit.index.shape[1] for visit in self.visits]
        return rows(x, torch.cat([visit.index for visit in self.visits], 1)).split(sizes, 1)

    def join(self, outs: Sequence[Float[Tensor, "B _ E"]], like: Inputs) -> Inputs:
        """What the visits gave, token by token; 0 where a token is masked."""
        if not outs:
            return torch.zeros_like(like)
        return rows(torch.cat(list(outs), 1), self.at).masked_fill(~self.keep[..., None], 0)


class Frame(NamedTuple):
    """The block that each row is in, the M vectors before it, and how many tokens it has seen."""

    before: Float[Tensor, "B M E"]
    now: Float[Tensor, "B C E"]
    seen: Int[Tensor, "B"]

    @property
    def filled(self) -> Int[Tensor, "B"]:
        """How many of the vectors before there are; they are the last."""
        block = self.now.shape[1]
        return (self.seen // block * block).clamp(max=self.before.shape[1])


def fresh(x: Inputs, *, block: int, memory: int, width: int | None = None) -> Frame:
    """A frame that has seen nothing."""
    width = x.shape[2] if width is None else width
    before, now = (x.new_zeros(x.shape[0], n, width) for n in (memory, block))
    return Frame(before, now, torch.zeros(x.shape[0], dtype=torch.long, device=x.device))


def plan(seen: Int[Tensor, "B"], keep: Keep, block: int) -> Plan:
    """The visits of a call whose rows have seen so many tokens before."""
    length, count, begun = keep.shape[1], keep.sum(1), seen % block
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
    alike = bool((begun == begun[:1]).all())
    visits, starts, width = [], [], 0
    for n in range(-(-int((begun + count).amax()) // block) if keep.numel() else 0):
        start = (n * block - begun).clamp(min=0)
        size = torch.minimum((n + 1) * block - begun, count) - start
        column = torch.arange(int(size.amax().clamp(min=0)), device=keep.device)
        first = (begun - n * block).clamp(min=0)
        index = order.gather(1, (start[:, None] + column).clamp(max=length - 1))
        place = (first[:1] if alike else first)[:, None] + column
        here = column < size[:, None]
        if len(column):
            visits.append(Visit(index, place, here, (size > 0) & (first + size == block)))
        starts.append(width)
        width += len(column)
    rank = (keep.cumsum(1) - 1).clamp(min=0)
    number = ((begun[:, None] + rank) // block).clamp(max=max(len(starts) - 1, 0))
    column = rank - (number * block - begun[:, None]).clamp(min=0)
    at = torch.tensor(starts or [0], device=keep.device)[number] + column
    return Plan(visits, at.clamp(min=0, max=max(width - 1, 0)), keep)


def rows(x: Float[Tensor, "B S E"], index: Int[Tensor, "B c"]) -> Float[Tensor, "B c E"]:
    """x[b, index[b, i]]: rows of one flat matrix, far cheaper than a gather."""
    start = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    picked = x.reshape(-1, x.shape[2]).index_select(0, (start + index).flatten())
    return picked.view(*index.shape, x.shape[2])


def put(frame: Frame, new: Float[Tensor, "B c E"], visit: Visit) -> Frame:
    """The frame with a visit's tokens in its block."""
    block, size = frame.now.shape[1], new.shape[1]
    if size == block and len(visit.place) == 1:  # every row at its start
        there = visit.here[..., None]
        return frame._replace(now=torch.where(there, new, frame.now))
    at = torch.arange(block, device=new.device) - visit.place[:, :1]
    at = at.expand(new.shape[0], -1)
    there = (at >= 0) & (at < visit.here.sum(1, keepdim=True))
    picked = rows(new, at.clamp(min=0, max=size - 1))
    return frame._replace(now=torch.where(there[..., None], picked, frame.now))


def turn(frame: Frame, visit: Visit) -> Frame:
    """The frame after a visit: a full block goes before, and an empty one begins."""
    before, now, seen = frame
    memory, full = before.shape[1], visit.full[:, None, None]
    if memory:
        moved = torch.cat([before, now], 1)[:, -memory:]
        before = torch.where(full, moved, before)
    return Frame(before, now.masked_fill(full, 0), seen + visit.here.sum(1))


def distances(frame: Frame, visit: Visit) -> Int[Tensor, "b c _"]:
    """How far behind each of a visit's tokens the frame's vectors lie; negative is ahead."""
    memory, block = frame.before.shape[1], frame.now.shape[1]
    keys = torch.arange(memory + block, device=visit.place.device)
    return memory + visit.place[..., None] - keys


def filled(frame: Frame) -> Bool[Tensor, "B _"]:
    """Which of the vectors before and of the block there may be; the block's own count as all."""
    memory, block = frame.before.shape[1], frame.now.shape[1]
    keys = torch.arange(memory + block, device=frame.seen.device)
    return keys >= memory - frame.filled[:, None]


def recomputed(run: Callable[..., Any], *given: Any, among: int) -> Any:
    """run(*given), recomputed in the backward pass where it is one of many."""
    if among > MANY and torch.is_grad_enabled():
        return checkpoint(run, *given, use_reentrant=False)
    return run(*given)


class BlockAttention(Mixer):
    """Causal attention to one's own block and the M tokens before it.

        y_i = softmax_j((x_i + P_i) W_q · (x_j + P_j) W_k / √D) x_j W_v W_o

    P is sinusoidal where `infused`, and 0 elsewhere; its positions count from the first vector that
    a block sees, so the M before it have 0 … M − 1 and the block goes on from M, whatever the place
    in the text. The state is the inputs of the last M tokens and of the block begun, detached.

    Args:
        block: C. memory: M.

    Raises:
        LongspanError: no tokens a block, a negative memory, heads that do not divide the width.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        block: int,
        memory: int,
        infused: bool = False,
    ) -> None:
        super().__init__()
        if block < 1 or memory < 0 or width % heads:
            raise LongspanError(
                f"blocks of {block} tokens with {memory} before them, and {heads} heads of width "
                f"{width} together: expected a token or more, 0 or more, and a multiple."
            )
        self.width, self.heads, self.block, self.memory = width, heads, block, memory
        self.infused = infused
        linears = {name: nn.Linear(width, width) for name in "qkv"}
        self.project, self.output = nn.ModuleDict(linears), nn.Linear(width, width)
        for linear in (*linears.values(), self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    @torch.compiler.disable  # the visits of a call depend on its mask
    def forward(
        self,
        x: Inputs,
        state: Frame | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, Frame]:
        x, keep = alone(self, x, keep, context, marks)
        frame = fresh(x, block=self.block, memory=self.memory) if state is None else state
        cut, outs = plan(frame.seen, keep, self.block), []
        for new, visit in zip(cut.split(x), cut.visits, strict=True):
            frame = put(frame, new, visit)
            outs.append(recomputed(self._attend, new, frame, visit, among=len(cut.visits)))
            frame = turn(frame, visit)
            # What an earlier block left takes no gradient, be it of this call or of one before.
            frame = frame._replace(before=frame.before.detach())
        y = self.output(cut.join(outs, x)).masked_fill(~keep[..., None], 0)
        return y, frame._replace(now=frame.now.detach())

    def _attend(self, x: Inputs, frame: Frame, visit: Visit) -> Inputs:
        whole = torch.cat([frame.before, frame.now], 1)
        far = distances(frame, visit)
        asking = telling = 0
        if self.infused:
            first = self.memory - frame.filled[:, None]
            at = torch.arange(whole.shape[1], device=x.device) - first
            wide = torch.promote_types(x.dtype, torch.float32)
            here = self.memory + visit.place - first
            asking = sinusoid(here, self.width, dtype=wide).to(x.dtype)
            telling = sinusoid(at.clamp(min=0), self.width, dtype=wide).to(x.dtype)
        q, k, v = (
            rearrange(self.project[name](t), "B L (H D) -> B H L D", H=self.heads)
            for name, t in (("q", x + asking), ("k", whole + telling), ("v", whole))
        )
        seen = (far >= 0) & filled(frame)[:, None]
        o, _, _ = dense.explicit(q, k, v, seen=seen[:, None])
        return rearrange(o, "B H L V -> B L (H V)")


def alone(
    mixer: Mixer, x: Inputs, keep: Keep | None, context: Context | None, marks: Marks | None
) -> tuple[Inputs, Keep]:
    """x with 0 where it is masked, and its mask.

    Raises:
        LongspanError: a context or marks, which a mixer with a memory of its own cannot take.
    """
    if context is not None or marks is not None:
        raise LongspanError(
            f"{type(mixer).__name__} reads what it remembers: give it no context and no marks."
        )
    if keep is None:
        return x, x.new_ones(x.shape[:2], dtype=torch.bool)
    return x.masked_fill(~keep[..., None], 0), keep
