"""Causal attention to the last tokens and to summaries of chunks that are closed, by distance."""

from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longspan.engines import dense, distance
from longspan.shapes import Keys, Outputs, Queries, Values

# Queries of one tile.
TILE = 128


class Near(NamedTuple):
    """Keys of tokens: those before the first token of all, and these. `table`: their distances.

    With a table of `window` rows a query sees the last `window` tokens; `window` − 1 of them stand
    before. content, place: what is added to queries where they meet keys, and distances.
    """

    k: Keys
    v: Values
    keep: Bool[Tensor, "B S"]
    table: Float[Tensor, "H window D"]
    content: Float[Tensor, "H D"]
    place: Float[Tensor, "H D"]


class Far(NamedTuple):
    """Summaries, at ascending places, each seen by the queries of chunks first … last − 1.

    A chunk has `rank` places, from 0 with the first token on. `table`: distances in places, from 0,
    to the last place of a query's own chunk.
    """

    k: Keys
    v: Values
    at: Int[Tensor, "S"]
    first: Int[Tensor, "B S"]
    last: Int[Tensor, "B S"]
    rank: int
    table: Float[Tensor, "H N D"]


def recent(q: Queries, start: int, chunk: int, near: Near, far: Far | None) -> Outputs:
    """One softmax over q_i·k_j + u·k_j + (q_i + v)·r_{i−j} and q_i·(k̄_m + r̄_{i−m}), q over √D.

    Each tile of queries is computed again in the backward pass.

    Args:
        q: of the tokens from `start` on.
        chunk: tokens of one, from the first token on.
    """
    outs, stop = [q.new_zeros(*q.shape[:2], 0, near.v.shape[3])], start + q.shape[2]
    size = max(chunk, TILE // chunk * chunk)
    again = torch.is_grad_enabled() and stop - start > size
    for low in range(start // size * size, stop, size) if q.shape[2] else ():
        rows = range(max(low, start), min(low + size, stop))
        mine = q[:, :, rows.start - start : rows.stop - start]
        work = rows, chunk, _nearby(near, rows), far and _behind(far, rows, chunk)
        outs.append(
            checkpoint(_tile, mine, *work, use_reentrant=False) if again else _tile(mine, *work)
        )
    return torch.cat(outs, 2)


def _nearby(near: Near, rows: range) -> Near:
    seen = slice(rows.start, rows.stop + near.table.shape[1] - 1)
    return near._replace(k=near.k[:, :, seen], v=near.v[:, :, seen], keep=near.keep[:, seen])


def _behind(far: Far, rows: range, chunk: int) -> Far:
    count = int((far.at < (rows.stop - 1) // chunk * far.rank).sum())
    return far._replace(
        k=far.k[:, :, :count],
        v=far.v[:, :, :count],
        at=far.at[:count],
        first=far.first[:, :count],
        last=far.last[:, :count],
    )


def _tile(q: Tensor, rows: range, chunk: int, near: Near, far: Far | None) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        q = q.to(torch.promote_types(q.dtype, torch.float32)) * q.shape[3] ** -0.5
        wide = q.dtype
        i = torch.arange(rows.start, rows.stop, device=q.device)
        before = near.table.shape[1] - 1
        j = torch.arange(rows.start - before, rows.stop, device=q.device)
        by_place = q + near.place.to(wide)[:, None]
        table = near.table.to(wide).flip(1)  # by j − i
        bias = distance.scores(by_place, table, i, j, before=before)
        content = einsum(near.content.to(wide), near.k.to(wide), "H D, B H S D -> B H S")
        bias = bias + content[:, :, None]
        steps = i[:, None] - j
        seen = ((steps >= 0) & (steps <= before)) & near.keep[:, None]
        k, v = near.k, near.v
        if far is not None and len(far.at):
            own = i[:, None] // chunk
            steps = ((own + 1) * far.rank - 1 - far.at).clamp(min=0)
            reach = far.table[:, : int(steps.max()) + 1].to(wide)
            places = distance.by_index(q, reach, steps.expand(len(q), -1, -1))
            shown = (far.first[:, None] <= own) & (own < far.last[:, None])
            k, v = torch.cat([k, far.k], 2), torch.cat([v, far.v], 2)
            bias, seen = torch.cat([bias, places], 3), torch.cat([seen, shown], 2)
        o = dense.explicit(q, k, v, seen=seen[:, None], bias=bias, scale=1.0)[0]
    return o.to(near.v.dtype)
