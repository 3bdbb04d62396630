"""Turning pairs of channels by angles, and moving weights between layouts of the pairs."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from longspan.errors import LongspanError

Planes = Literal["interleaved", "half-split"]


def check_planes(layout: str) -> None:
    """Refuse a layout other than channels (2c, 2c + 1), or (c, c + D/2)."""
    if layout not in ("interleaved", "half-split"):
        raise LongspanError(f"no layout '{layout}'; expected interleaved or half-split.")


def rotated(width: int, channels: int | None, *, multiple: int = 2) -> int:
    """How many of a head's channels are rotated, by default all.

    Raises:
        LongspanError: more than there are, or no multiple of what a rotation takes.
    """
    channels = width if channels is None else channels
    if channels % multiple or not 0 <= channels <= width:
        raise LongspanError(
            f"rope cannot rotate {channels} of {width} channels: expected a multiple of "
            f"{multiple} up to the width; set channels=."
        )
    return channels


def turn(
    x: Float[Tensor, "B H L D"], angles: Float[Tensor, "#*L planes"], layout: Planes
) -> Float[Tensor, "B H L D"]:
    """The planes of the first channels of x by these angles, computed in the angles' dtype."""
    channels = 2 * angles.shape[-1]
    cos, sin = angles.cos(), angles.sin()
    turned = x[..., :channels].to(angles.dtype)
    if layout == "interleaved":
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), x[..., channels:]], dim=-1)


def relayout(
    weight: Float[Tensor, "HD *E"], *, heads: int, to: Planes, channels: int | None = None
) -> Float[Tensor, "HD *E"]:
    """The q or k projection (weight or bias) of a model of the other layout, for layout `to`.

    Queries and keys then have their rotated channels permuted alike, and scores are unchanged.

    Args:
        heads: of this projection (for grouped keys, the key heads).
        channels: how many of each head are rotated, by default all.

    Raises:
        LongspanError: an unknown layout, heads that do not divide the rows.
    """
    check_planes(to)
    if weight.shape[0] % heads:
        raise LongspanError(f"{weight.shape[0]} rows do not divide into {heads} heads.")
    width = weight.shape[0] // heads
    pairs = torch.arange(rotated(width, channels))
    order = pairs.view(-1, 2).T if to == "half-split" else pairs.view(2, -1).T
    order = torch.cat([order.flatten(), torch.arange(len(pairs), width)])
    return weight.unflatten(0, (heads, width))[:, order.to(weight.device)].flatten(0, 1)
