"""Soft permutations by Sinkhorn's iteration, and rows moved to the left."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def sinkhorn(
    scores: Float[Tensor, "*X N M"],
    allowed: Bool[Tensor, "*#X N M"] | None = None,
    *,
    iterations: int = 8,
    causal: bool = False,
) -> Float[Tensor, "*X N M"]:
    """exp(scores) brought to row sums of 1, and column sums that agree with each other.

    Rows and columns are normalised in turn, in log space, over the allowed entries; rows come
    last, so that they sum to 1 however few the iterations. A row with nothing allowed is 0. With
    `causal`, a column's sum runs over the rows up to its own, so that no row sees a later one.
    """
    if not scores.numel():
        return scores
    low = -1e30  # −∞ would make the gradients of empty rows NaN
    hide = torch.zeros_like(scores, dtype=torch.bool) if allowed is None else ~allowed
    logs = scores.masked_fill(hide, low)

    def rows(logs: Tensor) -> Tensor:
        return (logs - logs.logsumexp(-1, keepdim=True)).masked_fill(hide, low)

    def prefixes(logs: Tensor) -> Tensor:
        # Its backward pass works in log space and costs low bits.
        return logs.double().logcumsumexp(-2).to(logs.dtype)

    for _ in range(iterations):
        logs = rows(logs)
        total = logs.logsumexp(-2, keepdim=True) if not causal else prefixes(logs)
        logs = (logs - total).masked_fill(hide, low)
    return rows(logs).exp().masked_fill(hide, 0)


def leftmost(
    keep: Bool[Tensor, "B L"],
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """An order that puts each row's kept tokens first, its inverse, and what is kept in it."""
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
    return order, order.argsort(dim=1), keep.gather(1, order)


def turned(t: Float[Tensor, "B H L D"], order: Int[Tensor, "B L"]) -> Float[Tensor, "B H L D"]:
    """The tokens of each row in the given order."""
    batch, heads, length, width = t.shape
    base = torch.arange(batch * heads, device=t.device).view(batch, heads, 1) * length
    at = (order[:, None] + base).flatten()
    return t.reshape(-1, width).index_select(0, at).view(t.shape)


def blocks_of(t: Float[Tensor, "B H L D"], size: int) -> Float[Tensor, "B H N C D"]:
    """Cut in N blocks of C = `size`, zeros behind the last token."""
    length = t.shape[2]
    count = -(-length // size)
    t = F.pad(t, (0, 0, 0, count * size - length))
    return t.view(*t.shape[:2], count, size, t.shape[3])
