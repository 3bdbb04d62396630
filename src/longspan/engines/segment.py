"""What is kept between segments: queues of vectors, with the mask of what may be seen."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Queue(NamedTuple):
    """The newest vectors, oldest first, and which of them may be seen."""

    items: Float[Tensor, "B M E"]
    keep: Bool[Tensor, "B M"]


def empty(like: Float[Tensor, "B L E"]) -> Queue:
    """A queue that holds nothing: it takes no weight, as a zero vector would."""
    return Queue(like[:, :0].detach(), like.new_zeros(like.shape[0], 0, dtype=torch.bool))


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
