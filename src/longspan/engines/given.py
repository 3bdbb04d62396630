"""Attention whose weights come from elsewhere, and keys and values that grow."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from longspan.shapes import Keep, Keys, Outputs, Values


class Past(NamedTuple):
    """Every key and value so far, zeros where masked, and which of them may be seen.

    Who needs no keys carries some of width 0.
    """

    k: Float[Tensor, "B H S D"]
    v: Float[Tensor, "B H S V"]
    keep: Bool[Tensor, "B S"]


class Lent(NamedTuple):
    """The weights of this call, lent from layer to layer, and what one layer carries on."""

    weights: Float[Tensor, "B H L S"] | None
    own: Any


def extended(state: Past | None, k: Keys, v: Values, keep: Keep | None) -> Past:
    """The past with the keys and values of one more call behind it; masked ones may be NaN."""
    if keep is None:
        keep = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    else:
        k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
    if state is None:
        return Past(k, v, keep)
    new = zip(state, (k, v, keep), (2, 2, 1), strict=True)
    return Past(*(torch.cat([old, more], axis) for old, more, axis in new))


def mix(weights: Float[Tensor, "B H L S"], v: Values) -> Outputs:
    """o = A v in the dtype of the weights or wider, returned in that of v."""
    wide = torch.promote_types(weights.dtype, v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        return (weights.to(wide) @ v.to(wide)).to(v.dtype)
