"""Controls of a bounded memory: into which of M slots each token is written, and how much."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longspan.engines import lowrank
from longspan.errors import LongspanError
from longspan.nn import kmeans
from longspan.shapes import Keep, Keys

NAMES = ("mlp", "linformer", "random", "cluster", "window", "compressive", "prefix")
Places = Int[Tensor, "B S"]
Writes = Float[Tensor, "#B #H S M"]

# Between the exponents of two writes to one slot, the later of which erases the earlier.
ERASE = 1000.0


class Control(nn.Module):
    """(keys, what controls see, places) → the writes of each token to each slot.

    Where it `averages`, slot m holds Σ_s exp(w_s[m]) u_s / Σ_s exp(w_s[m]) of what is written, and
    −inf writes nothing; else it holds Σ_s w_s[m] u_s. Places count kept tokens; what is written of
    the others is ignored.

    Attributes:
        slots: M.
        recurrent: what a slot shows depends on the place of the query, so that there is no
            bidirectional form.
    """

    averages: ClassVar[bool] = True
    recurrent: ClassVar[bool] = False

    def __init__(self, slots: int) -> None:
        super().__init__()
        if slots < 1:
            raise LongspanError(f"a memory of {slots} slots was asked for: give at least 1.")
        self.slots = slots

    def forward(
        self, k: Keys, c: Float[Tensor, "B H S _"], place: Places, *, keep: Keep | None = None
    ) -> Writes:
        raise NotImplementedError(f"{type(self).__name__} says not where tokens are written.")

    def visible(self, place: Int[Tensor, "B L"]) -> Bool[Tensor, "B 1 L M"] | None:
        """The slots that a query at this place may read; None for all that were written."""
        return None


class Learned(Control):
    """w_s = W c_s, a matrix a head: each slot pools the tokens by a learned query."""

    def __init__(self, slots: int, *, heads: int, width: int) -> None:
        super().__init__(slots)
        self.weight = nn.Parameter(torch.randn(heads, slots, width) * width**-0.5)

    def forward(
        self, k: Keys, c: Float[Tensor, "B H S _"], place: Places, *, keep: Keep | None = None
    ) -> Writes:
        if (c.shape[1], c.shape[3]) != (self.weight.shape[0], self.weight.shape[2]):
            raise LongspanError(
                f"the control was built for {self.weight.shape[0]} heads of width "
                f"{self.weight.shape[2]} and got {c.shape[1]} of {c.shape[3]}: build it for these."
            )
        wide = torch.promote_types(c.dtype, torch.float32)
        with torch.autocast(c.device.type, enabled=False):
            return c.to(wide) @ self.weight.to(wide).mT


class Positional(Control):
    """Column `place` of a learned matrix, heads (or 1) × M × length, summed and not averaged."""

    averages = False

    def __init__(self, slots: int, *, length: int, heads: int = 1) -> None:
        super().__init__(slots)
        self.weight = nn.Parameter(torch.empty(heads, slots, length))
        for weight in self.weight:
            nn.init.xavier_uniform_(weight.data)

    def forward(
        self, k: Keys, c: Float[Tensor, "B H S _"], place: Places, *, keep: Keep | None = None
    ) -> Writes:
        length = self.weight.shape[2]
        if place.numel() and int(place.max()) >= length:
            raise LongspanError(
                f"the control was built for at most {length} tokens and got {int(place.max()) + 1}:"
                f" build it with length={int(place.max()) + 1}, or shorten the input."
            )
        return self.weight.mT[:, place].transpose(0, 1)


class Assigned(Control):
    """Token s belongs to slot table[s mod T], which holds the mean of its tokens."""

    table: Tensor

    def __init__(self, slots: int, *, table: Int[Tensor, "T"]) -> None:
        super().__init__(slots)
        if not len(table) or int(table.min()) < 0 or int(table.max()) >= slots:
            raise LongspanError(f"a table of slots holds numbers from 0 to {slots - 1} only.")
        self.register_buffer("table", table)

    def forward(
        self, k: Keys, c: Float[Tensor, "B H S _"], place: Places, *, keep: Keep | None = None
    ) -> Writes:
        return _one_slot(self.table[place % len(self.table)][:, None], self.slots)


class Random(Assigned):
    """A uniformly drawn slot for each of `length` places, over and over."""

    def __init__(self, slots: int, *, length: int, seed: int = 0) -> None:
        drawn = torch.randint(
            max(slots, 1), (length,), generator=torch.Generator().manual_seed(seed)
        )
        super().__init__(slots, table=drawn)


class First(Control):
    """The first M tokens, a slot each."""

    def forward(
        self, k: Keys, c: Float[Tensor, "B H S _"], place: Places, *, keep: Keep | None = None
    ) -> Writes:
        return _one_slot(place[:, None], self.slots)


class Clustered(Control):
    """The mean of each cluster of keys.

    Causally the clusters are those of `kmeans.Centroids`, which follow the keys from one training
    call to the next, so that no token's cluster depends on a later one. Otherwise each sequence
    has its own, found in `rounds` of k-means from the means of contiguous segments.
    """

    def __init__(
        self, slots: int, *, causal: bool, heads: int, width: int, rounds: int = 3, seed: int = 0
    ) -> None:
        super().__init__(slots)
        self.rounds = rounds
        self.means = kmeans.Centroids(heads, slots, width, seed=seed) if causal else None

    @torch.no_grad()
    def forward(
        self, k: Keys, c: Float[Tensor, "B H S _"], place: Places, *, keep: Keep | None = None
    ) -> Writes:
        if self.means is not None:
            x = kmeans.on_sphere(k)
            return _one_slot(kmeans.nearest(x, self.means([x], [keep])), self.slots)
        centres, size = lowrank.segment_means(k, self.slots, keep)
        filled = size[:, None].expand(-1, k.shape[1], -1) > 0  # B H M
        for round_ in range(self.rounds + 1):
            away = (centres * centres).sum(-1)[:, :, None] - 2 * k @ centres.mT
            code = away.masked_fill(~filled[:, :, None], torch.inf).argmin(-1)
            if round_ < self.rounds:
                member = F.one_hot(code, self.slots).to(k.dtype)
                member = member if keep is None else member * keep[:, None, :, None]
                count = member.sum(2)[..., None]
                centres = torch.where(count > 0, member.mT @ k / count.clamp(min=1), centres)
        return _one_slot(code, self.slots)


class Window(Control):
    """The last M tokens, first in, first out; dilated, M of them `dilation` apart.

    Args:
        start: tokens at the beginning that it passes over.
    """

    recurrent = True

    def __init__(self, slots: int, *, dilation: int = 1, start: int = 0) -> None:
        super().__init__(slots * dilation)
        self.dilation, self.start = dilation, start

    def forward(
        self, k: Keys, c: Float[Tensor, "B H S _"], place: Places, *, keep: Keep | None = None
    ) -> Writes:
        return _in_turn(place - self.start, self.slots)[:, None]

    def visible(self, place: Int[Tensor, "B L"]) -> Bool[Tensor, "B 1 L M"] | None:
        if self.dilation == 1:
            return None
        return (_age(place - self.start, self.slots) % self.dilation == 0)[:, None]


class Compressed(Control):
    """The last tokens, and before them means of `rate` tokens each.

    Tokens leave the window `rate` at a time, as a mean, so that each is seen in one way always.

    Args:
        recent: the fewest tokens in the window once it is full.
        pooled: how many means are kept.
        start: tokens at the beginning that it passes over.
    """

    recurrent = True

    def __init__(self, recent: int, pooled: int, *, rate: int = 4, start: int = 0) -> None:
        self.ring = recent + rate - 1
        # Means are written as their tokens come, before they are shown.
        self.means = pooled + (self.ring - 1) // max(rate, 1) + 1
        super().__init__(self.ring + self.means)
        if min(recent, pooled, rate) < 1:
            raise LongspanError(
                f"a compressed memory got recent={recent}, pooled={pooled}, rate={rate}: "
                "expected at least 1."
            )
        self.recent, self.pooled, self.rate, self.start = recent, pooled, rate, start

    def forward(
        self, k: Keys, c: Float[Tensor, "B H S _"], place: Places, *, keep: Keep | None = None
    ) -> Writes:
        place = place - self.start
        chunk = place.div(self.rate, rounding_mode="floor")
        return torch.cat([_in_turn(place, self.ring), _in_turn(chunk, self.means)], -1)[:, None]

    def visible(self, place: Int[Tensor, "B L"]) -> Bool[Tensor, "B 1 L M"] | None:
        place = place - self.start
        left = (place + 1 - self.recent).clamp(min=0) // self.rate  # chunks that left the window
        here = place[..., None] - _age(place, self.ring) >= left[..., None] * self.rate
        chunk = place.div(self.rate, rounding_mode="floor")
        behind = left[..., None] - chunk[..., None] + _age(chunk, self.means)
        return torch.cat([here, (behind > 0) & (behind <= self.pooled)], -1)[:, None]


def named(
    name: str,
    slots: int,
    *,
    causal: bool,
    heads: int | None,
    width: int | None,
    length: int,
    dilation: int,
    rate: int,
    seed: int,
    start: int,
) -> Control:
    """A control by its name; `compressive` is a window of half the slots, and means.

    Raises:
        LongspanError: an unknown name, or heads or widths that it needs and did not get.
    """
    match name:
        case "linformer":
            return Positional(slots, length=length)
        case "random":
            return Random(slots, length=length, seed=seed)
        case "window":
            return Window(slots, dilation=dilation, start=start)
        case "compressive":
            return Compressed(slots - slots // 2, slots // 2, rate=rate, start=start)
        case "prefix":
            return First(slots)
    if name not in NAMES:
        raise LongspanError(f"no control '{name}'; expected {', '.join(NAMES)}.")
    if heads is None or width is None:
        raise LongspanError(f"the control '{name}' needs heads and head_width: give them.")
    if name == "mlp":
        return Learned(slots, heads=heads, width=width)
    return Clustered(slots, causal=causal, heads=heads, width=width, seed=seed)


def _one_slot(slot: Int[Tensor, "*shape"], slots: int) -> Float[Tensor, "*shape M"]:
    """Exponents that write to one slot; to none where the slot is out of range."""
    here = torch.arange(slots, device=slot.device) == slot[..., None]
    return torch.zeros(here.shape, device=slot.device).masked_fill(~here, -torch.inf)


def _in_turn(place: Int[Tensor, "B S"], slots: int) -> Float[Tensor, "B S M"]:
    """Exponents that write to one slot after the other, erasing what it held."""
    turn = place.div(slots, rounding_mode="floor")[..., None] * ERASE
    return _one_slot(torch.where(place < 0, -1, place % slots), slots) + turn


def _age(place: Int[Tensor, "B L"], slots: int) -> Int[Tensor, "B L M"]:
    """How long before `place` each slot of a ring was written last."""
    return (place[..., None] - torch.arange(slots, device=place.device)) % slots
