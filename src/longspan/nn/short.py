"""What stands around a short convolution along one sequence."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from longspan.shapes import Inputs, Keep


class Last(NamedTuple):
    """The last inputs of a convolution, one less than its taps, and which of them were tokens."""

    inputs: Float[Tensor, "B P E"]
    seen: Bool[Tensor, "B P"]


def around(
    u: Inputs, keep: Keep | None, state: Last | None, *, taps: int, causal: bool
) -> tuple[Float[Tensor, "B T E"], Bool[Tensor, "B T"], Last | None]:
    """All inputs that so many taps meet, which of them are tokens, and causally the state after.

    Others than tokens are 0. Causally the last tap is the token itself; centred, an even number
    reaches one further to the left.
    """
    length, seen = u.shape[1], u.new_ones(u.shape[:2], dtype=torch.bool) if keep is None else keep
    u = u if keep is None else u.masked_fill(~keep[..., None], 0)
    before = taps - 1 if causal else taps // 2
    after = taps - 1 - before
    if state is None:
        u, seen = F.pad(u, (0, 0, before, after)), F.pad(seen, (before, after))
    else:
        u = torch.cat([state.inputs.to(u.dtype), u], 1)
        seen = torch.cat([state.seen, seen], 1)
    return u, seen, Last(u[:, length:], seen[:, length:]) if causal else None


def normalised(
    scores: Float[Tensor, "*shape K"], seen: Bool[Tensor, "B T"] | None = None
) -> Float[Tensor, "*_ K"]:
    """The softmax over taps; where `seen` is given, over those alone that meet a token."""
    if seen is None:
        return scores.softmax(-1)
    outside = ~seen.unfold(1, scores.shape[-1], 1)[:, :, None]  # B L 1 K
    least = torch.finfo(scores.dtype).min
    return scores.masked_fill(outside, least).softmax(-1).masked_fill(outside, 0)
