"""Patterns by PyTorch's flex_attention: one fused kernel from a pattern's own membership test.

Values are checked by its eager form on a CPU; compiled, and its gradients, not yet run on a GPU.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from longspan.engines.pattern.values import Listing, Pattern, listing
from longspan.errors import LongspanError
from longspan.shapes import Keys, LogSums, Outputs, Queries, Values

# The block of the kernel's default tiles on a GPU; others need tiles to match.
SIZE = 128

Member = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@torch.compiler.disable
def attend(
    q: Queries, k: Keys, v: Values, shape: Pattern, *, scale: float | None = None
) -> tuple[Outputs, LogSums]:
    """Softmax attention under one pattern, and the logsumexp of the scores (−inf: sees nothing).

    Raises:
        LongspanError: gradients on a CPU, where flex_attention has none.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled():
        if any(t.requires_grad for t in (q, k, v)):
            raise LongspanError(
                "flex_attention has no gradients on a CPU: leave the block of "
                'backends.use("flex"), or compute under torch.no_grad().'
            )
        q, k, v = q.detach(), k.detach(), v.detach()
    kind = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    queries, keys = q.shape[2], k.shape[2]
    # Blocks are counted from the first key, those of queries too.
    front = (keys - queries) % SIZE
    wide = F.pad(q, (0, 0, front, 0)).to(kind), k.to(kind), v.to(kind)
    mask = _mask(shape, queries + front, keys, q.device)
    with torch.autocast(q.device.type, enabled=False):
        try:
            o, sums = _kernel(shape, q.device.type)(*wide, mask, scale)
        except FailOnRecompileLimitHit:  # a pattern that is compiled anew for every length
            _kernel.cache_clear()
            o, sums = _kernel(shape, q.device.type)(*wide, mask, scale)
    return o[:, :, front:].to(v.dtype), sums[:, :, front:]


@lru_cache(maxsize=64)
def _kernel(shape: Pattern, device: str) -> Any:
    def call(
        q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        aux = AuxRequest(lse=True)
        o, sums = flex_attention(q, k, v, block_mask=mask, scale=scale, return_aux=aux)
        return o, cast(Tensor, sums.lse)

    if device == "cpu":
        return call
    # Compiled forms are counted, and limited, per code object: each pattern has its own.
    call.__code__ = call.__code__.replace(co_name=f"flex_{type(shape).__name__}")
    return torch.compile(call, fullgraph=True)  # its uncompiled form would hold L × S scores


@lru_cache(maxsize=64)
def _mask(shape: Pattern, queries: int, keys: int, device: torch.device) -> BlockMask:
    found = listing(shape, queries, keys, SIZE, SIZE)
    rows = found.rows - (keys - queries) // SIZE
    held = torch.zeros(2, -(-queries // SIZE), -(-keys // SIZE), dtype=torch.bool)
    held[found.full.long(), rows, found.cols] = True
    counts = held.sum(-1, dtype=torch.int32)[:, None, None].to(device)
    order = (~held).to(torch.uint8).argsort(dim=-1, stable=True)
    order = order.to(torch.int32)[:, None, None].to(device)
    return BlockMask.from_kv_blocks(
        counts[0],
        order[0],
        counts[1],
        order[1],
        BLOCK_SIZE=SIZE,
        mask_mod=_member(shape, found, queries, keys, device),
        seq_lengths=(queries, keys),
    )


def _member(
    shape: Pattern, found: Listing, queries: int, keys: int, device: torch.device
) -> Member:
    """Whether query i, of those given, sees key j: the pattern's own test, or a table of it."""
    first = keys - queries

    def member(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return shape.sees(i.long() + first, j.long(), keys)  # reaches pass 32 bits

    one = torch.zeros(1, dtype=torch.int32, device=device)
    try:
        torch.vmap(member)(one, one, one, one)
    except RuntimeError:  # draws, and matrices that lie elsewhere, cannot be traced
        return _table(shape, found, first, keys, device)
    return member


def _table(shape: Pattern, found: Listing, first: int, keys: int, device: torch.device) -> Member:
    """The same from bits: 2 KiB a block of which some pairs are seen."""
    rows, cols = found.rows[~found.full], found.cols[~found.full]
    slot = torch.zeros(-(-keys // SIZE), -(-keys // SIZE), dtype=torch.int32)
    slot[rows, cols] = torch.arange(len(rows), dtype=torch.int32)
    parts = []
    for some in torch.arange(len(rows)).split(256):
        i = (rows[some] * SIZE)[:, None] + torch.arange(SIZE)
        j = (cols[some] * SIZE)[:, None] + torch.arange(SIZE)
        seen = shape.sees(i[:, :, None].clamp(first, keys - 1), j[:, None], keys)
        eights = seen.expand(len(some), SIZE, SIZE).unflatten(2, (-1, 8))
        parts.append((eights.int() << torch.arange(8)).sum(-1).to(torch.uint8))
    bits = torch.cat(parts or [torch.zeros(1, SIZE, SIZE // 8, dtype=torch.uint8)]).to(device)
    slot = slot.to(device)

    def member(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        i = i + first
        eight = bits[slot[i // SIZE, j // SIZE], i % SIZE, j % SIZE // 8]
        return (eight.int() >> (j % 8)) & 1 != 0

    return member
