"""Tokens picked, moved by one place, or refused."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from longspan.errors import LongspanError


def reordered(t: Float[Tensor, "B H S D"], order: Int[Tensor, "B R"]) -> Float[Tensor, "B H R D"]:
    """The tokens order[b] of every row b."""
    batch, heads, length, width = t.shape
    row = torch.arange(batch * heads, device=t.device).view(batch, heads, 1) * length
    places = (row + order[:, None]).flatten()
    picked = t.reshape(-1, width).index_select(0, places)
    return picked.view(batch, heads, order.shape[1], width)


def latest(
    t: Float[Tensor, "B H S D"], count: int, unused: Int[Tensor, "B"] | None = None
) -> Float[Tensor, "B H C D"]:
    """The last `count` tokens before each row's `unused` ones; zeros before the first."""
    length = t.shape[2]
    if unused is None:
        return F.pad(t[:, :, max(length - count, 0) :], (0, 0, max(count - length, 0), 0))
    places = torch.arange(count, device=t.device) + length - unused[:, None]
    return reordered(F.pad(t, (0, 0, count, 0)), places)


def shifted(
    x: Float[Tensor, "B L E"], last: Float[Tensor, "B E"] | None
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E"]]:
    """The token before each, `last` (or 0) before the first; and the last token."""
    first = x.new_zeros(len(x), x.shape[2]) if last is None else last.to(x.dtype)
    every = torch.cat([first[:, None], x], 1)
    return every[:, :-1], every[:, -1]


def refuse_others(name: str, context: Any, marks: Any) -> None:
    """Refuse what a recurrence over one sequence cannot take."""
    if context is not None or marks is not None:
        raise LongspanError(
            f"{name} mixes one sequence, all of its tokens alike, and got a context or marks: "
            "leave them out, or use an attention (longspan.find(mode='cross'))."
        )
