"""Hourglass (Nawrot et al., 2021): shortening and lengthening of a causal sequence."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import pool
from longspan.errors import LongspanError
from longspan.nn.lengths import Grid, Length, Line, Shorter, ShorterKeep
from longspan.nn.relative import Places, RelativeBlock, RelativeState, Source
from longspan.registry import mechanism
from longspan.shapes import Inputs, Keep

Shortening = Literal["average", "linear", "attention"]
Lengthening = Literal["repeat", "linear", "attention"]


class HourglassState(NamedTuple):
    """The last s − 1 tokens, what the last groups give their tokens, how many tokens were seen.

    With attention, also every key and value of the tokens, and of the groups.
    """

    before: Float[Tensor, "B P E"]
    last: Float[Tensor, "B O C E"]
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
    with zeros. In two dimensions, which the paper has not, the tokens fill a grid of `columns` row
    by row, and both axes are shifted (`nn.lengths.Grid`). With S the groups' mean,

        attention down:  x' = S + Attn(S, x), then + FFN,   up:  u = U + Attn(U, y'), then + FFN,

    U = x + linear(y'), distances in tokens of the whole model, causal by place: a group sees the
    tokens up to its last, a token the groups that are complete. The model: `models.hourglass`.

    Args:
        factor: s; of rows and of columns in two dimensions, where one number is both.
        columns: of the grid; None for one dimension.
        shorten: the mean, one matrix s E × E, or attention.
        lengthen: copies, one matrix E × s E, or attention.
        unit: tokens of the whole model that one of x stands for, by axis in two dimensions.

    Raises:
        LongspanError: a factor, unit or columns below 1; two of them without columns; an unknown
            way to shorten or lengthen.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int = 8,
        factor: int | Sequence[int] = 4,
        columns: int | None = None,
        causal: bool = False,
        shorten: Shortening = "attention",
        lengthen: Lengthening = "attention",
        inner: int | None = None,
        dropout: float = 0.0,
        unit: int | Sequence[int] = 1,
    ) -> None:
        groups = _groups(factor, unit, columns)
        super().__init__(factor=groups.size, causal=causal)
        for way, known in ((shorten, Shortening), (lengthen, Lengthening)):
            if way not in get_args(known):
                raise LongspanError(
                    f"hourglass has no way '{way}'; expected {', '.join(get_args(known))}."
                )
        self.groups = groups
        options: Any = {"width": width, "heads": heads, "inner": inner, "causal": causal}
        options |= {"dropout": dropout, "across": True}
        self.pool = nn.Linear(groups.size * width, width) if shorten == "linear" else None
        self.unpool = nn.Linear(width, groups.size * width) if lengthen != "repeat" else None
        self.down = RelativeBlock(**options) if shorten == "attention" else None
        self.up = RelativeBlock(**options) if lengthen == "attention" else None

    def shorten(
        self, x: Inputs, state: HourglassState | None = None, *, keep: Keep | None = None
    ) -> tuple[Shorter, ShorterKeep | None, Plan]:
        groups, (batch, length, width) = self.groups, x.shape
        new = None
        if keep is not None:
            x, new = x.masked_fill(~keep[..., None], 0), keep.sum(1)
        seen = None if state is None else state.seen
        at = groups.at(x, seen)
        if self.causal:
            new = torch.full((batch,), length, device=x.device) if new is None else new
            before = x.new_zeros(batch, groups.behind, width) if state is None else state.before
            made = groups.completed(before, x, seen, new)
        else:
            made = groups.cut(x, new)
        found, has, at_groups, place, before = made
        y = found.mean(2) if self.pool is None else self.pool(found.flatten(2))
        down = state and state.down
        if self.down is not None:
            shift = groups.lead if self.causal else range(0)
            lead = x.new_zeros(batch, len(shift), width)
            y, down = self.down(y, at_groups, down, source=Source(x, at, keep, lead, shift))
        has = None if has is None or bool(has.all()) else has
        y = y if has is None else y.masked_fill(~has[..., None], 0)
        return y, has, Plan(keep, has, at, at_groups, place, before, down, state)

    def lengthen(self, y: Shorter, x: Inputs, plan: Plan) -> tuple[Inputs, HourglassState | None]:
        factor, groups, state = self.factor, self.groups, plan.state
        parts = y[:, :, None].expand(-1, -1, factor, -1)
        if self.unpool is not None:
            parts = self.unpool(y).unflatten(2, (factor, -1))
        if plan.place is not None:
            nothing = parts.new_zeros(len(y), groups.open, factor, y.shape[2])
            last = nothing if state is None else state.last.to(parts.dtype)
            parts = torch.cat([last, parts], 1)
        u, up = groups.spread(parts, x.shape[1], plan.place), state and state.up
        if self.up is not None:
            x = x if plan.keep is None else x.masked_fill(~plan.keep[..., None], 0)
            source = Source(y, plan.at_groups, plan.groups)
            u, up = self.up(x + u, plan.at, up, source=source)
        if plan.keep is not None:
            u = u.masked_fill(~plan.keep[..., None], 0)
        if plan.place is None or plan.before is None:
            return u, None
        place = plan.place
        ends = place.groups[:, None] + torch.arange(groups.open, device=x.device)
        last = pool.rows(parts, ends)
        return u, HourglassState(plan.before, last, place.seen + place.new, plan.down, up)


def _groups(
    factor: int | Sequence[int], unit: int | Sequence[int], columns: int | None
) -> Line | Grid:
    sizes, units = ((n, n) if isinstance(n, int) else tuple(n) for n in (factor, unit))
    lone = isinstance(factor, int) and isinstance(unit, int)
    pairs = len(sizes) == len(units) == 2 and (lone or columns is not None)
    if not pairs or min(*sizes, *units, 1 if columns is None else columns) < 1:
        raise LongspanError(
            f"hourglass got factor={factor}, unit={unit}, columns={columns}: give at least 1, and "
            "with columns one number or two, of rows and of columns."
        )
    if columns is None:
        return Line(sizes[0], unit=units[0])
    return Grid((sizes[0], sizes[1]), columns=columns, unit=(units[0], units[1]))
