"""Groups of tokens as one vector each."""

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from longspan.engines import pool
from longspan.nn.lengths import Shorter, ShorterKeep
from longspan.shapes import Inputs, Keep

Pooling = Literal["mean", "max"]


def pooled(
    x: Inputs, index: Int[Tensor, "N C"], keep: Keep | None, *, how: Pooling
) -> tuple[Shorter, ShorterKeep | None]:
    """The mean or the largest of the tokens that each group lists, and which groups may be seen.

    A token listed behind the end is not there. A group may be seen only if all its tokens may be;
    else it is 0.
    """
    index = index.expand(len(x), -1, -1)
    real = index < x.shape[1]  # B N C
    found = pool.rows(x, index)
    if how == "max":
        y = found.masked_fill(~real[..., None], -torch.inf).amax(2)
    else:
        y = (found * real[..., None]).sum(2) / real.sum(2, keepdim=True)
    if keep is None:
        return y, None
    has = (pool.rows(keep, index) | ~real).all(2)
    return y.masked_fill(~has[..., None], 0), has
