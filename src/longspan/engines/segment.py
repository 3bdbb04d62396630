"""What is kept between segments: queues of vectors, with the mask of what may be seen.

Rows of a batch need not be alike: each counts its own kept tokens (`pack`), fills its segments in
its own time (`rest`), and its memory changes only when its own segment is full (`renew`).
"""

from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Kept = TypeVar("Kept", bound=tuple)


class Queue(NamedTuple):
    """The newest vectors, oldest first, and which of them may be seen."""

    items: Float[Tensor, "B M E"]
    keep: Bool[Tensor, "B M"]


def empty(like: Float[Tensor, "B L E"], slots: int = 0) -> Queue:
    """A queue that holds nothing: it takes no weight, as a zero vector would."""
    batch, _, width = like.shape
    return Queue(
        like.new_zeros(batch, slots, width), like.new_zeros(batch, slots, dtype=torch.bool)
    )


def push(
    queue: Queue,
    x: Float[Tensor, "B L E"],
    keep: Bool[Tensor, "B L"],
    *,
    capacity: int,
    gradient: bool = False,
) -> Queue:
    """The queue with x behind it, cut to the newest `capacity`, detached unless `gradient`."""
    x = x if gradient else x.detach()
    items, seen = torch.cat([queue.items, x], 1), torch.cat([queue.keep, keep], 1)
    start = max(items.shape[1] - capacity, 0)
    return Queue(items[:, start:], seen[:, start:])


def resize(queue: Queue, capacity: int) -> Queue:
    """The newest `capacity`, behind empty slots where there are fewer."""
    more = capacity - queue.items.shape[1]  # negative: cut off
    return Queue(F.pad(queue.items, (0, 0, more, 0)), F.pad(queue.keep, (more, 0)))


def pack(
    x: Float[Tensor, "B L E"], keep: Bool[Tensor, "B L"]
) -> tuple[Float[Tensor, "B T E"], Int[Tensor, "B"], Int[Tensor, "B L"]]:
    """The kept tokens of each row from the left, zeros behind; how many; where each token went."""
    counts, places = keep.sum(1), keep.cumsum(1) - 1
    if bool(keep.all()):
        return x, counts, places
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(counts.max())]
    rows = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
    beyond = torch.arange(rows.shape[1], device=x.device) >= counts[:, None]
    return rows.masked_fill(beyond[..., None], 0), counts, places


def unpack(
    rows: Float[Tensor, "B T E"], places: Int[Tensor, "B L"], keep: Bool[Tensor, "B L"]
) -> Float[Tensor, "B L E"]:
    """Each token's vector from where `pack` put it; 0 for those not kept."""
    if not rows.shape[1]:
        return rows.new_zeros(*places.shape, rows.shape[2])
    index = places.clamp(0, rows.shape[1] - 1)[..., None].expand(-1, -1, rows.shape[2])
    return rows.gather(1, index).masked_fill(~keep[..., None], 0)


def rest(
    rows: Float[Tensor, "B T E"], counts: Int[Tensor, "B"], size: int
) -> tuple[Float[Tensor, "B C E"], Int[Tensor, "B"]]:
    """What follows each row's last full segment of `size`, and how many these are."""
    left = counts % size
    here = torch.arange(int(left.max()), device=rows.device)
    return unpack(rows, (counts - left)[:, None] + here, here < left[:, None]), left


def renew(rows: Bool[Tensor, "B"], new: Kept, old: Kept) -> Kept:
    """`new` for the rows that are True and `old` for the others, tensor by tensor.

    Where one has fewer slots, empty ones are put before them.
    """
    return new if bool(rows.all()) else _renewed(rows, new, old)


def _renewed(rows: Tensor, new: Any, old: Any) -> Any:
    if new is None:
        return None
    if isinstance(new, tuple):
        return type(new)(*(_renewed(rows, a, b) for a, b in zip(new, old, strict=True)))
    shape = [max(a, b) for a, b in zip(new.shape, old.shape, strict=True)]
    new, old = (
        F.pad(t, [n for a, b in zip(shape[::-1], t.shape[::-1], strict=True) for n in (a - b, 0)])
        for t in (new, old)
    )
    return torch.where(rows.view(-1, *(1,) * (new.dim() - 1)), new, old)


def pool(
    x: Float[Tensor, "B L E"], rate: int, kind: Literal["mean", "max"]
) -> Float[Tensor, "B N E"]:
    """The mean or the largest of each `rate` vectors side by side, channel by channel."""
    groups = x.unflatten(1, (-1, rate))
    return groups.mean(2) if kind == "mean" else groups.amax(2)


def select(
    x: Float[Tensor, "B L E"], score: Float[Tensor, "B L"], count: int
) -> tuple[Float[Tensor, "B N E"], Int[Tensor, "B N"]]:
    """The `count` vectors of the highest score, in their order; of equal ones the later."""
    # A stable sort of the reversed row: among equals, the later comes first.
    last = x.shape[1] - 1
    order = last - score.flip(1).argsort(dim=1, descending=True, stable=True)
    at = order[:, :count].sort(dim=1).values
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[2])), at
