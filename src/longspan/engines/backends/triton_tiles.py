# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
"""Tiled softmax attention in Triton: (o, logsumexp), and gradients under a merged softmax.

Checked by the Triton interpreter in float32, compiled for sm_90 without spilling in bfloat16; not
yet run on a GPU, and not tuned.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.shapes import Keep

# Queries, and keys, of a tile; half where the heads are wide or float32.
TILE = 64


@triton.jit
@no_type_check
def _tile(base, at, length, width, WIDE: tl.constexpr):
    col = tl.arange(0, WIDE)
    return tl.load(
        base + at[:, None] * width + col[None, :],
        mask=(at < length)[:, None] & (col < width)[None, :],
        other=0.0,
    )


@triton.jit
@no_type_check
def _put(base, at, length, width, tile, WIDE: tl.constexpr):
    col = tl.arange(0, WIDE)
    inside = (at < length)[:, None] & (col < width)[None, :]
    tl.store(base + at[:, None] * width + col[None, :], tile, mask=inside)


@triton.jit
@no_type_check
def _seen(keep, i, j, queries, keys, CAUSAL: tl.constexpr, HIDES: tl.constexpr):
    """Which pairs of a tile meet; the last query stands beside the last key."""
    seen = (i < queries)[:, None] & (j < keys)[None, :]
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None] + (keys - queries))
    if HIDES:
        seen = seen & (tl.load(keep + j, mask=j < keys, other=0) != 0)[None, :]
    return seen


@triton.jit
@no_type_check
def _forward(
    q, k, v, keep, o, lse, heads, queries, keys, width, value, scale,
    ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    CAUSAL: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS
    i = first + tl.arange(0, ROWS)
    qs = _tile(q + row * queries * width, i, queries, width, D)
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    out = tl.zeros((ROWS, V), dtype=tl.float32)
    limit = keys
    if CAUSAL:
        limit = tl.minimum(keys, keys - queries + first + ROWS)
    for start in range(0, limit, COLS):
        j = start + tl.arange(0, COLS)
        ks = _tile(k + row * keys * width, j, keys, width, D)
        vs = _tile(v + row * keys * value, j, keys, value, V)
        seen = _seen(keep + row // heads * keys, i, j, queries, keys, CAUSAL, HIDES)
        scores = tl.dot(qs, tl.trans(ks), input_precision="tf32x3") * scale
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weights = tl.exp(top - finite), tl.exp(scores - finite[:, None])
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None]
        out += tl.dot(weights.to(v.dtype.element_ty), vs, input_precision="tf32x3")
        top = higher
    dead = total == 0.0
    _put(o + row * queries * value, i, queries, value, out / tl.where(dead, 1.0, total)[:, None], V)
    sums = tl.where(dead, float("-inf"), top + tl.log(tl.where(dead, 1.0, total)))
    tl.store(lse + row * queries + i, sums, mask=i < queries)


@triton.jit
@no_type_check
def _gradients(
    qs, ks, vs, dos, lse, delta, keep, i, j, queries, keys, scale,
    CAUSAL: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """The weights of a tile, and the gradient of its unscaled scores."""
    sums = tl.load(lse + i, mask=i < queries, other=0.0)
    inner = tl.load(delta + i, mask=i < queries, other=0.0)
    seen = _seen(keep, i, j, queries, keys, CAUSAL, HIDES)
    scores = tl.dot(qs, tl.trans(ks), input_precision="tf32x3") * scale
    weights = tl.where(seen, tl.exp(tl.where(seen, scores - sums[:, None], 0.0)), 0.0)
    dweights = tl.dot(dos, tl.trans(vs), input_precision="tf32x3")
    return weights, weights * (dweights - inner[:, None]) * scale


@triton.jit
@no_type_check
def _to_keys(
    q, k, v, keep, do, lse, delta, dk, dv, heads, queries, keys, width, value, scale,
    ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    CAUSAL: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLS
    j = first + tl.arange(0, COLS)
    ks = _tile(k + row * keys * width, j, keys, width, D)
    vs = _tile(v + row * keys * value, j, keys, value, V)
    key_sum = tl.zeros((COLS, D), dtype=tl.float32)
    value_sum = tl.zeros((COLS, V), dtype=tl.float32)
    low = 0
    if CAUSAL:
        low = tl.maximum(first - (keys - queries), 0) // ROWS * ROWS
    for start in range(low, queries, ROWS):
        i = start + tl.arange(0, ROWS)
        qs = _tile(q + row * queries * width, i, queries, width, D)
        dos = _tile(do + row * queries * value, i, queries, value, V)
        weights, dscores = _gradients(
            qs, ks, vs, dos, lse + row * queries, delta + row * queries,
            keep + row // heads * keys, i, j, queries, keys, scale, CAUSAL, HIDES,
        )  # fmt: skip
        value_sum += tl.dot(tl.trans(weights.to(dos.dtype)), dos, input_precision="tf32x3")
        key_sum += tl.dot(tl.trans(dscores.to(qs.dtype)), qs, input_precision="tf32x3")
    _put(dk + row * keys * width, j, keys, width, key_sum, D)
    _put(dv + row * keys * value, j, keys, value, value_sum, V)


@triton.jit
@no_type_check
def _to_queries(
    q, k, v, keep, do, lse, delta, dq, heads, queries, keys, width, value, scale,
    ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    CAUSAL: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS
    i = first + tl.arange(0, ROWS)
    qs = _tile(q + row * queries * width, i, queries, width, D)
    dos = _tile(do + row * queries * value, i, queries, value, V)
    query_sum = tl.zeros((ROWS, D), dtype=tl.float32)
    limit = keys
    if CAUSAL:
        limit = tl.minimum(keys, keys - queries + first + ROWS)
    for start in range(0, limit, COLS):
        j = start + tl.arange(0, COLS)
        ks = _tile(k + row * keys * width, j, keys, width, D)
        vs = _tile(v + row * keys * value, j, keys, value, V)
        _, dscores = _gradients(
            qs, ks, vs, dos, lse + row * queries, delta + row * queries,
            keep + row // heads * keys, i, j, queries, keys, scale, CAUSAL, HIDES,
        )  # fmt: skip
        query_sum += tl.dot(dscores.to(ks.dtype), ks, input_precision="tf32x3")
    _put(dq + row * queries * width, i, queries, width, query_sum, D)


class Tiles:
    """Every query meets every key that `keep` shows, or every earlier one."""

    def __init__(self, *, causal: bool, keep: Keep | None) -> None:
        self.causal, self.keep = causal, keep

    def _ready(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], Tensor, tuple, dict]:
        """q, k, v of one dtype, the keys to see, the sizes, and the constants."""
        kind = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        flat = [t.to(kind).contiguous() for t in (q, k, v)]
        seen = q if self.keep is None else self.keep.contiguous().view(torch.uint8)
        width, value = q.shape[3], v.shape[3]
        wide = [max(16, triton.next_power_of_2(n)) for n in (width, value)]
        tile = TILE if max(wide) <= 64 and flat[0].element_size() == 2 else TILE // 2
        constants = {
            "ROWS": tile,
            "COLS": tile,
            "D": wide[0],
            "V": wide[1],
            "CAUSAL": self.causal,
            "HIDES": self.keep is not None,
            "num_warps": 8,
        }
        return flat, seen, (q.shape[1], q.shape[2], k.shape[2], width, value), constants

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(o: B H L V, logsumexp: B H L), the latter −inf where nothing is seen."""
        flat, seen, sizes, constants = self._ready(q, k, v)
        o = q.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        grid = q.shape[0] * q.shape[1], -(-q.shape[2] // constants["ROWS"])
        _forward[grid](*flat, seen, o, lse, *sizes, scale, **constants)
        return o, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv), given the output and logsumexp of the whole softmax."""
        flat, seen, sizes, constants = self._ready(q, k, v)
        do, lse = do.to(flat[0].dtype).contiguous(), lse.contiguous()
        delta = (do.float() * o.float()).sum(-1)
        given = (*flat, seen, do, lse, delta)
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        rows = q.shape[0] * q.shape[1]
        _to_keys[(rows, -(-k.shape[2] // constants["COLS"]))](
            *given, dk, dv, *sizes, scale, **constants
        )
        _to_queries[(rows, -(-q.shape[2] // constants["ROWS"]))](
            *given, dq, *sizes, scale, **constants
        )
        return dq, dk, dv
