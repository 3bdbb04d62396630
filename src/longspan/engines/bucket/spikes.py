"""Queries whose scores stand out from uniform, who leads among them, rows put in their place."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from longspan.engines import dense, pattern
from longspan.engines.bucket.balance import leftmost
from longspan.engines.bucket.cells import rows_of
from longspan.engines.dense import Layout, additive, tile_backward, tile_forward

Ranks = Float[Tensor, "B H L"]
Chosen = Int[Tensor, "B H U"]
Counts = Int[Tensor, "B L"]

# Draws of so many queries; later ones take them again, from more keys.
DRAWS = 1024


def budget(tokens: Int[Tensor, "..."], factor: int) -> Int[Tensor, "..."]:
    """factor · ⌈ln n⌉ for each count n of tokens, at most n, at least 1 unless the factor is 0."""
    return torch.minimum(factor * ceil_log(tokens), tokens)


def ceil_log(tokens: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """⌈ln n⌉, at least 1."""
    return tokens.clamp(min=1).double().log().ceil().long().clamp(min=1)


@torch.no_grad()
def spikes(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B H S D"],
    keep: Bool[Tensor, "B S"],
    *,
    first: Counts | None = None,
) -> Ranks:
    """max_j q·k_j − mean_j q·k_j over all kept keys, some queries at a time.

    Args:
        first: each query's own number of kept keys, from the left.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    total = keep.sum(1, keepdim=True).expand(-1, q.shape[2]) if first is None else first
    place = keep.cumsum(1)[:, None, None]
    found = q.new_empty(q.shape[:3])
    size = max(1, q.shape[0] * q.shape[1] * k.shape[2] * q.element_size())
    step = max(1, pattern.WORKSPACE // size)
    for start in range(0, q.shape[2], step):
        rows = slice(start, start + step)
        with torch.autocast(q.device.type, enabled=False):
            scores = q[:, :, rows] @ k.mT
        hidden = ~keep[:, None, None] | (place > total[:, None, rows, None])
        mean = scores.masked_fill(hidden, 0).sum(-1) / total[:, None, rows].clamp(min=1)
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
    total = keep_k.sum(1, keepdim=True).clamp(min=1)
    keys, _, _ = leftmost(keep_k)
    queries, back, _ = leftmost(keep_q)
    used = torch.arange(most, device=q.device) < count[:, None]  # B U
    found = q.new_empty(batch, heads, length)
    step = max(1, pattern.WORKSPACE // max(1, batch * heads * most * width * q.element_size()))
    draw = torch.rand(1, most, generator=generator) if shared else None
    for start in range(0, length, step):
        rows = queries[:, start : start + step]
        share = draw
        if share is None:
            share = torch.rand(rows.shape[1], most, generator=generator)
        # In float64, or large counts would round up to one key too many.
        at = (share.to(q.device).double() * total[..., None]).long()  # B l U
        at = keys.gather(1, at.expand(-1, rows.shape[1], -1).flatten(1)).view(batch, -1, most)
        spot = rows[:, None, :, None].expand(-1, heads, -1, width)
        seen = used[:, None].expand_as(at)
        found[:, :, start : start + step] = _drawn(q.gather(2, spot), k, at, seen, total)
    return found.gather(2, back[:, None].expand(-1, heads, -1))


def _drawn(q: Tensor, k: Tensor, at: Tensor, used: Tensor, total: Tensor) -> Tensor:
    """max − sum / total of the scores of q's l rows with the keys `at`, where used: B l U."""
    batch, heads, _, width = q.shape
    base = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1) * k.shape[2]
    sample = k.reshape(-1, width).index_select(0, (at[:, None] + base).flatten())
    with torch.autocast(q.device.type, enabled=False):
        scores = (sample.view(batch, heads, *at.shape[1:], width) @ q[..., None])[..., 0]
    hidden = ~used[:, None]
    mean = scores.masked_fill(hidden, 0).sum(-1) / total[:, None]
    return scores.masked_fill(hidden, -math.inf).amax(-1) - mean


@torch.no_grad()
def running_spikes(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B H S D"],
    keep: Bool[Tensor, "B S"],
    first: Counts,
    count: Counts,
    shared: bool,
    generator: torch.Generator | None,
) -> Ranks:
    """max_j q·k_j − (Σ_j q·k_j) / n over `count` of each query's `first` n kept keys.

    Drawn with replacement; a query's draw belongs to n, so that pieces and padding change nothing.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    batch, heads, length, width = q.shape
    most = max(1, int(count.max()))
    # Draw by draw, so that fewer draws are the first of more.
    table = torch.rand(most, 1 if shared else DRAWS, generator=generator).mT.to(q.device)
    keys, _, _ = leftmost(keep)
    total = first.clamp(min=1)
    found = q.new_empty(batch, heads, length)
    step = max(1, pattern.WORKSPACE // max(1, batch * heads * most * width * q.element_size()))
    for start in range(0, length, step):
        rows = slice(start, start + step)
        n = total[:, rows, None]
        at = (table[(n[..., 0] - 1) % len(table)].double() * n).long()
        at = keys.gather(1, at.flatten(1)).view(at.shape)
        used = torch.arange(most, device=q.device) < count[:, rows, None]
        found[:, :, rows] = _drawn(q[:, :, rows], k, at, used, total[:, rows])
    return found


@torch.no_grad()
def leading(
    ranks: Float[Tensor, "B H S"], keep: Bool[Tensor, "B S"], count: Counts, *, block: int = 256
) -> Bool[Tensor, "B H L"]:
    """Whether each of the last L tokens is among the `count` largest up to it; ties to the first.

    Later tokens change nothing. Keeps the largest so far, and compares block by block.
    """
    length, most = count.shape[1], max(1, int(count.max()))
    ranks = ranks.masked_fill(~keep[:, None], -math.inf)
    before, ranks = ranks.split([ranks.shape[2] - length, length], dim=2)
    best = before.topk(min(most, before.shape[2]), dim=2).values
    found = []
    for part, allowed in zip(ranks.split(block, 2), count.split(block, 1), strict=True):
        ahead = (best[:, :, None] >= part[..., None]).sum(-1)
        size = part.shape[2]
        earlier = torch.ones(size, size, dtype=torch.bool, device=part.device).tril(-1)
        ahead = ahead + ((part[:, :, None] >= part[..., None]) & earlier).sum(-1)
        found.append(ahead < allowed[:, None])
        best = torch.cat([best, part], 2)
        best = best.topk(min(most, best.shape[2]), dim=2).values
    return torch.cat(found, 2) & keep[:, None, -length:]


def capped(
    wish: Bool[Tensor, "B H L"], limit: Counts, used: Int[Tensor, "B H"]
) -> tuple[Bool[Tensor, "B H L"], Int[Tensor, "B H"]]:
    """The wishes granted while no more than `limit`, which never falls, were granted up to each.

    A_t = min(A_{t−1} + w_t, limit_t) = W_t + min(A_0, min_{s≤t} limit_s − W_s), W_t = Σ_{s≤t} w_s.
    """
    asked = wish.long().cumsum(2)
    room = (limit[:, None] - asked).cummin(2).values
    granted = asked + torch.minimum(room, used[..., None])
    return granted.diff(dim=2, prepend=used[..., None]) > 0, granted[..., -1]


def placed(wish: Bool[Tensor, "B H L"]) -> Chosen:
    """The places of what is true, in order; L where a row has fewer."""
    slot = wish.long().cumsum(2) - 1
    count = int(slot.amax()) + 1 if wish.numel() else 0
    at = torch.full((*wish.shape[:2], count), wish.shape[2], device=wish.device)
    row, head, token = wish.nonzero(as_tuple=True)
    at[row, head, slot[row, head, token]] = token
    return at


class UpTo(Layout):
    """Each query sees the kept keys before index `stop`: B (H|1) (U|1).

    Works on groups of `group` queries or fewer, the last filled up, so that queries that come
    after change no bit of the others.
    """

    def __init__(
        self, keep: Bool[Tensor, "B S"], stop: Int[Tensor, "B _ _"], *, group: int
    ) -> None:
        self.keep, self.stop, self.group = keep, stop, group

    def _pieces(self, q: Tensor, k: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
        """(queries, how many are missing, mask)."""
        place = torch.arange(k.shape[2], device=k.device)
        stop = self.stop.expand(-1, -1, q.shape[2])
        size = stop.shape[0] * stop.shape[1] * k.shape[2] * q.element_size()
        each = min(self.group, max(4, pattern.WORKSPACE // max(1, size)))
        for start in range(0, q.shape[2], each):
            rows = slice(start, min(start + each, q.shape[2]))
            missing = each - (rows.stop - rows.start)
            ends = F.pad(stop[:, :, rows, None], (0, 0, 0, missing), value=k.shape[2])
            yield rows, missing, additive(self.keep[:, None, None] & (place < ends), q.dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        o = v.new_empty(*q.shape[:3], v.shape[3])
        lse = v.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for rows, missing, mask in self._pieces(q, k):
            count = rows.stop - rows.start
            x = F.pad(q[:, :, rows], (0, 0, 0, missing))
            out, total = tile_forward(x, k, v, mask, scale)
            o[:, :, rows], lse[:, :, rows] = out[:, :, :count], total[:, :, :count]
        return o, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, missing, mask in self._pieces(q, k):
            grad, x, out = (F.pad(t[:, :, rows], (0, 0, 0, missing)) for t in (do, q, o))
            total = F.pad(lse[:, :, rows], (0, missing))
            part, more_k, more_v = tile_backward(grad, x, k, v, out, total, mask, scale)
            dq[:, :, rows] = part[:, :, : rows.stop - rows.start]
            dk += more_k
            dv += more_v
        return dq, dk, dv


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
    room = F.pad(t, (0, 0, 0, 1)).reshape(-1, width)
    room = room.index_copy(0, (at + base).flatten(), rows.reshape(-1, width))
    return room.view(batch, heads, length + 1, width)[:, :, :length]


def awoken(
    lazy: Float[Tensor, "B H L V"],
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S V"],
    at: Chosen,
    keep: Bool[Tensor, "B S"],
    *,
    causal: bool,
) -> Float[Tensor, "B H L V"]:
    """`lazy` with the rows at `at` replaced by softmax attention; L stands for none."""
    if not at.shape[2]:
        return lazy
    behind = k.shape[2] - q.shape[2] + 1
    stop = at + behind if causal else torch.full_like(at[:, :1], k.shape[2])
    layout = UpTo(keep, stop, group=min(16, q.shape[2]))
    o, _ = dense.union(rows_of(q, at[:, :, None])[:, :, 0], [(layout, k, v)])
    return replaced(lazy, o, at)
