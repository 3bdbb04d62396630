"""What is trained for each distance: vectors, and T5's bias at distances given one by one."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def vectors(
    rows: int, width: int, *, heads: int, shared: bool, std: float
) -> Float[nn.Parameter, "_ {rows} {width}"]:
    """A normally drawn vector for each of so many distances, of each head or one for all."""
    return nn.Parameter(nn.init.normal_(torch.empty(1 if shared else heads, rows, width), std=std))


class DistanceBias(nn.Module):
    """A number a head for each bucket of the distance i − j ≥ 0 (Raffel et al., 2020, Sec. 2.1).

    Half of the buckets are for one distance each, the others widen geometrically up to `distance`;
    the last takes all beyond.
    """

    def __init__(self, heads: int, *, buckets: int = 32, distance: int = 128) -> None:
        super().__init__()
        self.table = nn.Embedding(buckets, heads)
        nn.init.zeros_(self.table.weight)
        exact = buckets // 2
        growth = math.log(distance / exact) / (buckets - exact)
        wide = [math.ceil(exact * math.exp(growth * n) - 1e-6) for n in range(1, buckets - exact)]
        # The least distance of every bucket but the first.
        self.borders = [*range(1, exact + 1), *wide]

    def forward(self, far: Int[Tensor, "b L S"]) -> Float[Tensor, "b H L S"]:
        """The bias at these distances, in float32 at least."""
        borders = torch.tensor(self.borders, device=far.device)
        return self.table(torch.bucketize(far, borders, right=True)).movedim(-1, 1)
