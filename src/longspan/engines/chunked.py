"""Chunks of C tokens: any weight between tokens of one chunk, sums of outer products beyond it.

Tokens stand in one row from a chunk's beginning on; the last chunk may be short. Weights need no
normaliser, so that chunks only add up. What a group of chunks computes is computed again in the
backward pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Tokens, and elements of one temporary, worked on at once.
TOKENS, ELEMENTS = 256, 1 << 21

Shared = Float[Tensor, "B T D"]
Wide = Float[Tensor, "B T V"]


class Unfinished(NamedTuple):
    """Tokens of a chunk that is not complete, from its place 0 on; sums over those before; count.

    A row of zeros has seen nothing.
    """

    tokens: Float[Tensor, "B C _"]
    sums: Float[Tensor, "B D V"]
    seen: Int[Tensor, "B"]


def within(
    q: Shared,
    k: Shared,
    v: Wide,
    keep: Bool[Tensor, "B T"] | None,
    bias: Float[Tensor, " J"],
    weigh: Callable[[Tensor, Tensor], Tensor],
    *,
    chunk: int,
    causal: bool,
) -> Wide:
    """o_i = Σ_j weigh(q_i·k_j + bias[j − i]) v_j over the tokens j of i's chunk, causally j ≤ i.

    Args:
        bias: of j − i = 1 − C … C − 1.
        weigh: (scores, seen) → weights, 0 where not seen; scores may be anything there.
    """
    wide, length = torch.promote_types(q.dtype, torch.float32), q.shape[1]
    chunk = min(chunk, max(length, 1))
    first = bias.shape[0] // 2  # where j − i = 0
    keep = q.new_ones(q.shape[:2], dtype=torch.bool) if keep is None else keep
    q, k, v, keep = (_cut(t, chunk) for t in (q, k, v, keep[..., None]))
    rows = max(1, min(chunk, ELEMENTS // chunk))
    together = max(1, max(TOKENS, rows) // chunk)

    def work(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, start: int) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            stop = start + q.shape[2]
            keys = stop if causal else chunk
            part = bias[first - stop + 1 : first - start + keys].to(wide)
            near = part.unfold(0, keys, 1).flip(0)  # rows start … stop of bias[j − i]
            seen = keep[:, :, None, :keys, 0]
            if causal:
                order = torch.arange(keys, device=q.device)
                seen = seen & (order <= order[start:, None])
            weights = weigh(q.to(wide) @ k[:, :, :keys].to(wide).mT + near, seen)
            return (weights @ v[:, :, :keys].to(wide)).to(v.dtype)

    outs = []
    for part in zip(*(t.split(together, 1) for t in (q, k, v, keep)), strict=True):
        tiles = [
            _recomputed(work, tile, *part[1:], i * rows)
            for i, tile in enumerate(part[0].split(rows, 2))
        ]
        outs.append(torch.cat(tiles, 2).flatten(1, 2))
    return torch.cat(outs, 1)[:, :length]


def newest(
    q: Float[Tensor, "B 1 D"],
    k: Shared,
    v: Wide,
    keep: Bool[Tensor, "B T"],
    bias: Float[Tensor, " J"],
    weigh: Callable[[Tensor, Tensor], Tensor],
    place: Int[Tensor, "B"],
) -> Float[Tensor, "B 1 V"]:
    """`within` for one query a row, at `place` of the one chunk that all keys are of."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        apart = torch.arange(k.shape[1], device=k.device) - place[:, None]
        near = bias[bias.shape[0] // 2 + apart][:, None].to(wide)
        weights = weigh(q.to(wide) @ k.to(wide).mT + near, keep[:, None])
        return (weights @ v.to(wide)).to(v.dtype)


def before(
    q: Shared, k: Shared, v: Wide, sums: Float[Tensor, "B D V"] | None, *, chunk: int
) -> tuple[Wide, Float[Tensor, "B D V"]]:
    """o_i = q_iᵀ S, S = Σ_j k_j v_jᵀ over all chunks before i's, and S over all tokens."""
    wide, length = torch.promote_types(q.dtype, torch.float32), q.shape[1]
    none = q.new_zeros(len(q), q.shape[2], v.shape[2], dtype=wide)
    total = none if sums is None else sums
    chunk = min(chunk, max(length, 1))
    q, k, v = (_cut(t, chunk) for t in (q, k, v))
    together = max(1, ELEMENTS // max(1, len(q) * q.shape[3] * v.shape[3]))

    def work(q: Tensor, k: Tensor, v: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            own = k.to(wide).mT @ v.to(wide)  # B N D V
            every = torch.cat([sums[:, None], own], 1).cumsum(1)
            return (q.to(wide) @ every[:, :-1]).to(v.dtype), every[:, -1]

    outs: list[Tensor] = []
    for part in zip(*(t.split(together, 1) for t in (q, k, v)), strict=True):
        o, total = _recomputed(work, *part, total)
        outs.append(o.flatten(1, 2))
    return torch.cat(outs, 1)[:, :length], total


def _cut(t: Tensor, chunk: int) -> Tensor:
    """B T … in chunks, the last filled with zeros: B N C …"""
    return F.pad(t, (0, 0, 0, -t.shape[1] % chunk)).unflatten(1, (-1, chunk))


def _checkpointed(work: Callable[..., Any], *ts: Any) -> Any:
    return checkpoint(work, *ts, use_reentrant=False) if torch.is_grad_enabled() else work(*ts)


# A loop over chunks that dynamo would unroll: eager under torch.compile.
_recomputed: Any = torch.compiler.disable(_checkpointed)
