"""Scores by distance, q_i · W R(p_i − p_j) with sinusoids R, between any two sets of places."""

from math import gcd

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from longspan.shapes import Queries

Weight = Float[Tensor, "H D E"]


def waves(pos: Int[Tensor, "*shape"], width: int) -> tuple[Tensor, Tensor]:
    """(sin, cos) of pos · 10000^(−2c/E), c < E/2, each *shape E/2, in float64."""
    plane = torch.arange(width // 2, dtype=torch.float64, device=pos.device)
    angles = pos[..., None] * 10000.0 ** (-2 * plane / width)
    return angles.sin(), angles.cos()


def shifted(q: Queries, weight: Weight, at_q: range, at_k: range) -> Float[Tensor, "B H L S"]:
    """Scores of queries and keys in even steps: one product a distance, then a view of them.

    Distances fall by one entry with each key and grow with each query, so that entry (i, j) of the
    scores lies at a stride of its own in the table B H L N of all distances.
    """
    length, keys = len(at_q), len(at_k)
    if not length or not keys or not q.numel():
        return q.new_zeros(*q.shape[:2], length, keys)
    unit = gcd(at_q.step, at_k.step)
    down, right = at_q.step // unit, at_k.step // unit
    count = (length - 1) * down + (keys - 1) * right + 1
    distance = at_q[-1] - at_k[0] - unit * torch.arange(count, device=q.device)
    r = torch.cat(waves(distance, weight.shape[2]), -1).to(weight.dtype)
    r = einsum(weight, r, "H D E, N E -> H N D").to(q.dtype)
    by_distance = (q @ r.mT).contiguous()
    strides = (*by_distance.stride()[:2], max(count - down, 0), right)  # one query: no stride
    return by_distance.as_strided(
        (*q.shape[:2], length, keys), strides, by_distance.storage_offset() + (length - 1) * down
    )


def factorised(
    q: Queries, weight: Weight, at_q: Int[Tensor, "#B L"], at_k: Int[Tensor, "#B S"]
) -> Float[Tensor, "B H L S"]:
    """The same for any places, by sin(a − b) and cos(a − b): a product of width E."""
    a_sin, a_cos = einsum(q, weight.to(q.dtype), "B H L D, H D E -> B H L E").chunk(2, -1)
    sin, cos = (t.to(q.dtype)[:, None] for t in waves(at_q, weight.shape[2]))
    of_keys = torch.cat(waves(at_k, weight.shape[2]), -1).to(q.dtype)[:, None]
    of_queries = torch.cat([a_cos * sin - a_sin * cos, a_sin * sin + a_cos * cos], -1)
    return of_queries @ of_keys.mT
