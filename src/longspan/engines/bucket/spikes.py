"""Queries whose scores stand out from uniform, and rows put in their place."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from longspan.engines import pattern
from longspan.engines.bucket.balance import leftmost

Ranks = Float[Tensor, "B H L"]
Chosen = Int[Tensor, "B H U"]


@torch.no_grad()
def spikes(
    q: Float[Tensor, "B H L D"], k: Float[Tensor, "B H S D"], keep: Bool[Tensor, "B S"]
) -> Ranks:
    """max_j q·k_j − mean_j q·k_j over all kept keys, some queries at a time."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    hidden, total = ~keep[:, None, None], keep.sum(1).clamp(min=1).view(-1, 1, 1)
    found = q.new_empty(q.shape[:3])
    size = max(1, q.shape[0] * q.shape[1] * k.shape[2] * q.element_size())
    step = max(1, pattern.WORKSPACE // size)
    for start in range(0, q.shape[2], step):
        rows = slice(start, start + step)
        with torch.autocast(q.device.type, enabled=False):
            scores = q[:, :, rows] @ k.mT
        mean = scores.masked_fill(hidden, 0).sum(-1) / total
        found[:, :, rows] = scores.masked_fill(hidden, -math.inf).amax(-1) - mean
    return found


@torch.no_grad()
def sampled_spikes(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B H S D"],
    keep_q: Bool[Tensor, "B L"],
    keep_k: Bool[Tensor, "B S"],
    count: Int[Tensor, " B"],
    most: int,
    shared: bool,
    generator: torch.Generator | None,
) -> Ranks:
    """max_j q·k_j − (Σ_j q·k_j) / S over `count` ≤ `most` keys drawn with replacement.

    One draw serves all rows and heads, for each query apart or `shared` by all. A draw belongs to
    a query's rank among the kept ones, so padding changes nothing.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    batch, heads, length, width = q.shape
    total = keep_k.sum(1).clamp(min=1)
    keys, _, _ = leftmost(keep_k)
    queries, back, _ = leftmost(keep_q)
    base = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1) * k.shape[2]
    used = torch.arange(most, device=q.device) < count[:, None]  # B U
    found = q.new_empty(batch, heads, length)
    flat = k.reshape(-1, width)
    step = max(1, pattern.WORKSPACE // max(1, batch * heads * most * width * q.element_size()))
    draw = torch.rand(1, most, generator=generator) if shared else None
    for start in range(0, length, step):
        rows = queries[:, start : start + step]
        share = draw
        if share is None:
            share = torch.rand(rows.shape[1], most, generator=generator)
        # In float64, or large counts would round up to one key too many.
        at = (share.to(q.device).double() * total.view(-1, 1, 1)).long()  # B l U
        at = at.expand(-1, rows.shape[1], -1).flatten(1)
        at = keys.gather(1, at).view(batch, 1, -1, most)
        sample = flat.index_select(0, (at + base).flatten()).view(batch, heads, -1, most, width)
        spot = rows[:, None, :, None].expand(-1, heads, -1, width)
        scores = (sample @ q.gather(2, spot)[..., None])[..., 0]
        hidden = ~used[:, None, None]
        mean = scores.masked_fill(hidden, 0).sum(-1) / total.view(-1, 1, 1)
        top = scores.masked_fill(hidden, -math.inf).amax(-1)
        found[:, :, start : start + step] = top - mean
    return found.gather(2, back[:, None].expand(-1, heads, -1))


@torch.no_grad()
def foremost(ranks: Ranks, count: Int[Tensor, " B"], keep: Bool[Tensor, "B L"]) -> Chosen:
    """The `count` kept tokens of the largest rank, by position; L where a row has fewer."""
    length = ranks.shape[2]
    most = int(count.max())
    best = ranks.masked_fill(~keep[:, None], -math.inf).topk(most, dim=-1).indices
    legal = (torch.arange(most, device=ranks.device) < count[:, None])[:, None]
    return best.masked_fill(~legal, length).sort(-1).values


def replaced(
    t: Float[Tensor, "B H L V"], rows: Float[Tensor, "B H U V"], at: Chosen
) -> Float[Tensor, "B H L V"]:
    """t with some rows replaced; index L stands for none."""
    batch, heads, length, width = t.shape
    base = torch.arange(batch * heads, device=t.device).view(batch, heads, 1) * (length + 1)
    room = torch.nn.functional.pad(t, (0, 0, 0, 1)).reshape(-1, width)
    room = room.index_copy(0, (at + base).flatten(), rows.reshape(-1, width))
    return room.view(batch, heads, length + 1, width)[:, :, :length]
