"""Weights that are the probability of a hash collision, summed exactly or through hash tables.

Backward, the weight's derivative is bounded: (τ/2) · w stands for dw/dx, which grows without
bound where x = q·k nears 1.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engines import pattern
from longspan.engines.bucket.order import Buckets, hash_angles, rotations
from longspan.shapes import Keys, Outputs, Queries, Values

KeyBuckets = Int[Tensor, "B H R S"]


def expected(q: Queries, k: Keys, v: Values, *, bits: int, exact: bool = False) -> Outputs:
    """W v with w_ij = (1 − arccos(q_i·k_j)/π)^bits for unit q and k, some queries at a time.

    Backward takes the bound above, or with `exact` the derivative itself, whose x is kept 1e−6
    away from ±1.
    """
    return _expected(q, k, v, bits, exact)


def sampled(q: Queries, k: Keys, v: Values, of_q: Buckets, of_k: KeyBuckets, bits: int) -> Outputs:
    """The mean over rounds of Σ_j [code of i = code of j] v_j, by tables of 2^bits sums.

    Backward sums through tables of the same codes, with the bound above and unit q and k: d · V
    numbers a code, a few columns at a time. Nothing of size L · S is made.
    """
    return _sampled(q, k, v, of_q, of_k, bits)


def sampled_by(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    bits: int,
    rounds: int,
    generator: torch.Generator | None = None,
) -> Outputs:
    """`sampled` under fresh codes, the signs of `bits` random projections in each round."""
    signs = (2,) * bits  # of one direction each
    turns = rotations(q.shape[1], rounds, q.shape[3], signs, generator=generator)
    of_q, of_k = (hash_angles(t, turns, signs) for t in (q, k))
    return sampled(q, k, v, of_q, of_k, bits)


class _Expected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bits: int, exact: bool) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.bits, ctx.exact = bits, exact
        o = v.new_empty(*q.shape[:3], v.shape[3])
        for rows in _pieces(q, k.shape[2]):
            o[:, :, rows] = _weights(q[:, :, rows] @ k.mT, bits) @ v
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        bits, do = ctx.bits, grads[0]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows in _pieces(q, k.shape[2]):
            x = q[:, :, rows] @ k.mT
            weights, g = _weights(x, bits), do[:, :, rows]
            if ctx.exact:
                x = x.clamp(-1 + 1e-6, 1 - 1e-6)
                slope = (bits / math.pi) * _weights(x, bits - 1) * (1 - x * x).rsqrt()
            else:
                slope = weights * (bits / 2)
            dv += weights.mT @ g
            slope = slope * (g @ v.mT)
            dq[:, :, rows] = slope @ k
            dk += slope.mT @ q[:, :, rows]
        return dq, dk, dv, None, None


def _weights(x: Tensor, bits: int) -> Tensor:
    return (1 - x.clamp(-1, 1).acos() / math.pi) ** bits


def _pieces(q: Tensor, keys: int) -> Iterator[slice]:
    each = pattern.WORKSPACE // max(1, q.shape[0] * q.shape[1] * keys * q.element_size())
    for start in range(0, q.shape[2], max(1, each)):
        yield slice(start, start + max(1, each))


class _Sampled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, bits: int
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, of_q, of_k)
        ctx.bits = bits
        return _passed(v, of_k, of_q, bits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, of_q, of_k = ctx.saved_tensors
        bits, do = ctx.bits, grads[0].contiguous()
        dq = _weighted(v, k, of_k, do, of_q, bits)
        dk = _weighted(do, q, of_q, v, of_k, bits)
        return dq, dk, _passed(do, of_q, of_k, bits), None, None, None


def _addresses(codes: Tensor, bits: int) -> Tensor:
    """B H R L → R (B H L): the rows of one table for all heads."""
    batch, heads, rounds, _ = codes.shape
    base = torch.arange(batch * heads, device=codes.device).view(batch, heads, 1, 1) << bits
    return (codes + base).permute(2, 0, 1, 3).reshape(rounds, -1)


def _passed(values: Tensor, given: Tensor, asked: Tensor, bits: int) -> Tensor:
    """The mean over rounds of the sums of `values` that stand under the asked codes."""
    batch, heads, rounds, length = asked.shape
    width = values.shape[3]
    table = values.new_empty((batch * heads) << bits, width)
    flat, out = values.reshape(-1, width), values.new_zeros(batch * heads * length, width)
    step = max(1, pattern.WORKSPACE // max(1, width * values.element_size()))
    for put, take in zip(_addresses(given, bits), _addresses(asked, bits), strict=True):
        table.zero_().index_add_(0, put, flat)
        for start in range(0, len(take), step):
            some = slice(start, start + step)
            out[some] += table.index_select(0, take[some])
    return (out / rounds).view(batch, heads, length, width)


def _weighted(
    left: Tensor, right: Tensor, given: Tensor, weight: Tensor, asked: Tensor, bits: int
) -> Tensor:
    """(bits/2) · mean over rounds of Σ_j [codes agree] (weight_i · left_j) right_j."""
    batch, heads, rounds, length = asked.shape
    many, width = left.shape[3], right.shape[3]
    codes = (batch * heads) << bits
    left, right = left.reshape(-1, many), right.reshape(-1, width)
    weight, out = weight.reshape(-1, many), right.new_zeros(batch * heads * length, width)
    size = width * right.element_size()
    columns = min(many, max(1, pattern.WORKSPACE // 2 // max(1, codes * size)))
    step = max(1, pattern.WORKSPACE // 4 // max(1, columns * size))
    table = right.new_empty(codes, columns * width)
    for put, take in zip(_addresses(given, bits), _addresses(asked, bits), strict=True):
        for first in range(0, many, columns):
            some = slice(first, first + columns)
            part = table[:, : (min(first + columns, many) - first) * width].zero_()
            for start in range(0, len(put), step):
                rows = slice(start, start + step)
                product = left[rows, some, None] * right[rows, None]
                part.index_add_(0, put[rows], product.flatten(1))
            for start in range(0, len(take), step):
                rows = slice(start, start + step)
                found = part.index_select(0, take[rows]).unflatten(1, (-1, width))
                out[rows] += (weight[rows, None, some] @ found)[:, 0]
    return (out * (bits / 2 / rounds)).view(batch, heads, length, width)


_expected: Any = torch.compiler.disable(_Expected.apply)
_sampled: Any = torch.compiler.disable(_Sampled.apply)
