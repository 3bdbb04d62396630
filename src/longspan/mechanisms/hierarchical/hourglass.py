"""Hourglass (Nawrot et al., 2021): shortening and lengthening of a causal sequence."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import pool
from longspan.errors import LongspanError
from longspan.nn.lengths import Length, Shorter, ShorterKeep
from longspan.nn.relative import Places, RelativeBlock, RelativeState, Source
from longspan.registry import mechanism
from longspan.shapes import Inputs, Keep

Shortening = Literal["average", "linear", "attention"]
Lengthening = Literal["repeat", "linear", "attention"]


class HourglassState(NamedTuple):
    """The last s − 1 tokens, what the last group gives its tokens, how many tokens were seen.

    With attention, also every key and value of the tokens, and of the groups.
    """

    before: Float[Tensor, "B P E"]
    last: Float[Tensor, "B C E"]
    seen: Int[Tensor, "B"]
    down: RelativeState | None
    up: RelativeState | None


class Plan(NamedTuple):
    """What `lengthen` needs of `shorten`: masks and places of tokens and groups, and the state."""

    keep: Keep | None
    groups: Keep | None
    at: Places
    at_groups: Places
    place: pool.Place | None
    before: Tensor | None
    down: RelativeState | None
    state: HourglassState | None


@mechanism(
    Card(
        id="hourglass",
        name="Hourglass",
        kind="length",
        family="hierarchical",
        paper="Hierarchical Transformers Are More Efficient Language Models",
        cite="Nawrot et al., 2021",
        link="https://arxiv.org/abs/2110.13711",
        what="Layers in the middle of a stack see a sequence several times shorter, shifted so "
        "that no token sees its own group's future.",
        modes={"bidirectional", "causal", "step"},
        time="L*S*E + L*E*E",
        memory="S*E",
        tiny={"width": 24, "heads": 3, "factor": 3},
        exact={"width": 24, "factor": 1, "shorten": "average", "lengthen": "repeat"},
    )
)
class Hourglass(Length):
    """x' = Shorten(ShiftRight(x, s − 1)) and u = Upsample(x, y') (Sec. 2).

    Group g holds the tokens gs − s + 1 … gs, zero vectors before the first; the tokens gs … gs + s
    − 1 get what was made of it. Bidirectionally nothing is shifted and the last group is filled
    with zeros. With S the groups' mean,

        attention down:  x' = S + Attn(S, x), then + FFN,   up:  u = U + Attn(U, y'), then + FFN,

    U = x + linear(y'), distances in tokens of the whole model, causal by place: a group sees the
    tokens up to its last, a token the groups that are complete. The model: `models.hourglass`.

    Args:
        factor: s. shorten: the mean, one matrix s E × E, or attention.
        lengthen: copies, one matrix E × s E, or attention.
        unit: tokens of the whole model that one of x stands for.

    Raises:
        LongspanError: a factor or a unit below 1; an unknown way to shorten or lengthen.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int = 8,
        factor: int = 4,
        causal: bool = False,
        shorten: Shortening = "attention",
        lengthen: Lengthening = "attention",
        inner: int | None = None,
        dropout: float = 0.0,
        unit: int = 1,
    ) -> None:
        super().__init__(factor=factor, causal=causal)
        if min(factor, unit) < 1:
            raise LongspanError(f"hourglass got factor={factor}, unit={unit}: give at least 1.")
        for way, known in ((shorten, Shortening), (lengthen, Lengthening)):
            if way not in get_args(known):
                raise LongspanError(
                    f"hourglass has no way '{way}'; expected {', '.join(get_args(known))}."
                )
        self.unit = unit
        options: Any = {"width": width, "heads": heads, "inner": inner, "causal": causal}
        options |= {"dropout": dropout, "across": True}
        self.pool = nn.Linear(factor * width, width) if shorten == "linear" else None
        self.unpool = nn.Linear(width, factor * width) if lengthen != "repeat" else None
        self.down = RelativeBlock(**options) if shorten == "attention" else None
        self.up = RelativeBlock(**options) if lengthen == "attention" else None

    def shorten(
        self, x: Inputs, state: HourglassState | None = None, *, keep: Keep | None = None
    ) -> tuple[Shorter, ShorterKeep | None, Plan]:
        factor, unit, (batch, length, width) = self.factor, self.unit, x.shape
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
        whole = torch.full((batch,), length, device=x.device)
        new = whole if keep is None else keep.sum(1)
        at: Places = range(0, length * unit, unit)
        place = before = has = None
        if self.causal:
            seen = torch.zeros_like(new) if state is None else state.seen
            place = pool.place(seen, new, factor)
            before = x.new_zeros(batch, factor - 1, width) if state is None else state.before
            found, has, before = pool.completed(before, x, place, factor)
            first = seen + place.first
        else:
            found = pool.windows(x, -(-length // factor), factor, factor)
            if keep is not None:
                has = torch.arange(found.shape[1], device=x.device) * factor < new[:, None]
        count = found.shape[1]
        at_groups: Places = range(0, count * factor * unit, factor * unit)
        if state is not None and place is not None:
            steps = (torch.arange(n, device=x.device) for n in (length, count))
            at, at_groups = (
                (start[:, None] + step * n) * unit
                for start, step, n in zip((state.seen, first), (1, factor), steps, strict=True)
            )
        y = found.mean(2) if self.pool is None else self.pool(found.flatten(2))
        down = state and state.down
        if self.down is not None:
            shift = range(-(factor - 1) * unit if self.causal else 0, 0, unit)
            lead = x.new_zeros(batch, len(shift), width)
            y, down = self.down(y, at_groups, down, source=Source(x, at, keep, lead, shift))
        has = None if has is None or bool(has.all()) else has
        y = y if has is None else y.masked_fill(~has[..., None], 0)
        return y, has, Plan(keep, has, at, at_groups, place, before, down, state)

    def lengthen(self, y: Shorter, x: Inputs, plan: Plan) -> tuple[Inputs, HourglassState | None]:
        factor, state = self.factor, plan.state
        parts = y[:, :, None].expand(-1, -1, factor, -1)
        if self.unpool is not None:
            parts = self.unpool(y).unflatten(2, (factor, -1))
        if plan.place is not None:
            last = parts.new_zeros(len(y), factor, y.shape[2]) if state is None else state.last
            parts = torch.cat([last[:, None].to(parts.dtype), parts], 1)
        u, up = pool.spread(parts, x.shape[1], plan.place), state and state.up
        if self.up is not None:
            x = x if plan.keep is None else x.masked_fill(~plan.keep[..., None], 0)
            source = Source(y, plan.at_groups, plan.groups)
            u, up = self.up(x + u, plan.at, up, source=source)
        if plan.keep is not None:
            u = u.masked_fill(~plan.keep[..., None], 0)
        if plan.place is None or plan.before is None:
            return u, None
        place = plan.place
        last = pool.rows(parts, place.groups[:, None])[:, 0]
        return u, HourglassState(plan.before, last, place.seen + place.new, plan.down, up)
