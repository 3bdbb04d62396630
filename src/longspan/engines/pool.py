"""Shortening and lengthening: runs of tokens become groups, and groups are spread over tokens.

Rows hold their kept tokens first (`align`). A causal group ends with the token that completes it,
so that nobody sees a group before its last token; rows may stand at different places within theirs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from longspan.shapes import Keep


class Place(NamedTuple):
    """Where the tokens of one call stand among the groups of their rows.

    `seen` tokens came before and `new` come now; the token `first` of these completes the first of
    `groups` new groups.
    """

    seen: Int[Tensor, "B"]
    new: Int[Tensor, "B"]
    first: Int[Tensor, "B"]
    groups: Int[Tensor, "B"]


def place(seen: Int[Tensor, "B"], new: Int[Tensor, "B"], stride: int, *, last: int = 0) -> Place:
    """Groups are completed by the tokens whose place modulo `stride` is `last`.

    >>> place(torch.tensor([1]), torch.tensor([6]), 3).groups  # the tokens 3 and 6
    tensor([2])
    """
    first = (last - seen) % stride
    groups = (new - first + stride - 1).div(stride, rounding_mode="floor").clamp(min=0)
    return Place(seen, new, first, groups)


def rows(x: Shaped[Tensor, "B S *E"], index: Int[Tensor, "B *L"]) -> Shaped[Tensor, "B ..."]:
    """x[b, index[b]] for every row; indices past the end take the last token."""
    batch, tokens = x.shape[:2]
    if not tokens:
        return x.new_zeros(*index.shape, *x.shape[2:])
    start = torch.arange(batch, device=x.device).view(-1, *(1,) * (index.dim() - 1)) * tokens
    flat = x.flatten(0, 1).index_select(0, (start + index.clamp(0, tokens - 1)).flatten())
    return flat.view(*index.shape, *x.shape[2:])


def align(keep: Keep) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]]:
    """Orders for `rows`: kept tokens first, and back again."""
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
    return order, order.argsort(1)


def windows(
    x: Float[Tensor, "B L E"], count: int, size: int, stride: int
) -> Float[Tensor, "B N C E"]:
    """`count` windows of `size` tokens, `stride` apart, zeros behind the end."""
    short = (count - 1) * stride + size - x.shape[1]
    x = F.pad(x, (0, 0, 0, max(short, 0)))
    return x.unfold(1, size, stride)[:, :count].transpose(2, 3)


def completed(
    before: Float[Tensor, "B P E"], x: Float[Tensor, "B L E"], at: Place, stride: int
) -> tuple[Float[Tensor, "B N C E"], Bool[Tensor, "B N"], Float[Tensor, "B P E"]]:
    """The groups that this call completes, which of them each row has, and the tokens to keep.

    Args:
        before: the C − 1 tokens before the call, zeros where there are none.
    """
    size = before.shape[1] + 1
    z = torch.cat([before.to(x.dtype), x], 1)
    count = int(at.groups.max()) if len(x) else 0
    number = torch.arange(count, device=x.device)
    within = torch.arange(size, device=x.device)
    found = rows(z, at.first[:, None, None] + stride * number[:, None] + within)
    has = number < at.groups[:, None]
    left = rows(z, at.new[:, None] + within[:-1])
    return found.masked_fill(~has[:, :, None, None], 0), has, left


def spread(
    groups: Float[Tensor, "B N C E"], length: int, at: Place | None = None
) -> Float[Tensor, "B L E"]:
    """The token at place p gets element p mod C of its group, p div C.

    Args:
        at: where the tokens stand; `groups` then starts with the last one before this call.
    """
    size = groups.shape[2]
    if at is None:
        return groups.flatten(1, 2)[:, :length]
    where = at.seen[:, None] + torch.arange(length, device=groups.device)
    earlier = (at.seen + size - 1).div(size, rounding_mode="floor") - 1
    return rows(groups.flatten(1, 2), where - earlier[:, None] * size)
